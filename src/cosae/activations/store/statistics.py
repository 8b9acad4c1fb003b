"""Statistics of a finished store's train rows: mean, variance, norms, sinks. Exact, in memory that does not grow.

mean, variance   moments of each shard, joined by Chan, Golub & LeVeque (1983) in float64, in the shards' order
norm quantiles   order statistics of the fp32 norms, linear between two of them. Non-negative floats sort as their
                 bits do, so two passes that count upper and then lower 16 bits find any of them exactly.
rounding_noise   what the store's dtype cost, as a share of the variance (the worst shard's; see format)
sinks            position 0 | special id | |x| ≥ 10 × the median norm, as in cosae.activations.sinks
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosae.activations.filter import QUANTILES
from cosae.activations.sinks import FACTOR
from cosae.activations.store.format import WARN_NOISE

AT_ONCE = 1 << 20
Columns = dict[str, NDArray[Any]]
"""Columns of one shard by their names in the file."""


def describe_rows(shards: Callable[[], Iterable[Columns]]) -> dict[str, Any]:
    """Plain numbers over all rows of `shards()`, which is called once per pass.

    Raises nothing for one row or for equal rows; there must be at least one row.
    """
    mean_D, squares, n = _join(shards())
    quantiles = _quantiles(lambda: (columns["norm"] for columns in shards()), n, QUANTILES)
    n_zero = sum(int((columns["norm"] == 0).sum()) for columns in shards())
    # among the others alone, as sinks.median_norm has it: the zeros come first in the order of all
    middle = (n_zero + (n - n_zero - 1) / 2) / (n - 1) if n > max(1, n_zero) else 1.0
    median = (
        _quantiles(lambda: (columns["norm"] for columns in shards()), n, (middle,))[0]
        if n_zero
        else quantiles[QUANTILES.index(0.5)]
    )
    total, sinks = 0.0, dict.fromkeys(("position_0", "special", "large_norm", "any"), 0)
    for columns in shards():
        total += float(columns["norm"].sum(dtype=np.float64))
        first, special = columns["position"] == 0, columns["special"]
        large = columns["norm"] >= FACTOR * median
        for name, found in zip(sinks, (first, special, large, first | special | large), strict=True):
            sinks[name] += int(found.sum())
    return {
        "rows": n,
        "mean": mean_D.tolist(),
        "total_variance": squares / n,
        "norm": {
            "mean": total / n,
            "median": median,
            "max_over_median": quantiles[-1] / median if median > 0 else None,
            "quantiles": [[mark, value] for mark, value in zip(QUANTILES, quantiles, strict=True)],
        },
        "sinks": {"factor": FACTOR, **sinks},
    }


def noise_warning(statistics: Mapping[str, Any], dtype: str) -> str | None:
    """What to say where rounding to a store's dtype cost more than WARN_NOISE of the variance; None elsewhere.

    Stores of cosae 0.1 did not measure it, and were never centred. For their floats it follows from mean and variance:
    the error of a value with p significant bits has the variance x² · 4^(1 − p) / 12 · E[1/m²], where the leading
    digits m of values from anywhere are log-uniform on [1, 2), so that E[1/m²] = 3 / (8 ln 2).
    """
    noise = statistics.get("rounding_noise")
    bits = {"bfloat16": 8, "float16": 11}.get(dtype)
    if noise is None and bits is not None and statistics["total_variance"] > 0:
        energy = float(np.square(statistics["mean"]).sum()) + statistics["total_variance"]
        noise = 4.0 ** (1 - bits) / 12 * 3 / (8 * math.log(2)) * energy / statistics["total_variance"]
    if noise is None or noise <= WARN_NOISE:
        return None
    return (
        f"{dtype} has cost these activations: rounding noise is {noise:.1%} of their variance, which no SAE can "
        "explain. Capture with --store-dtype float32"
    )


def _join(shards: Iterable[Columns]) -> tuple[NDArray[np.float64], float, int]:
    """(D,) mean, Σ |x − mean|², rows."""
    mean_D, squares, n = np.zeros(1), 0.0, 0
    for columns in shards:
        more = len(columns["norm"])
        apart_D = columns["mean"] - mean_D
        squares += float(columns["squares"][0]) + float(np.square(apart_D).sum()) * (n * more / (n + more))
        mean_D = mean_D + apart_D * (more / (n + more))
        n += more
    return mean_D, squares, n


def _quantiles(norms: Callable[[], Iterator[NDArray[np.float32]]], n: int, marks: Sequence[float]) -> tuple[float, ...]:
    """Quantiles of n finite, non-negative values, as sinks.quantiles has them."""
    places = [mark * (n - 1) for mark in marks]
    ranks = sorted({int(np.floor(p)) for p in places} | {int(np.ceil(p)) for p in places})
    value = dict(zip(ranks, _order_statistics(norms, ranks), strict=True))
    low, high = [value[int(np.floor(p))] for p in places], [value[int(np.ceil(p))] for p in places]
    return tuple(a + (b - a) * (p - np.floor(p)) for a, b, p in zip(low, high, places, strict=True))


def _order_statistics(norms: Callable[[], Iterator[NDArray[np.float32]]], ranks: Sequence[int]) -> list[float]:
    """The values that would stand at `ranks`, ascending, if all were sorted."""

    def bits() -> Iterator[NDArray[np.uint32]]:
        for part in _together(norms()):
            yield (part + np.float32(0)).view(np.uint32)  # −0 becomes 0

    upper = np.zeros(1 << 16, np.int64)
    for found in bits():
        upper += np.bincount(found >> 16, minlength=1 << 16)
    below = np.concatenate([[0], np.cumsum(upper)])
    bucket = np.searchsorted(below, ranks, side="right") - 1
    lower = {int(b): np.zeros(1 << 16, np.int64) for b in bucket}
    for found in bits():
        for b, counts in lower.items():
            counts += np.bincount(found[found >> 16 == b] & 0xFFFF, minlength=1 << 16)
    values = []
    for rank, b in zip(ranks, bucket.tolist(), strict=True):
        inside = np.searchsorted(np.cumsum(lower[b]), rank - below[b], side="right")
        values.append(float(np.array([b << 16 | int(inside)], np.uint32).view(np.float32)[0]))
    return values


def _together(parts: Iterator[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """The same values in fewer, larger parts: a count of 65 536 buckets should not be made for a few rows."""
    waiting: list[NDArray[np.float32]] = []
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting)) >= AT_ONCE:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)
