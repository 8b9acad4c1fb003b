"""How well a score ranks a concept's tokens above the others: AUROC and average precision, exact with ties.

In: sparse codes or dense scores, and boolean labels. Out: plain float64 numbers. Codes are never made
dense: a latent that did not fire scores 0, so all its silent tokens tie at one place in the ranking, between
its negative and its positive codes.

    AUROC = P(score₊ > score₋) + ½ P(score₊ = score₋) = (Σ rank₊ − n₊(n₊ + 1)/2) / (n₊ n₋),  midranks for ties

The rank of a code in its latent's column does not depend on the concept. So one sort and one sparse product
give all F latents × C concepts: Σ rank₊ = Σ over codes (rank − silent rank) · label + n₊ · silent rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cosae.errors import CosaeError
from cosae.evaluate.statistics import Array
from cosae.types import Codes

Labels = NDArray[np.bool_]
Rule = Literal["auroc", "mean_difference", "standardised_difference"]
RULES: tuple[Rule, ...] = ("auroc", "mean_difference")
"""The rules that a report's figures show."""
EVERY_RULE: tuple[Rule, ...] = (*RULES, "standardised_difference")
"""The rules of every run's evaluation."""

DIMENSIONS = 16
"""Dimensions of dense vectors that are ranked before the labels are read once for all of them."""


@dataclass(frozen=True)
class Selection:
    """The latent chosen for each concept.

    latent_C (C,) int64     its id; the smallest of equals
    sign_C   (C,) float64   +1, or −1 where the code's absence or negative values speak for the concept
    value_C  (C,) float64   what the rule looked at, on the tokens it chose on: the AUROC, or mean₊ − mean₋
    """

    latent_C: NDArray[np.int64]
    sign_C: Array
    value_C: Array


def select(codes: Codes, label_NC: Labels, rule: Rule) -> Selection:
    """The best single latent of each concept on these tokens.

    codes     N tokens, F latents
    label_NC  (N, C) bool; each concept needs a token with it and one without

    "auroc" takes the highest AUROC: the latent must fire FOR the concept, its sign is always +1.
    "mean_difference" takes the largest |mean₊ − mean₋| of the raw codes (SAEBench's rule, paper §6) and keeps
    the sign of that difference, by which later scores are to be multiplied. "standardised_difference" divides the
    difference by the latent's standard deviation over all tokens first: the size of a latent's codes, and what a few
    long tokens add to it, decides nothing then (paper §9 A5).

    Raises CosaeError for labels of another length, or a concept without both kinds of token.
    """
    return select_by(qualities_of_latents(codes, label_NC, (rule,))[rule], rule)


def select_by(value_FC: Array, rule: Rule) -> Selection:
    """`select` where what the rule looks at is known: (F, C) as `qualities_of_latents` gives it."""
    latent_C = (value_FC if rule == "auroc" else np.abs(value_FC)).argmax(axis=0)
    value_C = np.take_along_axis(value_FC, latent_C[None], axis=0)[0]
    sign_C = np.ones(len(latent_C)) if rule == "auroc" else np.where(value_C < 0, -1.0, 1.0)
    return Selection(latent_C, sign_C, value_C)


def qualities_of_latents(codes: Codes, label_NC: Labels, rules: Sequence[Rule]) -> dict[Rule, Array]:
    """By rule (F, C) float64 of what it looks at: the AUROC, or mean₊ − mean₋, raw or over the standard deviation."""
    if wrong := [rule for rule in rules if rule not in EVERY_RULE]:
        raise CosaeError(f"rule must be one of {', '.join(EVERY_RULE)}. Got {wrong[0]!r} instead.")
    found: dict[Rule, Array] = {}
    if "auroc" in rules:
        found["auroc"] = auroc_of_latents(codes, label_NC)
    if "mean_difference" in rules or "standardised_difference" in rules:
        found["mean_difference"] = mean_difference_of_latents(codes, label_NC)
    if "standardised_difference" in rules:
        deviation_F = deviations(_matrix(codes))
        deviation_F[deviation_F == 0] = np.inf  # a latent that never varies
        found["standardised_difference"] = found["mean_difference"] / deviation_F[:, None]
    return found


def auroc_of_latents(codes: Codes, label_NC: Labels) -> Array:
    """(F, C) float64: the exact AUROC of every latent for every concept; 0.5 where one never fires."""
    positives_C, negatives_C = _counts(codes.n_tokens, label_NC)
    rank_FN, silent_F = _ranks(codes)
    rank_sum_FC = _by_concept(rank_FN, label_NC) + silent_F[:, None] * positives_C
    area_FC: Array = (rank_sum_FC - positives_C * (positives_C + 1) / 2) / (positives_C * negatives_C)
    return area_FC


