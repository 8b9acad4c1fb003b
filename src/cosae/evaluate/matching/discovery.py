"""Does a probing gap between two SAEs come from features only one has, or from shared features that are sharper?

In: how well every feature of two SAEs tells every concept (AUROC, evaluate.probing.ranking.auroc_of_latents), and their
matched pairs (cosae.evaluate.matching.match). Out: plain numbers with bootstrap intervals over concepts. The paper's
decomposition (paper §6), with what it lacks: intervals, held-out scores, and a control of as many random features.

    gap_full       mean over concepts of B's chosen feature minus A's chosen feature, all features allowed
    gap_matched    the same with only matched features allowed on either side
    separability   gap_matched / gap_full: the same features, sharper      discovery = 1 − separability
    gap_random     the same as gap_matched with as many features drawn at random from those that fire

Any restriction lowers the best of many features, and not alike in two SAEs: a gap_matched that is like gap_random says
nothing about matching. A share of a gap that may be 0 is no number, hence None there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosae.errors import CosaeError
from cosae.evaluate.matching.match import Pairs
from cosae.evaluate.statistics import RESAMPLES, mean_interval, percentile_interval, resample_counts

N_RANDOM = 20
"""Random sets of features that the matched ones are held against."""

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


def discovery_separability(
    train_a_FC: Array,
    held_a_FC: Array,
    train_b_FC: Array,
    held_b_FC: Array,
    matched: Pairs,
    seed: int = 0,
    n_resamples: int = RESAMPLES,
    n_random: int = N_RANDOM,
) -> dict[str, Any]:
    """Is a probing gap of B over A one of discovery (features A has not) or separability (the same features, sharper)?

    train_*_FC, held_*_FC  (F, C) a quality (AUROC) of every feature for every concept, on the tokens the feature is
                           chosen on and on those it is scored on: chosen and scored on the same, a larger SAE wins
    matched                shared pairs (`Matching.pairs.shared()`): the features allowed in the second comparison

    Returns gap_full, gap_matched, gap_random (mean over `n_random` seeded draws) and gap_discovery = full − matched as
    {"mean", "low", "high"}; separability_frac and discovery_frac with _low and _high, None where gap_full's interval
    holds 0; per_concept: float64 (C,) scores full_a, full_b, matched_a, matched_b. Intervals: 95 % bootstrap over
    concepts, the same resamples throughout. A feature whose training AUROC is 0.5 for every concept counts as silent
    and is not drawn at random. Raises CosaeError without a matched pair, for shapes that do not fit, and for NaN.
    """
    for train_FC, held_FC, ids in ((train_a_FC, held_a_FC, matched.a), (train_b_FC, held_b_FC, matched.b)):
        _check(train_FC, held_FC, ids, train_a_FC.shape[-1])
    full_a, full_b = _chosen(train_a_FC, held_a_FC), _chosen(train_b_FC, held_b_FC)
    matched_a, matched_b = _chosen(train_a_FC, held_a_FC, matched.a), _chosen(train_b_FC, held_b_FC, matched.b)
    random_C = _random_gap(train_a_FC, held_a_FC, train_b_FC, held_b_FC, len(matched), seed, n_random)
    full_C, inside_C = full_b - full_a, matched_b - matched_a
    gaps = {"full": full_C, "matched": inside_C, "random": random_C, "discovery": full_C - inside_C}
    return {
        "concepts": len(full_C),
        "matched": len(matched),
        "seed": seed,
        "resamples": n_resamples,
        **{f"gap_{name}": mean_interval(gap_C, seed, n_resamples) for name, gap_C in gaps.items()},
        **_shares(full_C, inside_C, seed, n_resamples),
        "per_concept": {"full_a": full_a, "full_b": full_b, "matched_a": matched_a, "matched_b": matched_b},
    }


def _shares(full_C: Array, inside_C: Array, seed: int, n_resamples: int) -> dict[str, float | None]:
    counts_RC = resample_counts(len(full_C), seed, n_resamples)
    full_R, inside_R = counts_RC @ full_C, counts_RC @ inside_C
    low, high = percentile_interval(full_R)
    if low <= 0 <= high:
        names = (f"{what}_{end}" for what in ("separability", "discovery") for end in ("frac", "low", "high"))
        return dict.fromkeys(names)
    some_R = full_R != 0
    share = float(inside_C.sum() / full_C.sum())
    share_low, share_high = percentile_interval(inside_R[some_R] / full_R[some_R])
    return {
        "separability_frac": share,
        "separability_low": share_low,
        "separability_high": share_high,
        "discovery_frac": 1 - share,
        "discovery_low": 1 - share_high,
        "discovery_high": 1 - share_low,
    }


def _chosen(train_FC: Array, held_FC: Array, allowed: Indices | None = None) -> Array:
    """(C,) held-out quality of the feature that is best in training, among those allowed; the first of equals."""
    ids = np.arange(len(train_FC)) if allowed is None else np.sort(allowed)
    best_C = ids[train_FC[ids].argmax(axis=0)]
    picked: Array = held_FC[best_C, np.arange(held_FC.shape[1])]
    return picked


def _random_gap(
    train_a_FC: Array, held_a_FC: Array, train_b_FC: Array, held_b_FC: Array, size: int, seed: int, n_random: int
) -> Array:
    """(C,) mean gap over random sets of `size` firing features of either SAE."""
    rng = np.random.default_rng(seed)
    total_C = np.zeros(train_a_FC.shape[1])
    for _ in range(n_random):
        for sign, train_FC, held_FC in ((-1, train_a_FC, held_a_FC), (1, train_b_FC, held_b_FC)):
            firing = np.flatnonzero((train_FC != 0.5).any(axis=1))
            firing = firing if len(firing) >= size else np.arange(len(train_FC))
            total_C += sign * _chosen(train_FC, held_FC, rng.choice(firing, size, replace=False))
    mean_C: Array = total_C / max(n_random, 1)
    return mean_C


def _check(train_FC: Array, held_FC: Array, ids: Indices, n_concepts: int) -> None:
    if not len(ids):
        raise CosaeError("discovery and separability need at least one matched pair of features; got none.")
    if train_FC.shape != held_FC.shape or train_FC.ndim != 2 or train_FC.shape[1] != n_concepts or not n_concepts:
        raise CosaeError(
            "qualities must be (features, concepts), of the same concepts for both SAEs and the same features in "
            f"training and held out. Got {train_FC.shape} and {held_FC.shape} for {n_concepts} concepts instead."
        )
    if ids.min() < 0 or ids.max() >= len(train_FC):
        raise CosaeError(
            f"matched pairs must name features of these SAEs. Got feature {int(ids.max())} of {len(train_FC)} instead."
        )
    if not (np.isfinite(train_FC).all() and np.isfinite(held_FC).all()):
        raise CosaeError("qualities must be finite numbers; got NaN or infinity instead: leave such concepts out.")
