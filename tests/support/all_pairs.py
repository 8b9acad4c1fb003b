"""Few rows of a table in which every two values that meet anywhere still meet."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence


def pairs_of(row: Sequence[Hashable]) -> frozenset[tuple[int, Hashable, int, Hashable]]:
    """The pairs of values that meet in a row, each value with its column."""
    return frozenset((i, a, j, b) for (i, a), (j, b) in itertools.combinations(enumerate(row), 2))


def all_pairs(rows: Sequence[tuple[Hashable, ...]]) -> list[tuple[Hashable, ...]]:
    """A subset of the rows, in their order, that covers every pair of values of two columns that the rows hold.

    Greedy: the row with the most pairs still missing comes next, the first of equals, so the choice is always the same.
    """
    pairs = {row: pairs_of(row) for row in rows}
    missing = set().union(*pairs.values())
    chosen = set()
    while missing:
        best = max(rows, key=lambda row: len(pairs[row] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return [row for row in rows if row in chosen]