def mean_difference_of_latents(codes: Codes, label_NC: Labels) -> Array:
    """(F, C) float64: mean code on the concept's tokens minus mean code on the others; silent is 0."""
    positives_C, negatives_C = _counts(codes.n_tokens, label_NC)
    value_FN = _matrix(codes).T.tocsr()
    positive_FC = _by_concept(value_FN, label_NC)
    total_F = np.asarray(value_FN.sum(axis=1)).ravel()
    difference_FC: Array = positive_FC / positives_C - (total_F[:, None] - positive_FC) / negatives_C
    return difference_FC


def deviations(value_NF: sparse.csr_matrix) -> Array:
    """(F,) float64: standard deviation of every column of a sparse matrix, zeros counted."""
    mean_F = np.asarray(value_NF.mean(axis=0)).ravel()
    square_F = np.asarray(value_NF.multiply(value_NF).mean(axis=0)).ravel()
    deviation_F: Array = np.sqrt(np.maximum(square_F - mean_F**2, 0.0))
    return deviation_F


def columns_of(codes: Codes) -> sparse.csc_matrix:
    """(N, F) codes as columns, float64, of which any few are quickly had."""
    return _matrix(codes).tocsc()


def rank_quality(score_NC: NDArray[Any], label_NC: Labels) -> tuple[Array, Array]:
    """AUROC and average precision, (C,) float64 each, of dense scores: column c of the scores for concept c.

    The average precision is Σ (recall_k − recall_{k−1}) · precision_k over the distinct scores, without
    interpolation, as scikit-learn's. Raises CosaeError for NaN, or a concept without both kinds of token.
    """
    positives_C, _ = _counts(len(score_NC), label_NC)
    if np.isnan(score_NC).any():
        raise CosaeError("scores must be numbers; got NaN instead: is the SAE or the probe diverged?")
    ranked = [
        rank_codes(np.ascontiguousarray(score_NC[:, c]), np.ascontiguousarray(label_NC[:, c]), n, len(score_NC))
        for c, n in enumerate(positives_C)
    ]
    return _columns(ranked)


def rank_quality_of_latents(
    columns_NF: sparse.csc_matrix, latent_C: NDArray[np.int64], sign_C: Array, label_NC: Labels
) -> tuple[Array, Array]:
    """`rank_quality` of sign · code of one latent per concept; only codes are sorted, the silent tie among themselves.

    columns_NF  (N, F) codes as `columns_of` gives them
    """
    positives_C, _ = _counts(columns_NF.shape[0], label_NC)
    ranked = []
    for c, (latent, n_positive) in enumerate(zip(latent_C, positives_C, strict=True)):
        own = slice(columns_NF.indptr[latent], columns_NF.indptr[latent + 1])
        label_E = label_NC[columns_NF.indices[own], c]
        ranked.append(rank_codes(columns_NF.data[own] * sign_C[c], label_E, n_positive, len(label_NC)))
    return _columns(ranked)


def _columns(ranked: Sequence[tuple[float, float]]) -> tuple[Array, Array]:
    area_C, precision_C = np.array(ranked, dtype=np.float64).reshape(-1, 2).T
    return area_C, precision_C


def rank_codes(score_E: NDArray[Any], label_E: Labels, n_positive: float, n_tokens: int) -> tuple[float, float]:
    """AUROC and average precision of one latent: its codes, and whether each code's token has the concept.

    n_positive of all n_tokens have it, at least one and not all; those without a code score 0, and no code is 0 then.
    """
    order_E = np.argsort(score_E)[::-1]
    sorted_E = score_E[order_E]
    last_K = np.flatnonzero(np.append(sorted_E[1:] != sorted_E[:-1], len(sorted_E) > 0))  # of the runs of equal scores
    count_K = np.diff(last_K, prepend=-1)
    hit_K = np.diff(np.cumsum(label_E[order_E], dtype=np.int64)[last_K], prepend=0)
    silent = n_tokens - len(label_E)
    if silent:
        place = int((sorted_E[last_K] > 0).sum())
        count_K = np.insert(count_K, place, silent)
        hit_K = np.insert(hit_K, place, int(n_positive) - int(label_E.sum()))
    found_K, passed_K = np.cumsum(hit_K), np.cumsum(count_K)
    area = ((count_K - hit_K) * (found_K - hit_K / 2)).sum() / (n_positive * (n_tokens - n_positive))
    precision = (hit_K * (found_K / passed_K)).sum() / n_positive
    return float(area), float(precision)


def auroc_of_dimensions(x_ND: NDArray[Any], label_NC: Labels) -> Array:
    """(D, C) float64: the exact AUROC of every dimension of dense vectors for every concept."""
    positives_C, negatives_C = _counts(len(x_ND), label_NC)
    label_CN = np.ascontiguousarray(label_NC.T, dtype=np.float64)
    rank_sum_DC = np.empty((x_ND.shape[1], len(label_CN)))
    for first in range(0, len(rank_sum_DC), DIMENSIONS):
        some = range(first, min(first + DIMENSIONS, len(rank_sum_DC)))
        rank_sum_DC[some] = np.stack([_midranks(np.ascontiguousarray(x_ND[:, d])) for d in some]) @ label_CN.T
    area_DC: Array = (rank_sum_DC - positives_C * (positives_C + 1) / 2) / (positives_C * negatives_C)
    return area_DC


