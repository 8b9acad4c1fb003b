"""Which features do two SAEs share, and does a probing gap come from new features or from sharper ones?

In: codes of two SAEs on the same tokens (those a filter keeps: on sinks thousands of features co-fire and every
correlation is theirs, paper §9 A3) and their decoder rows. Out: one-to-one pairs and plain numbers.

    ρ_ij   Pearson correlation of codes over tokens, exact from sparse products in float64
    cos_ij ⟨d_i, d'_j⟩ / |d_i||d'_j|
    pairs  Hungarian: Σ ρ over pairs is largest; or mutual: i and j are each other's best by ρ
    shared a pair with ρ ≥ 0.7 and cos > 0.7 (the paper's thresholds, §6)
    paper  for each feature of A its best of B, many to one: the share of A's features with such a best. Not symmetric

A share means nothing alone: two seeds of one score share only part of their features: `against_yardstick`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cosae.evaluate.geometry import unit_rows
from cosae.evaluate.intervals import RESAMPLES, mean_interval, percentile_interval, resample_counts
from cosae.types import Codes, CosaeError

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Method = Literal["hungarian", "mutual"]

MIN_CORRELATION = 0.7
MIN_COSINE = 0.7
MIN_FIRINGS = 10
HUNGARIAN_MAX = 8192
"""Alive features above which the assignment is refused: it costs F³ time and a dense F × F matrix."""
CHUNK = 2048


@dataclass(frozen=True)
class Pairs:
    """One-to-one pairs of features. All (P,), P at most the smaller number of alive features.

    a, b           feature ids in the first and second SAE, a ascending
    correlation    ρ of their codes
    cosine         of their decoder rows
    """

    a: Indices
    b: Indices
    correlation: Array
    cosine: Array

    def shared(self, min_correlation: float = MIN_CORRELATION, min_cosine: float = MIN_COSINE) -> Pairs:
        """The pairs that count as one feature: ρ ≥ min_correlation and cos > min_cosine."""
        keep = (self.correlation >= min_correlation) & (self.cosine > min_cosine)
        return Pairs(self.a[keep], self.b[keep], self.correlation[keep], self.cosine[keep])

    def __len__(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class Matching:
    """Everything `match` found. alive_a, alive_b: ids of features that fire on at least `min_firings` tokens."""

    method: Method
    pairs: Pairs
    alive_a: Indices
    alive_b: Indices
    paper_a: Indices
    """Features of A that the paper's one-directional rule calls matched."""
    paper_b: Indices
    """Features of B by the same rule in the other direction."""

    def numbers(self) -> dict[str, Any]:
        """Plain numbers: shares of alive features, with the means over shared pairs."""
        shared = self.pairs.shared()
        smaller = max(min(len(self.alive_a), len(self.alive_b)), 1)
        return {
            "method": self.method,
            "alive_a": len(self.alive_a),
            "alive_b": len(self.alive_b),
            "pairs": len(self.pairs),
            "shared": len(shared),
            "shared_frac": len(shared) / smaller,
            "mean_correlation": float(self.pairs.correlation.mean()) if len(self.pairs) else None,
            "mean_cosine": float(self.pairs.cosine.mean()) if len(self.pairs) else None,
            "paper_frac_a": len(self.paper_a) / max(len(self.alive_a), 1),
            "paper_frac_b": len(self.paper_b) / max(len(self.alive_b), 1),
            "min_correlation": MIN_CORRELATION,
            "min_cosine": MIN_COSINE,
        }


