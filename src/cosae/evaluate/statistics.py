"""Percentile bootstrap: how far a number would move had other documents (or concepts) been drawn.

In: one value per unit (document, block of rows, concept). Out: the estimate and the ends of its central
interval. A resample draws n units with replacement from n; the same seed and n give the same resamples to
every arm, so a difference between arms is paired: what a unit does to both arms cancels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cosae.errors import CosaeError

RESAMPLES = 2000
LEVEL = 0.95
KEPT_UNITS = 512
"""Largest number of units whose resamples are kept between calls: 8 MB at 2000 resamples."""

Array = NDArray[np.float64]


class Interval(TypedDict):
    """An estimate of a mean and the ends of its interval."""

    mean: float
    low: float
    high: float


class Difference(TypedDict):
    """An estimate of a paired difference and the ends of its interval."""

    difference: float
    low: float
    high: float


def resample_counts(n_units: int, seed: int = 0, n_resamples: int = RESAMPLES) -> NDArray[np.int64]:
    """(R, n_units) int64: how often each unit is drawn in each resample; every row sums to n_units.

    Depends on the three arguments only; not to be written to, since a small table is kept for the next call. Raises
    CosaeError when there is nothing to draw from.
    """
    if n_units < 1:
        raise CosaeError("an interval needs at least one document, block or concept; got none instead")
    return _kept_draw(n_units, seed, n_resamples) if n_units <= KEPT_UNITS else _draw(n_units, seed, n_resamples)


def _draw(n_units: int, seed: int, n_resamples: int) -> NDArray[np.int64]:
    counts_RU = np.random.default_rng(seed).multinomial(n_units, np.full(n_units, 1 / n_units), size=n_resamples)
    counts_RU.flags.writeable = False
    return counts_RU


_kept_draw = lru_cache(maxsize=4)(_draw)


def percentile_interval(estimates_R: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """The central `level` interval of the resampled estimates: its lower and upper end."""
    tail = (1 - level) / 2
    low, high = np.quantile(np.asarray(estimates_R, dtype=np.float64), [tail, 1 - tail])
    return float(low), float(high)


def mean_interval(values: ArrayLike, seed: int = 0, n_resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Mean of one value per unit, with its bootstrap interval over units."""
    value_U = _finite(values)
    estimates_R = resample_counts(len(value_U), seed, n_resamples) @ value_U / len(value_U)
    low, high = percentile_interval(estimates_R, level)
    return {"mean": float(value_U.mean()), "low": low, "high": high}


def paired_mean_interval(
    values: ArrayLike, baseline: ArrayLike, seed: int = 0, n_resamples: int = RESAMPLES, level: float = LEVEL
) -> Difference:
    """Mean of values - baseline, unit by unit, with its bootstrap interval over units."""
    value_U, baseline_U = _finite(values), _finite(baseline)
    if value_U.shape != baseline_U.shape:
        raise CosaeError(
            f"a paired difference needs the same units in both arms; got {len(value_U)} and {len(baseline_U)} instead"
        )
    interval = mean_interval(value_U - baseline_U, seed, n_resamples, level)
    return {"difference": interval["mean"], "low": interval["low"], "high": interval["high"]}


def weighted_medians(value_N: ArrayLike, unit_N: ArrayLike, counts_RU: NDArray[np.int64]) -> Array:
    """(R,) float64: the median of value_N with each unit's tokens repeated as often as the resample drew it.

    value_N (N,) one value per token; unit_N (N,) the unit each token belongs to. Where the number of tokens
    is even, the lower median is taken. A resample that drew only units without tokens gives NaN.
    """
    value = np.asarray(value_N, dtype=np.float64)
    order = np.argsort(value, kind="stable")
    value, unit = value[order], np.asarray(unit_N)[order]
    medians_R = np.full(len(counts_RU), np.nan)
    for row, counts_U in enumerate(counts_RU):
        passed_N = np.cumsum(counts_U[unit])
        if len(passed_N) and passed_N[-1] > 0:
            medians_R[row] = value[np.searchsorted(passed_N, (passed_N[-1] + 1) // 2)]
    return medians_R


def _finite(values: ArrayLike) -> Array:
    value_U = np.asarray(values, dtype=np.float64).ravel()
    if not np.isfinite(value_U).all():
        raise CosaeError(
            "an interval needs finite numbers; got NaN or infinity instead: leave such units out of every arm"
        )
    return value_U
