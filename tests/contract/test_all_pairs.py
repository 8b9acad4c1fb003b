"""The combinations of the quick suite leave out no pair."""

from __future__ import annotations

import itertools
from math import prod

import pytest

from tests.support.all_pairs import all_pairs, pairs_of
from tests.support.combinations import COMBINATIONS, every_combination


@pytest.mark.parametrize("sizes", [(2, 2), (3, 7, 5, 2, 2), (4, 4, 4, 4), (1, 3, 1), (6,)])
def test_every_pair_occurs(sizes: tuple[int, ...]) -> None:
    rows = list(itertools.product(*map(range, sizes)))
    chosen = all_pairs(rows)
    missing = set(itertools.chain(*map(pairs_of, rows))) - set(itertools.chain(*map(pairs_of, chosen)))
    assert not missing
    assert len(chosen) == len(set(chosen))
    largest = prod(sorted(sizes)[-2:])
    assert len(sizes) < 2 or largest <= len(chosen) <= 1.5 * largest
    assert chosen == all_pairs(rows)


def test_a_pair_that_no_row_holds_is_not_asked_for() -> None:
    rows = [("a", 1), ("a", 2), ("b", 2)]
    assert all_pairs(rows) == rows
    assert all_pairs([("a", 1, "x"), ("a", 1, "y"), ("b", 1, "x")]) == [("a", 1, "x"), ("a", 1, "y"), ("b", 1, "x")]


def test_the_contract_s_quick_part() -> None:
    """Of 480 combinations, those without the mark `slow`."""
    parameters = every_combination.args[1]
    quick = [one.values[0] for one in parameters if not one.marks]
    assert [one.values[0] for one in parameters] == COMBINATIONS
    assert len(COMBINATIONS) == 480
    wanted, found = (set().union(*(pairs_of(c.axes) for c in some)) for some in (COMBINATIONS, quick))
    assert found == wanted
    assert len(quick) < 50
