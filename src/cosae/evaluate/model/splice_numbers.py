"""Per-token cross-entropies and divergences of a splice → tables and paired intervals.

In: what `splice` measured at every token, by place and rule. Out: plain numbers: means by place, by set of tokens and
by norm quartile; and, by bootstrap over documents, the interval of each metric and of its difference from a baseline's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosae.evaluate.statistics import Array, percentile_interval, resample_counts

PLACES = ("everywhere", "off_sinks")
ABLATIONS = ("mean", "zero")
METRICS = ("kl", "cross_entropy", "recovered_mean", "recovered_zero")
_BLOCKS = 256

PerToken = dict[str, dict[str, dict[str, Array]]]
"""place → "mean" | "zero" | "sae NAME" → "cross_entropy" | "kl" → (N,) float64."""


def table(values: PerToken, own_N: Array, name: str, quartiles: Mapping[str, NDArray[np.int64]]) -> dict[str, Any]:
    """place → over → numbers."""
    return {
        place: {
            over: {
                **_numbers(values[place], own_N, name, quartile_N >= 0),
                "by_norm_quartile": [_numbers(values[place], own_N, name, quartile_N == q) for q in range(4)],
            }
            for over, quartile_N in quartiles.items()
        }
        for place in PLACES
    }


def _numbers(values: dict[str, dict[str, Array]], own_N: Array, name: str, in_N: NDArray[np.bool_]) -> dict[str, Any]:
    one, own = values[name], own_N[in_N]
    increase = one["cross_entropy"][in_N] - own
    numbers: dict[str, Any] = {
        "tokens": int(in_N.sum()),
        "cross_entropy": mean(one["cross_entropy"][in_N]),
        "increase": mean(increase),
        "kl": mean(one["kl"][in_N]),
        "kl_median": float(np.median(one["kl"][in_N])) if in_N.any() else None,
    }
    if name not in ABLATIONS:
        for kind in ABLATIONS:
            harm = float((values[kind]["cross_entropy"][in_N] - own).sum())
            numbers[f"recovered_{kind}"] = 1 - float(increase.sum()) / harm if harm > 0 else None
    return numbers


def paired(
    values: PerToken,
    own_N: Array,
    quartiles: Mapping[str, NDArray[np.int64]],
    names: list[str],
    baseline: str,
    unit_N: NDArray[np.int64],
    unit: str,
    seed: int,
    n_resamples: int,
) -> list[dict[str, Any]]:
    """One row for each place, over, metric and SAE: its value and its difference from the baseline, with intervals."""
    nunits = int(unit_N.max()) + 1
    drawn_RU = resample_counts(nunits, seed, n_resamples).astype(np.float64)
    rows = []
    for place in PLACES:
        for over, quartile_N in quartiles.items():
            in_N = quartile_N >= 0
            for metric in METRICS:
                sums = {
                    name: _ratio_sums(values[place], own_N, f"sae {name}", metric, in_N, unit_N, nunits)
                    for name in names
                }
                for name in names:
                    row = _row(sums[name], None if name == baseline else sums[baseline], drawn_RU)
                    where = {"arm": name, "versus": baseline, "spliced_in": place, "over": over, "metric": metric}
                    how = {"unit": unit, "units": nunits, "seed": seed, "resamples": n_resamples}
                    rows.append({**where, **row, **how})
    return rows


def _ratio_sums(
    values: dict[str, dict[str, Array]],
    own_N: Array,
    name: str,
    metric: str,
    in_N: NDArray[np.bool_],
    unit_N: NDArray[np.int64],
    nunits: int,
) -> tuple[Array, Array]:
    """(U,), (U,): by unit, the sums whose ratio is the metric."""
    one = values[name]
    if metric in ("kl", "cross_entropy"):
        above_N, below_N = one[metric], np.ones_like(own_N)
    else:
        ablated_N = values[metric.removeprefix("recovered_")]["cross_entropy"]
        above_N, below_N = ablated_N - one["cross_entropy"], ablated_N - own_N
    return (
        np.bincount(unit_N[in_N], weights=above_N[in_N], minlength=nunits).astype(np.float64),
        np.bincount(unit_N[in_N], weights=below_N[in_N], minlength=nunits).astype(np.float64),
    )


def _row(sums: tuple[Array, Array], base: tuple[Array, Array] | None, drawn_RU: Array) -> dict[str, float | None]:
    """Value and difference with their intervals; None where the denominator is not above 0.

    Resamples in which it is not are left out; resamples_used says how many stayed.
    """
    names = ("value", "low", "high", "difference", "difference_low", "difference_high")
    none: dict[str, float | None] = {**dict.fromkeys(names), "resamples_used": 0}
    above_U, below_U = sums
    below_R = drawn_RU @ below_U
    with np.errstate(divide="ignore", invalid="ignore"):
        estimates_R = (drawn_RU @ above_U) / below_R
        gaps_R = None if base is None else (drawn_RU @ (above_U - base[0])) / below_R
    safe_R = below_R > 0
    if not below_U.sum() > 0 or not safe_R.any():
        return none
    low, high = percentile_interval(estimates_R[safe_R])
    row = {
        **none,
        "resamples_used": int(safe_R.sum()),
        "value": float(above_U.sum() / below_U.sum()),
        "low": low,
        "high": high,
    }
    if base is None or gaps_R is None:
        return row
    low, high = percentile_interval(gaps_R[safe_R])
    difference = float((above_U - base[0]).sum() / below_U.sum())
    return {**row, "difference": difference, "difference_low": low, "difference_high": high}


def units(doc_N: NDArray[np.int32]) -> tuple[NDArray[np.int64], str]:
    """(N,) the unit each token is resampled with: its document, or a block of neighbours where there are not two."""
    names, unit_N = np.unique(doc_N, return_inverse=True)
    if len(names) > 1:
        return unit_N.astype(np.int64), "documents"
    block = max(-(-len(doc_N) // _BLOCKS), 1)
    return np.arange(len(doc_N)) // block, f"blocks of {block} tokens"


def mean(value_n: Array) -> float | None:
    """None of nothing."""
    return float(value_n.mean()) if len(value_n) else None
