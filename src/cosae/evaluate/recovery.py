"""How much of a known dictionary a learned one recovered, and how well its latents detect the true features.

Enters: a decoder, its codes at the inference rule, the true features and the true codes of the same tokens.
Leaves: plain numbers.

Latents and true features are paired one to one by the assignment that maximises Σ |cos(decoder, feature)|
(Hungarian). Definitions follow sae_lens.synthetic where it has one (MCC, uniqueness, per-latent detection
against the best decoder match, here under *_argmax); the paired variants beside them let no two latents share
a target and count true features that nothing found.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cosae.errors import CosaeError
from cosae.types import Codes, Metrics

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def recovery(decoder_FD: Tensor, codes: Codes, feature_GD: Tensor, truth: Codes) -> Metrics:
    """Recovery of G true features by F latents, on the B tokens of `codes` and `truth`.

    decoder_FD (F, D), feature_GD (G, D)   any row lengths; a zero row matches nothing
    codes, truth                           over the same tokens, with F and G features

    mcc             mean |cos| over the min(F, G) pairs
    mcc_over_true   the same sum over all G true features: features without a latent count 0
    uniqueness      distinct best-matching true features (argmax |cos|) over F
    precision, recall, f1
                    of "the latent is active" for "its paired feature is", mean over the true features
                    that occur among these tokens; an unpaired feature or a silent latent counts 0
    auroc           of the latent's value as a score for its paired feature, mean over the same features; ties
                    count one half, so an unpaired feature or a silent latent has 0.5
    precision_argmax, recall_argmax, f1_argmax
                    mean over all F latents, each against its best match
    l0, true_l0     mean active entries per token
    dead_frac       share of latents that never fire here
    n_tokens        tokens
    n_true_seen     true features that occur

    Raises CosaeError if the shapes do not belong together. The assignment costs up to O(F G min(F, G)):
    seconds for a few thousand, minutes for tens of thousands.
    """
    _check(decoder_FD, codes, feature_GD, truth)
    cos_FG = _unit(decoder_FD) @ _unit(feature_GD).T
    size_FG = cos_FG.abs()
    latent_P, feature_P = linear_sum_assignment(size_FG.numpy(), maximize=True)
    matched = float(size_FG[latent_P, feature_P].sum())
    best_F = size_FG.argmax(1).numpy()
    n_latents, n_features = cos_FG.shape

    counts = _Firings(codes, truth)
    paired = _detection(*counts.of_pairs(latent_P, feature_P))
    argmax = _detection(*counts.of_pairs(np.arange(n_latents), best_F))
    seen_G = counts.truth_G > 0
    n_seen = int(seen_G.sum())
    # never 0: an arm that blew up has cosines of 0 and codes beyond fp32
    sign_P = np.where(cos_FG.numpy()[latent_P, feature_P] < 0, -1.0, 1.0)
    auroc_P = _aurocs(codes, truth, latent_P, feature_P, sign_P)
    seen_P = seen_G[feature_P]

    def mean_over_seen(value_P: Floats, unpaired: float) -> float:
        missing = n_seen - int(seen_P.sum())
        return float((value_P[seen_P].sum() + unpaired * missing) / n_seen) if n_seen else 0.0

    precision, recall, f1 = (mean_over_seen(value_P, 0.0) for value_P in paired)
    return {
        "mcc": matched / min(n_latents, n_features),
        "mcc_over_true": matched / n_features,
        "uniqueness": len(np.unique(best_F)) / n_latents,
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "auroc": mean_over_seen(auroc_P, 0.5),
        **{f"{name}_argmax": float(v.mean()) for name, v in zip(("precision", "recall", "f1"), argmax, strict=True)},
        "l0": codes.l0,
        "true_l0": truth.l0,
        "dead_frac": float((counts.latent_F == 0).mean()),
        "n_tokens": codes.n_tokens,
        "n_true_seen": n_seen,
    }


def _check(decoder_FD: Tensor, codes: Codes, feature_GD: Tensor, truth: Codes) -> None:
    for what, rows, made, other in (
        ("decoder", decoder_FD, codes, "codes"),
        ("feature", feature_GD, truth, "truth"),
    ):
        if rows.ndim != 2 or rows.shape[0] != made.d_sae:
            raise CosaeError(
                f"{what} rows must be as many as {other} has features ({made.d_sae}). Got {tuple(rows.shape)} instead."
            )
    if decoder_FD.shape[1] != feature_GD.shape[1]:
        raise CosaeError(
            f"decoder and features must have the same width. Got {decoder_FD.shape[1]} and "
            f"{feature_GD.shape[1]} instead."
        )
    if codes.n_tokens != truth.n_tokens:
        raise CosaeError(
            f"codes and truth must cover the same tokens. Got {codes.n_tokens} and {truth.n_tokens} instead."
        )


def _unit(rows: Tensor) -> Tensor:
    """Unit rows in float64 on the CPU; zero rows stay zero."""
    rows = rows.detach().double().cpu()
    unit: Tensor = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return unit


class _Firings:
    """Which latent and which true feature fire together: counts, from active entries alone."""

    def __init__(self, codes: Codes, truth: Codes) -> None:
        self.latent_F: Ints = _counts(codes)
        self.truth_G: Ints = _counts(truth)
        self._token_E, self._latent_E = codes.token_E.cpu(), codes.feature_E.cpu()
        self._n_true = truth.d_sae
        # ascending because codes are grouped by token with features ascending
        self._truth_E = truth.token_E.cpu() * truth.d_sae + truth.feature_E.cpu()

    def of_pairs(self, latent_P: Ints, feature_P: Ints) -> tuple[Floats, Floats, Floats]:
        """(true positives, latent firings, true firings) of each pair; a latent is in at most one pair."""
        target_F = torch.full((len(self.latent_F),), -1, dtype=torch.int64)
        target_F[torch.from_numpy(latent_P)] = torch.from_numpy(feature_P)
        target_E = target_F[self._latent_E]
        hit_E = _contains(self._truth_E, self._token_E * self._n_true + target_E) & (target_E >= 0)
        hit_F = torch.bincount(self._latent_E[hit_E], minlength=len(self.latent_F)).numpy()
        return (
            hit_F[latent_P].astype(np.float64),
            self.latent_F[latent_P].astype(np.float64),
            self.truth_G[feature_P].astype(np.float64),
        )


def _counts(codes: Codes) -> Ints:
    counts: Ints = torch.bincount(codes.feature_E.cpu(), minlength=codes.d_sae).numpy()
    return counts


def _contains(sorted_E: Tensor, wanted_E: Tensor) -> Tensor:
    """(E,) bool: whether each wanted value is among the sorted ones."""
    if len(sorted_E) == 0:
        return torch.zeros_like(wanted_E, dtype=torch.bool)
    place_E = torch.searchsorted(sorted_E, wanted_E).clamp_max(len(sorted_E) - 1)
    return sorted_E[place_E] == wanted_E


def _detection(hit_P: Floats, fired_P: Floats, true_P: Floats) -> tuple[Floats, Floats, Floats]:
    """Precision, recall and F1 of each pair; 0 where undefined."""
    precision_P = hit_P / np.maximum(fired_P, 1)
    recall_P = hit_P / np.maximum(true_P, 1)
    f1_P = 2 * hit_P / np.maximum(fired_P + true_P, 1)
    return precision_P, recall_P, f1_P


def _aurocs(codes: Codes, truth: Codes, latent_P: Ints, feature_P: Ints, sign_P: Floats) -> Floats:
    """(P,) area under the ROC curve of each pair; 0.5 where a class is empty.

    sign_P turns latents whose decoder points against the feature: their negative codes speak for it.
    """
    token_E, value_E, start_F = _by_feature(codes)
    true_E, _, start_G = _by_feature(truth)
    auroc_P = np.full(len(latent_P), 0.5)
    for p, (latent, feature, sign) in enumerate(zip(latent_P, feature_P, sign_P, strict=True)):
        mine = slice(start_F[latent], start_F[latent + 1])
        positive = true_E[start_G[feature] : start_G[feature + 1]]
        if len(token_E[mine]) and 0 < len(positive) < codes.n_tokens:
            is_true = np.isin(token_E[mine], positive, assume_unique=True)
            auroc_P[p] = _auroc(sign * value_E[mine], is_true, len(positive), codes.n_tokens)
    return auroc_P


def _by_feature(codes: Codes) -> tuple[Ints, Floats, Ints]:
    """Tokens and values of the entries, grouped by feature, and where each feature's group starts (F + 1)."""
    order = torch.argsort(codes.feature_E, stable=True)
    start = np.concatenate([[0], np.cumsum(_counts(codes))])
    values = codes.value_E.detach()[order].double().cpu().numpy()
    return codes.token_E[order].cpu().numpy(), values, start


def _auroc(score_E: Floats, is_true_E: NDArray[np.bool_], n_true: int, n_tokens: int) -> float:
    """P(score of a true token > score of another) + ½ P(equal), with score 0 on the tokens that have no
    entry."""
    true, other = score_E[is_true_E], np.sort(score_E[~is_true_E])
    n_other, silent_true = n_tokens - n_true, n_true - len(true)
    silent_other = n_other - len(other)

    def wins(score: Floats) -> Floats:
        below, up_to = np.searchsorted(other, score, "left"), np.searchsorted(other, score, "right")
        silent = silent_other * (np.sign(score) + 1) / 2
        return (below + up_to) / 2 + silent

    return float((wins(true).sum() + silent_true * wins(np.zeros(1))[0]) / (n_true * n_other))