def match(
    codes_a: Codes,
    codes_b: Codes,
    decoder_a_FD: Tensor,
    decoder_b_FD: Tensor,
    *,
    method: Method = "hungarian",
    min_firings: int = MIN_FIRINGS,
) -> Matching:
    """Pair the features of two SAEs one to one by the correlation of their codes on the same tokens.

    codes_a, codes_b          of the same N tokens, those a filter keeps
    decoder_a_FD, decoder_b_FD  (F, D) rows of any length, in one space
    method   "hungarian" up to 8192 alive features; "mutual" for any number, chunk by chunk
    Features that fire on fewer than `min_firings` tokens are left out. Raises CosaeError for different tokens or
    widths, an unknown method, or too many features for the assignment.
    """
    if codes_a.n_tokens != codes_b.n_tokens:
        raise CosaeError(
            f"features are matched on the same tokens. Got codes of {codes_a.n_tokens} and {codes_b.n_tokens} tokens."
        )
    if decoder_a_FD.shape[1] != decoder_b_FD.shape[1] or (len(decoder_a_FD), len(decoder_b_FD)) != (
        codes_a.d_sae,
        codes_b.d_sae,
    ):
        raise CosaeError(
            "decoder rows must have one row per feature and one width in both SAEs. Got shapes "
            f"{tuple(decoder_a_FD.shape)} and {tuple(decoder_b_FD.shape)}, for {codes_a.d_sae} and {codes_b.d_sae}."
        )
    if method not in ("hungarian", "mutual"):
        raise CosaeError(f"method must be hungarian or mutual. Got {method!r} instead.")
    a, b = _Columns.of(codes_a, decoder_a_FD, min_firings), _Columns.of(codes_b, decoder_b_FD, min_firings)
    if method == "hungarian" and max(len(a.ids), len(b.ids)) > HUNGARIAN_MAX:
        raise CosaeError(
            f"an assignment of {len(a.ids)} × {len(b.ids)} features would take hours: use method='mutual', "
            f"or raise min_firings (at most {HUNGARIAN_MAX})."
        )
    best_a, best_b = _best(a, b), _best(b, a)
    if method == "mutual":
        back_A = best_b.index[best_a.index] if len(b.ids) else np.full(len(a.ids), -1)
        row_P = np.flatnonzero(back_A == np.arange(len(a.ids)))
        column_P = best_a.index[row_P]
    else:
        row_P, column_P = linear_sum_assignment(_correlations(a, b, np.arange(len(a.ids))), maximize=True)
    pairs = Pairs(a.ids[row_P], b.ids[column_P], *_of_pairs(a, b, row_P, column_P))
    return Matching(method, pairs, a.ids, b.ids, a.ids[best_a.passes], b.ids[best_b.passes])


@dataclass(frozen=True)
class _Columns:
    """Alive features: ids, codes as sparse columns (N, A), their means and standard deviations, unit decoder rows."""

    ids: Indices
    value_NA: sparse.csc_matrix
    mean_A: Array
    deviation_A: Array
    unit_AD: Array

    @classmethod
    def of(cls, codes: Codes, decoder_FD: Tensor, min_firings: int) -> _Columns:
        value_E = codes.value_E.detach().cpu().double().numpy()
        matrix = sparse.csr_matrix(
            (value_E, codes.feature_E.cpu().numpy(), codes.offset_B1.cpu().numpy()), shape=(codes.n_tokens, codes.d_sae)
        ).tocsc()
        matrix.eliminate_zeros()
        mean_F = np.asarray(matrix.mean(axis=0)).ravel()
        square_F = np.asarray(matrix.multiply(matrix).mean(axis=0)).ravel()
        deviation_F = np.sqrt(np.maximum(square_F - mean_F**2, 0.0))
        alive = np.flatnonzero((np.diff(matrix.indptr) >= min_firings) & (deviation_F > 0))
        unit_FD = unit_rows(decoder_FD.detach().cpu().double()).numpy()
        return cls(alive, matrix[:, alive], mean_F[alive], deviation_F[alive], unit_FD[alive])


@dataclass(frozen=True)
class _Best:
    """For each feature of one SAE its best of the other by ρ; passes: where that best is also shared."""

    index: Indices
    passes: NDArray[np.bool_]


def _correlations(a: _Columns, b: _Columns, rows: Indices) -> Array:
    """(len(rows), B) Pearson correlations of those features of A with all of B."""
    n = a.value_NA.shape[0]
    product = (a.value_NA[:, rows].T @ b.value_NA).toarray() / n
    covariance = product - np.outer(a.mean_A[rows], b.mean_A)
    correlation: Array = covariance / np.outer(a.deviation_A[rows], b.deviation_A)
    return correlation


def _best(a: _Columns, b: _Columns) -> _Best:
    index = np.zeros(len(a.ids), dtype=np.int64)
    passes = np.zeros(len(a.ids), dtype=bool)
    if len(b.ids):
        for start in range(0, len(a.ids), CHUNK):
            rows = np.arange(start, min(start + CHUNK, len(a.ids)))
            correlation = _correlations(a, b, rows)
            index[rows] = correlation.argmax(axis=1)
            cosine = (a.unit_AD[rows] * b.unit_AD[index[rows]]).sum(axis=1)
            passes[rows] = (correlation.max(axis=1) >= MIN_CORRELATION) & (cosine > MIN_COSINE)
    return _Best(index, passes)


def _of_pairs(a: _Columns, b: _Columns, row_P: Indices, column_P: Indices) -> tuple[Array, Array]:
    """ρ and decoder cosine of the named pairs."""
    n = a.value_NA.shape[0]
    product_P = np.asarray(a.value_NA[:, row_P].multiply(b.value_NA[:, column_P]).sum(axis=0)).ravel() / n
    covariance_P = product_P - a.mean_A[row_P] * b.mean_A[column_P]
    correlation_P = covariance_P / (a.deviation_A[row_P] * b.deviation_A[column_P])
    return correlation_P, (a.unit_AD[row_P] * b.unit_AD[column_P]).sum(axis=1)