def _counts(n_tokens: int, label_NC: Labels) -> tuple[Array, Array]:
    """Tokens with and without each concept."""
    if label_NC.ndim != 2 or len(label_NC) != n_tokens or label_NC.dtype != np.bool_:
        raise CosaeError(
            f"labels must be booleans of shape ({n_tokens} tokens, concepts); got {label_NC.dtype} of shape "
            f"{label_NC.shape} instead"
        )
    positives_C = label_NC.sum(axis=0).astype(np.float64)
    if (positives_C == 0).any() or (positives_C == n_tokens).any():
        raise CosaeError(
            "every concept needs a token that has it and one that has not; got a concept with only one kind: "
            "leave rare concepts out (min_positives)"
        )
    return positives_C, n_tokens - positives_C


def _matrix(codes: Codes) -> sparse.csr_matrix:
    """(N, F) float64 sparse: the codes but those of exactly 0, which tie with the silent tokens."""
    matrix = codes.to_scipy(np.float32).astype(np.float64)
    if np.isnan(matrix.data).any():
        raise CosaeError("codes must be numbers; got NaN instead: is the SAE diverged?")
    matrix.eliminate_zeros()
    return matrix


def _by_concept(value_FN: sparse.csr_matrix, label_NC: Labels) -> Array:
    """(F, C) float64: each latent's values summed over each concept's tokens; labels are sparse too, being few."""
    summed_FC: Array = (value_FN @ sparse.csr_matrix(label_NC, dtype=np.float64)).toarray()
    return summed_FC


def _ranks(codes: Codes) -> tuple[sparse.csr_matrix, Array]:
    """Midranks (1 = lowest) within each latent, minus the rank of the silent: (F, N) sparse; and that rank (F,).

    A latent without silent tokens has the rank they would have had.
    """
    by_latent = _matrix(codes).tocsc()
    value_E, first_F1 = by_latent.data, by_latent.indptr.astype(np.int64)
    count_F = np.diff(first_F1)
    latent_E = np.repeat(np.arange(codes.d_sae), count_F)
    order_E = _order_within(latent_E, value_E)
    place_E = np.arange(len(value_E)) - first_F1[latent_E]  # 0-based, among the latent's own codes
    silent_F = codes.n_tokens - count_F
    sorted_E = value_E[order_E]
    rank_E = _average_ties(place_E + 1.0 + silent_F[latent_E] * (sorted_E > 0), latent_E, sorted_E)
    below_F = np.bincount(latent_E, weights=sorted_E < 0, minlength=codes.d_sae)
    silent_rank_F = below_F + (silent_F + 1) / 2
    data_E = np.empty_like(rank_E)
    data_E[order_E] = rank_E - silent_rank_F[latent_E]
    rank_FN = sparse.csr_matrix((data_E, by_latent.indices, by_latent.indptr), shape=by_latent.shape[::-1])
    return rank_FN, silent_rank_F


def _order_within(latent_E: NDArray[np.int64], value_E: Array) -> NDArray[np.int64]:
    """The order that sorts by value within each latent; entries already stand latent by latent.

    One integer sort of (latent, value): an fp32 number's bits, with those of negatives flipped, rise with it.
    """
    bits_E = value_E.astype(np.float32).view(np.int32).astype(np.int64)
    rising_E = np.where(bits_E < 0, bits_E ^ 0x7FFFFFFF, bits_E) + 2**31
    order_E: NDArray[np.int64] = np.argsort((latent_E << 32) | rising_E)
    return order_E


def _average_ties(rank_E: Array, latent_E: NDArray[np.int64], value_E: Array) -> Array:
    """Ranks with those of equal neighbours (same latent, same value) replaced by their mean."""
    if not len(rank_E):
        return rank_E
    new_E = np.append(True, (value_E[1:] != value_E[:-1]) | (latent_E[1:] != latent_E[:-1]))
    group_E = np.cumsum(new_E) - 1
    mean_G = np.bincount(group_E, weights=rank_E) / np.bincount(group_E)
    averaged_E: Array = mean_G[group_E]
    return averaged_E


def _midranks(value_N: NDArray[Any]) -> Array:
    """(N,) float64 ranks from 1, ties averaged; several times as fast on fp32 as scipy.stats.rankdata."""
    order_N = np.argsort(value_N)
    rank_N = np.empty(len(value_N))
    alone = np.zeros(len(value_N), dtype=np.int64)
    rank_N[order_N] = _average_ties(np.arange(1.0, len(value_N) + 1), alone, value_N[order_N])
    return rank_N
