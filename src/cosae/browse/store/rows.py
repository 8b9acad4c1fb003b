"""Rows of a store's files → what a page shows of a feature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cosae.browse.store import format as files
from cosae.browse.store.format import Array
from cosae.browse.store.records import GROUPS, Example, Explanation, Neighbour


def known(value: Any) -> float | None:
    """None for NaN."""
    return float(value) if value == value else None


def score_of(one: Explanation) -> float | None:
    """Mean of detection and fuzzing; None where neither was scored."""
    parts = [part.value for part in (one.detection, one.fuzzing) if part is not None and part.value is not None]
    return sum(parts) / len(parts) if parts else None


def ids_with_values(one: Mapping[str, Any], name: str) -> tuple[tuple[int, float], ...]:
    """A list of ids with a number each; empty where the store has none."""
    if f"{name}_id" not in one:
        return ()
    pairs = zip(one[f"{name}_id"].tolist(), one[f"{name}_value"].tolist(), strict=True)
    return tuple((id, value) for id, value in pairs if id >= 0)


def neighbours(one: Mapping[str, Any], name: str) -> tuple[Neighbour, ...]:
    """By cosine or by co-firing."""
    parts = (one[f"{name}_{column}"].tolist() for column in ("id", "cosine", "jaccard"))
    return tuple(Neighbour(id, known(c), known(j)) for id, c, j in zip(*parts, strict=True) if id >= 0)


def histogram(one: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Edges and counts without the empty bins below the least value."""
    count_n = one["histogram"]
    some = np.flatnonzero(count_n)
    if not len(some):
        return (), ()
    first, step = int(some[0]), files.FINE_BINS // files.BINS_OCTAVE
    above = one["histogram_top"] + 1  # in fine bins, the upper edge of the last bin
    edges = 2.0 ** ((above - step * np.arange(len(count_n) - first, -1, -1)) / files.FINE_BINS)
    return tuple(edges.tolist()), tuple(count_n[first:].tolist())


def example(rows: Mapping[str, Array], row: int) -> Example:
    """One row of a file of examples."""
    real_W = (rows["flags"][row] & files.REAL) > 0
    flag_W = rows["flags"][row][real_W]
    interval, document = int(rows["interval"][row]), rows["document"][row]
    return Example(
        group=GROUPS[int(rows["group"][row])],
        at=int(rows["at"][row]),
        ids_W=rows["ids"][row][real_W],
        value_W=rows["value"][row][real_W],
        r_W=rows["r"][row][real_W],
        kappa_W=rows["kappa"][row][real_W].astype(np.float32) / files.KAPPA_ONE,
        sink_W=(flag_W & files.SINK) > 0,
        counted_W=(flag_W & files.COUNTED) > 0,
        interval=interval if interval >= 0 else None,
        document=document or None,
        sequence=int(rows["sequence"][row]),
        position=int(rows["position"][row]),
    )