def against_yardstick(
    found: Matching, yardsticks: Sequence[Matching], seed: int = 0, n_resamples: int = RESAMPLES
) -> dict[str, Any]:
    """The shared fraction beside that of same-score pairs of other seeds: what two runs of one thing already differ by.

    yardsticks: matchings of SAEs of one score and different seeds, their A's features as many as one likes.
    Returns shared_frac, yardstick_frac (mean over the yardsticks), their ratio, and its 95 % bootstrap interval over
    features. A ratio of 1: the two scores differ no more than two seeds. Raises CosaeError without yardsticks.
    """
    if not yardsticks:
        raise CosaeError("a matching is read against at least one same-score pair of other seeds; got none.")
    hits = _hits(found)
    floors = [_hits(one) for one in yardsticks]
    floor = float(np.mean([one.mean() for one in floors]))
    resampled = _resampled_means(hits, seed, n_resamples)
    below = np.mean([_resampled_means(one, seed + 1 + i, n_resamples) for i, one in enumerate(floors)], axis=0)
    ratios = resampled / np.maximum(below, 1e-12)
    low, high = percentile_interval(ratios)
    known = floor > 0
    return {
        "shared_frac": float(hits.mean()),
        "yardstick_frac": floor,
        "ratio": float(hits.mean()) / floor if known else None,
        "low": low if known else None,
        "high": high if known else None,
    }


def _hits(found: Matching) -> Array:
    """1 for each alive feature of the smaller side that is in a shared pair, else 0."""
    smaller = min(len(found.alive_a), len(found.alive_b))
    hits = np.zeros(max(smaller, 1))
    hits[: len(found.pairs.shared())] = 1.0
    return hits


def _resampled_means(value_U: Array, seed: int, n_resamples: int) -> Array:
    """(R,) means of resamples of 0/1 values: a binomial draw each, as drawing units one by one would be."""
    drawn: Array = np.random.default_rng(seed).binomial(len(value_U), value_U.mean(), n_resamples) / len(value_U)
    return drawn


def discovery_separability(
    train_a_FC: Array,
    held_a_FC: Array,
    train_b_FC: Array,
    held_b_FC: Array,
    matched: Pairs,
    seed: int = 0,
    n_resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Is a probing gap of B over A one of discovery (features A has not) or separability (the same features, sharper)?

    train_*_FC, held_*_FC  (F, C) a quality (AUROC) of every feature for every concept, on the tokens the feature is
                           chosen on and on those it is scored on
    matched                shared pairs: the features allowed in the second comparison (paper §6, decomposition)

    gap_full: mean over concepts of B's chosen feature minus A's, all features; gap_matched: among matched ones only.
    separability_frac = gap_matched / gap_full and discovery_frac = 1 − that, None where gap_full's interval holds 0: a
    share of nothing is no number (the paper's 87 % has no interval). Intervals: bootstrap over concepts, paired.
    """
    if not len(matched):
        raise CosaeError("discovery and separability need at least one matched pair of features; got none.")
    full_C = _chosen(train_b_FC, held_b_FC) - _chosen(train_a_FC, held_a_FC)
    matched_C = _chosen(train_b_FC, held_b_FC, matched.b) - _chosen(train_a_FC, held_a_FC, matched.a)
    full, inside = mean_interval(full_C, seed, n_resamples), mean_interval(matched_C, seed, n_resamples)
    counts = resample_counts(len(full_C), seed, n_resamples)
    certain = full["low"] > 0 or full["high"] < 0
    low, high = (
        percentile_interval((counts @ matched_C) / np.where(counts @ full_C == 0, np.nan, counts @ full_C))
        if certain
        else (None, None)
    )
    share = inside["mean"] / full["mean"] if certain else None
    return {
        "concepts": len(full_C),
        "matched": len(matched),
        "gap_full": full,
        "gap_matched": inside,
        "separability_frac": share,
        "separability_low": low,
        "separability_high": high,
        "discovery_frac": None if share is None else 1 - share,
    }


def _chosen(train_FC: Array, held_FC: Array, allowed: Indices | None = None) -> Array:
    """(C,) held-out quality of the feature that is best in training, among those allowed."""
    ids = np.arange(len(train_FC)) if allowed is None else allowed
    best_C = ids[train_FC[ids].argmax(axis=0)]
    picked: Array = held_FC[best_C, np.arange(held_FC.shape[1])]
    return picked
