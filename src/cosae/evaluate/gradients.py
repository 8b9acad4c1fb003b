"""Which tokens teach the encoder: shares of its gradient by norm quartile, with the batch's competition kept.

In: an SAE and activations. Out: plain numbers. For batches of tokens, by quartile of |x| within the batch, the gradient
of the batch's loss with respect to the encoder rows, split by the tokens it comes from:

    G_q = ∂/∂E (1/B) Σ_{t in q} Σ_d (x_t − x̂_t)²            Σ_q G_q is the batch's whole gradient

under three selections:

    batch           the training rule over the whole batch: tokens compete for k·B entries, as in training
    per_token       each token keeps its own k: no competition
    quartile_alone  the training rule over each quartile by itself: the paper's protocol (§5.6), which takes away the
                    competition that it is meant to show (audit §9 #12)

`share` is |G_q| / Σ_q |G_q|; `token_share` the same of Σ_t |g_t|, where tokens that pull against one another do not
cancel; g_t is the gradient of one token's loss. `feature_ratio` is the paper's number: the median over features of the
row norms of G_4 over those of G_1. Where a score is an inner product, |g_t| grows with |z|·|residual|, that is with the
square of the norm: 1.6 between quartiles whose norms differ 1.28-fold (§9 #12), which is why mean norms stand beside.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.evaluate.encoded import norm_quartiles, row_slices
from cosae.sae.loss import squared_error
from cosae.sae.model import SAE, TrainOutput
from cosae.sae.selector import Selector
from cosae.shown import counted
from cosae.types import Activations

CHUNK_NUMBERS = 8_000_000
"""Numbers gathered at once: a bound on memory, of no influence on the result."""
SELECTIONS = ("batch", "per_token", "quartile_alone")
ACTIVE_GRADIENT = 1e-10
"""Features whose row norm is above this in the first or last quartile enter `feature_ratio` (paper §5.6)."""


def measure_gradients(
    sae: SAE, activations: Activations | Tensor, *, batch_tokens: int = 2048, n_batches: int = 16, seed: int = 0
) -> dict[str, Any]:
    """Gradient shares by norm quartile, as plain numbers.

    sae           any but a gated one; it is not changed
    activations   N tokens, or (N, d_in); all-zero rows are left out. Say whether sinks are among them: they are the
                  longest quartile's longest tokens
    batch_tokens  tokens per batch, as in training; of fewer tokens one batch is made
    n_batches     batches at most, drawn without replacement
    seed          seed of the draw

    Returns tokens, batches, quartile_norms (mean |x|), norm_ratio_squared ((Q4 / Q1)²) and selections[name] with, by
    quartile, share, token_share, loss_share, l0; feature_ratio, features_above_2 (share of features with a ratio above
    2), features (how many entered). Raises CosaeError for a gated SAE and for fewer than 8 tokens.
    """
    if sae.cfg.selector == "gated":
        raise CosaeError(
            "gradients of a gated SAE go through two paths that have no one score; choose another selector."
        )
    x_ND = activations.x_ND if isinstance(activations, Activations) else activations
    x_ND = sae._checked(x_ND)
    x_ND = x_ND[(x_ND != 0).any(-1)]
    if len(x_ND) < 8 or batch_tokens < 8 or n_batches < 1:
        raise CosaeError(
            f"gradient shares need at least 8 tokens, 8 a batch and one batch. Got {counted(len(x_ND), 'token')}."
        )
    size = min(batch_tokens, len(x_ND))
    order = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(seed))
    batches = order[: len(order) // size * size].reshape(-1, size)[:n_batches]
    trained, apart = _twin(sae), _twin(sae, per_token=True)
    sums = {name: _Sums(sae.d_sae, size) for name in SELECTIONS}
    norm_4, count_4 = torch.zeros(2, 4, dtype=torch.float64)
    for rows in batches:
        x_BD = x_ND[rows.to(x_ND.device)].float().to(sae.device)
        norm_B = x_BD.double().norm(dim=-1).cpu()
        quartile_B = norm_quartiles(norm_B, torch.ones_like(norm_B, dtype=torch.bool))[0]
        norm_4.index_add_(0, quartile_B, norm_B)
        count_4 += torch.bincount(quartile_B, minlength=4)
        sums["batch"].add(trained, x_BD, quartile_B)
        sums["per_token"].add(apart, x_BD, quartile_B)
        for q in range(4):
            inside_B = quartile_B == q
            sums["quartile_alone"].add(trained, x_BD[inside_B.to(x_BD.device)], quartile_B[inside_B])
    mean_4 = norm_4 / count_4.clamp_min(1)
    return {
        "tokens": int(batches.numel()),
        "batches": len(batches),
        "batch_tokens": size,
        "seed": seed,
        "quartile_norms": mean_4.tolist(),
        "norm_ratio_squared": float((mean_4[3] / mean_4[0]) ** 2) if count_4[0] > 0 else None,
        "selections": {name: one.numbers(count_4) for name, one in sums.items()},
    }


def _twin(sae: SAE, per_token: bool = False) -> SAE:
    """A copy with gradients on; per_token: one that keeps each token's own k largest."""
    twin = copy.deepcopy(sae).requires_grad_(True)
    if per_token and sae.cfg.selector == "batch_topk":
        selector = Selector("topk", sae.k, sae.d_sae, sae.cfg.bandwidth).to(sae.device)
        selector.rank_gain_F = twin.selector.rank_gain_F
        twin.selector = selector
    return twin


