"""Percentile bootstrap: how far a number would move had other documents (or concepts) been drawn.

In: one value per unit (document, block of rows, concept, pair of tokens). Out: the estimate and the ends of its central
interval. A resample draws n units with replacement from n; the same seed and n give the same resamples to
every arm, so a difference between arms is paired: what a unit does to both arms cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

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


class Ratio(NamedTuple):
    """An estimate of a ratio, the ends of its interval, and how many resamples that rests on."""

    value: float
    low: float
    high: float
    used: int


def resample_counts(n_units: int, seed: int = 0, n_resamples: int = RESAMPLES) -> Array:
    """(R, n_units) float64: how often each unit is drawn in each resample; every row sums to n_units.

    Depends on the three arguments only; read-only, since a small table is kept for the next call. Raises
    CosaeError when there is nothing to draw from.
    """
    if n_units < 1:
        raise CosaeError("an interval needs at least one document, block or concept; got none instead")
    return _kept_draw(n_units, seed, n_resamples) if n_units <= KEPT_UNITS else _draw(n_units, seed, n_resamples)


def _draw(n_units: int, seed: int, n_resamples: int) -> Array:
    drawn_RU = np.random.default_rng(seed).multinomial(n_units, np.full(n_units, 1 / n_units), size=n_resamples)
    counts_RU = drawn_RU.astype(np.float64)
    counts_RU.flags.writeable = False
    return counts_RU


_kept_draw = lru_cache(maxsize=4)(_draw)


def percentile_interval(estimates_R: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """The central `level` interval of the resampled estimates: its lower and upper end."""
    tail = (1 - level) / 2
    low, high = np.quantile(np.asarray(estimates_R, dtype=np.float64), [tail, 1 - tail])
    return float(low), float(high)


def mean_or_none(values: Array | Tensor) -> float | None:
    """The mean of values (n,); None of nothing."""
    return float(values.mean()) if len(values) else None


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


def ratio_interval(above_U: Array, below_U: Array, counts_RU: Array, every: bool = True) -> Ratio | None:
    """Σ above / Σ below over units, with its interval over the resamples (`resample_counts`) in which Σ below > 0.

    None where Σ below is not above 0 in all units, nor in any resample (`every`: in each).
    """
    below_R = counts_RU @ below_U
    safe_R = below_R > 0
    if not below_U.sum() > 0 or not (safe_R.all() if every else safe_R.any()):
        return None
    low, high = percentile_interval((counts_RU @ above_U)[safe_R] / below_R[safe_R])
    return Ratio(float(above_U.sum() / below_U.sum()), low, high, int(safe_R.sum()))


def crossed_draws(
    n_rows: int, n_columns: int, seed: int = 0, n_resamples: int = RESAMPLES
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows and columns of a table, each drawn with replacement."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(n_rows, size=n_rows), rng.integers(n_columns, size=n_columns)) for _ in range(n_resamples)]


def crossed_interval(
    value_DS: Array, drawn: Sequence[tuple[Any, Any]], within: tuple[float, float] = (-np.inf, np.inf)
) -> tuple[float | None, float | None]:
    """Ends of the 95 % interval of a table's mean: rows and columns drawn (`crossed_draws`); of one row, Student's t
    over its columns; of a single value, None. within: what the mean can be, beyond which no end lies."""
    n_rows, n_columns = value_DS.shape
    if n_rows > 1:
        return percentile_interval([value_DS[np.ix_(d, s)].mean() for d, s in drawn])
    if n_columns == 1:
        return None, None
    half = float(stats.t.ppf(0.975, n_columns - 1) * value_DS[0].std(ddof=1) / np.sqrt(n_columns))
    mean = float(value_DS.mean())
    return max(mean - half, within[0]), min(mean + half, within[1])


def weighted_medians(value_N: ArrayLike, unit_N: ArrayLike, counts_RU: NDArray[Any]) -> Array:
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
