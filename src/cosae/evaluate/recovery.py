"""How much of a known dictionary a learned one recovered, and how well its latents detect the true features.

In: a decoder, its codes at the inference rule, the true features and the true codes of the same tokens. Out: numbers.

Latents and true features are paired one to one by the assignment that maximises Σ |cos(decoder, feature)|
(Hungarian). Definitions follow sae_lens.synthetic where it has one (MCC, uniqueness, per-latent detection
against the best decoder match, here under *_argmax); the paired variants beside them let no two latents share
a target and count true features that nothing found.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cosae.errors import CosaeError
from cosae.evaluate.geometry import unit_rows
from cosae.evaluate.probing.ranking import rank_codes
from cosae.evaluate.statistics import Array
from cosae.types import Codes, Metrics

Index = NDArray[np.int64]


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
    cos_FG = unit_rows(decoder_FD.detach().double().cpu()) @ unit_rows(feature_GD.detach().double().cpu()).T
    size_FG = cos_FG.abs()
    latent_P, feature_P = linear_sum_assignment(size_FG.numpy(), maximize=True)
    matched = float(size_FG[latent_P, feature_P].sum())
    best_F = size_FG.argmax(1).numpy()
    n_latents, n_features = cos_FG.shape

    value_NF, true_NG = codes.to_scipy().tocsc(), truth.to_scipy().tocsc()
    fired_NF, seen_G = _ones(value_NF), np.diff(true_NG.indptr) > 0
    paired = _detection(fired_NF[:, latent_P], _ones(true_NG)[:, feature_P])
    argmax = _detection(fired_NF, _ones(true_NG)[:, best_F])
    # never 0: an arm that blew up has cosines of 0 and codes beyond fp32
    sign_P = np.where(cos_FG.numpy()[latent_P, feature_P] < 0, -1.0, 1.0)
    auroc_P = _aurocs(value_NF, true_NG, latent_P, feature_P, sign_P)
    n_seen, seen_P = int(seen_G.sum()), seen_G[feature_P]

    def mean_over_seen(value_P: Array, unpaired: float) -> float:
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
        "dead_frac": float((np.diff(value_NF.indptr) == 0).mean()),
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


def _ones(matrix: sparse.csc_matrix) -> sparse.csc_matrix:
    """1 for every entry."""
    return sparse.csc_matrix((np.ones(len(matrix.data)), matrix.indices, matrix.indptr), shape=matrix.shape)


def _detection(fired_NP: sparse.csc_matrix, true_NP: sparse.csc_matrix) -> tuple[Array, Array, Array]:
    """Precision, recall and F1 of each pair; 0 where undefined."""
    hit_P, fired_P, true_P = (
        np.asarray(count_NP.sum(0)).ravel() for count_NP in (fired_NP.multiply(true_NP), fired_NP, true_NP)
    )
    return hit_P / np.maximum(fired_P, 1), hit_P / np.maximum(true_P, 1), 2 * hit_P / np.maximum(fired_P + true_P, 1)


def _aurocs(
    value_NF: sparse.csc_matrix, true_NG: sparse.csc_matrix, latent_P: Index, feature_P: Index, sign_P: Array
) -> Array:
    """(P,) area under the ROC curve of each pair; 0.5 where a class is empty.

    sign_P turns latents whose decoder points against the feature: their negative codes speak for it.
    """
    value_NF.eliminate_zeros()
    n_tokens = value_NF.shape[0]
    auroc_P = np.full(len(latent_P), 0.5)
    for p, (latent, feature, sign) in enumerate(zip(latent_P, feature_P, sign_P, strict=True)):
        own = slice(value_NF.indptr[latent], value_NF.indptr[latent + 1])
        positive = true_NG.indices[true_NG.indptr[feature] : true_NG.indptr[feature + 1]]
        if own.start < own.stop and 0 < len(positive) < n_tokens:
            is_true_E = np.isin(value_NF.indices[own], positive, assume_unique=True)
            auroc_P[p] = rank_codes(sign * value_NF.data[own], is_true_E, len(positive), n_tokens)[0]
    return auroc_P