class _Sums:
    """One selection, summed over batches; leading size 4 is the quartile."""

    def __init__(self, d_sae: int, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self.norm_4, self.token_norm_4, self.loss_4, self.entries_4 = torch.zeros(4, 4, dtype=torch.float64)
        self.row_norm_4F = torch.zeros(4, d_sae, dtype=torch.float64)

    def add(self, sae: SAE, x_BD: Tensor, quartile_B: Tensor) -> None:
        """One forward pass by the training rule, one backward pass for each quartile in it."""
        if not len(x_BD):
            return
        with torch.enable_grad():
            output = sae.train_forward(x_BD)
            pairs = zip(output.error, output.recon, strict=True)
            loss_B = torch.stack([squared_error(output, *pair, "raw") for pair in pairs]).mean(0)
            for q in sorted(set(quartile_B.tolist())):
                part = loss_B[(quartile_B == q).to(loss_B.device)].sum() / self.batch_tokens
                (gradient_FD,) = torch.autograd.grad(part, sae.score.rows_FD, retain_graph=True)
                norm_F = gradient_FD.double().norm(dim=-1).cpu()
                self.norm_4[q] += norm_F.norm()
                self.row_norm_4F[q] += norm_F
            (slope_E,) = torch.autograd.grad(loss_B.sum(), output.selection.score_E)
        self.token_norm_4.index_add_(0, quartile_B, _token_gradients(output, slope_E.double()).cpu())
        self.loss_4.index_add_(0, quartile_B, loss_B.detach().double().cpu())
        fired_E = output.selection.fired().entries.token_E.cpu()
        self.entries_4 += torch.bincount(quartile_B[fired_E], minlength=4)

    def numbers(self, count_4: Tensor) -> dict[str, Any]:
        low_F, high_F = self.row_norm_4F[0], self.row_norm_4F[3]
        active_F = torch.maximum(low_F, high_F) > ACTIVE_GRADIENT
        ratio_F = high_F[active_F] / low_F[active_F]  # infinite where only long tokens teach a feature
        middle = float(ratio_F.median()) if len(ratio_F) else float("inf")
        return {
            "share": _shares(self.norm_4),
            "token_share": _shares(self.token_norm_4),
            "loss_share": _shares(self.loss_4),
            "l0": [float(n) if count > 0 else None for n, count in zip(self.entries_4 / count_4, count_4, strict=True)],
            "features": int(active_F.sum()),
            "feature_ratio": middle if middle != float("inf") else None,
            "features_above_2": float((ratio_F > 2).double().mean()) if len(ratio_F) else None,
        }


@torch.no_grad()
def _token_gradients(output: TrainOutput, slope_E: Tensor) -> Tensor:
    """(B,) float64 |g_t|: g_t has one row ∂ℓ/∂s_i · ∂s_i/∂e_i for each of the token's entries.

    |∂s/∂e| is r for the inner product, and (exp(b) r^a / |e|) √(1 − κ²) where rows enter by direction (paper §1).
    """
    terms, entries = output.terms, output.selection.entries
    exponent_F = terms.exponent.double().expand(terms.n_features)
    gain_F = terms.log_gain.double().expand(terms.n_features)
    square_B = torch.zeros(terms.n_tokens, dtype=torch.float64, device=slope_E.device)
    for chunk in row_slices(len(entries), max(1, CHUNK_NUMBERS // terms.z_BD.shape[1])):
        token_e, feature_e = entries.token_E[chunk], entries.feature_E[chunk]
        z_eD = terms.z_BD[token_e].double()
        reach_e = z_eD.norm(dim=-1)
        if not terms.plain:
            rows_eD = terms.rows_FD[feature_e].double()
            length_e = rows_eD.norm(dim=-1)
            cosine_e = (z_eD * rows_eD).sum(-1) / (reach_e * length_e).clamp_min(1e-300)
            scale_e = gain_F[feature_e].exp() * reach_e.pow(exponent_F[feature_e])
            reach_e = scale_e / length_e * (1 - cosine_e.square()).clamp_min(0).sqrt()
        square_B.index_add_(0, token_e, (slope_E[chunk] * reach_e).square())
    return square_B.sqrt()


def _shares(value_4: Tensor) -> list[float] | None:
    total = float(value_4.sum())
    return (value_4 / total).tolist() if total > 0 else None
