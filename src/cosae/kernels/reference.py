"""The definition of every kernel, in plain dense PyTorch. Slow, obvious, differentiable by autograd.

Rule for ties, everywhere: of equal scores the smaller flat index (token · F + feature) is kept first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosae.kernels.peers import ALONE, Peers
from cosae.kernels.select import shared
from cosae.kernels.terms import Entries, ScoreTerms

NAME = "reference"


def content(terms: ScoreTerms, dot_BF: Tensor | None = None) -> Tensor:
    """(B, F) content part exp(b) r^a |w|^u κ of every score; differentiable (paper §1).

    dot_BF: the plain products ⟨z, w⟩ where they are there already.
    """
    dot_BF = terms.z_BD @ terms.rows_FD.T if dot_BF is None else dot_BF
    if terms.plain:
        return dot_BF
    log_scale_BF = terms.log_gain + (terms.exponent - 1.0) * terms.log_r_B[:, None]
    content_BF = dot_BF * log_scale_BF.exp()
    if terms.row_power == 0:
        content_BF = content_BF / terms.row_norm_F
    return content_BF


def scores(terms: ScoreTerms, dot_BF: Tensor | None = None) -> Tensor:
    """(B, F) scores s = content + β; rows that are not live are −inf and can never be selected."""
    score_BF = content(terms, dot_BF)
    if terms.bias_F is not None:
        score_BF = score_BF + terms.bias_F
    return torch.where(terms.live_B[:, None], score_BF, -torch.inf)


def _entries(mask_BF: Tensor) -> Entries:
    token_E, feature_E = mask_BF.nonzero(as_tuple=True)
    return Entries(token_E, feature_E)


def _largest(flat: Tensor, count: int) -> Tensor:
    """Indices along the last dimension of the `count` largest, ties to the smaller index."""
    return flat.sort(dim=-1, descending=True, stable=True).indices[..., :count]


@torch.no_grad()
def select_batch_topk(
    terms: ScoreTerms, n_keep: int, hint: float | None = None, peers: Peers = ALONE
) -> tuple[Entries, float]:
    """The n_keep largest scores of the whole batch among those > 0 (paper §2), and the smallest kept score.

    The second value is a hint for the next batch's search and nothing else; 0.0 where nothing was kept. With peers:
    this process' part of what all of them keep.
    """
    score_BF = scores(terms).relu()
    flat = score_BF.reshape(-1)
    if not peers.alone:
        at = flat.nonzero()[:, 0]
        lowest, last = shared.cut(flat[at], at, n_keep, terms.n_features, peers)
        place = torch.arange(flat.numel(), device=flat.device)
        kept = (flat > lowest) | ((flat == lowest) & (place <= last) & (flat > 0))
        return _entries(kept.reshape(score_BF.shape)), lowest
    keep = _largest(flat, min(n_keep, flat.numel()))
    keep = keep[flat[keep] > 0]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[keep] = True
    return _entries(mask.reshape(score_BF.shape)), float(flat[keep].min()) if len(keep) else 0.0


@torch.no_grad()
def select_topk(terms: ScoreTerms, k: int, absolute: bool = False) -> Entries:
    """Per token the k largest scores among those > 0; with `absolute`, the k largest |s| among those ≠ 0."""
    score_BF = scores(terms)
    rank_BF = torch.where(terms.live_B[:, None], score_BF.abs(), 0.0) if absolute else score_BF.relu()
    keep_BK = _largest(rank_BF, min(k, rank_BF.shape[1]))
    mask = torch.zeros_like(rank_BF, dtype=torch.bool).scatter_(1, keep_BK, True)
    return _entries(mask & (rank_BF > 0))


@torch.no_grad()
def select_above(terms: ScoreTerms, threshold: Tensor) -> Entries:
    """Every entry with s > threshold; threshold () or (F,)."""
    return _entries(scores(terms) > threshold)


def entry_content(terms: ScoreTerms, entries: Entries) -> Tensor:
    """(E,) content of the chosen entries, differentiable in z, rows, exponent and log_gain."""
    return content(terms)[entries.token_E, entries.feature_E]


def values(terms: ScoreTerms, score_BF: Tensor) -> Tensor:
    """(B, F) what scores are worth where they are chosen: r^δ · s; differentiable in z, the value exponent δ and s."""
    if terms.value_exponent is None:
        return score_BF
    return score_BF * (terms.value_exponent * terms.log_r_B[:, None]).exp()


def entry_values(terms: ScoreTerms, entries: Entries, score_E: Tensor) -> Tensor:
    """(E,) the same of the chosen entries."""
    if terms.value_exponent is None:
        return score_E
    ones_BF = score_E.new_ones(terms.n_tokens, terms.n_features)
    return score_E * values(terms, ones_BF)[entries.token_E, entries.feature_E]


def at_feature(parameter_F: Tensor, entries: Entries) -> Tensor:
    """(E,) parameter_F[feature] of each entry, differentiable."""
    return parameter_F[entries.feature_E]


def decode(value_E: Tensor, entries: Entries, decoder_FD: Tensor, n_tokens: int) -> Tensor:
    """(B, D) Σ_i f_i d_i per token, differentiable in values and decoder rows."""
    dense = value_E.new_zeros(n_tokens, decoder_FD.shape[0])
    dense = dense.index_put((entries.token_E, entries.feature_E), value_E)
    return dense @ decoder_FD


def squared_errors(z_BD: Tensor, recon_BD: Tensor, centre_only: bool = False) -> Tensor:
    """(B,) |z − ẑ|², differentiable in both; `centre_only` as in ScoreTerms."""
    return (z_BD - recon_BD).square().sum(-1)
