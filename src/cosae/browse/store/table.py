"""Which features of a table pass its filters, and in which a text is found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cosae.browse.store.format import Array
from cosae.browse.store.records import NUMBERS, Columns, Explanation
from cosae.errors import CosaeError, check_choice

Range = tuple[float | None, float | None]
Filters = Mapping[str, Range | bool]
"""By column of NUMBERS the least and largest value (None: no bound), both ends in; features whose number is missing are
left out. And by word: dead, matched_any, explained: True or False."""
WORDS = ("dead", "matched_any", "explained")
SEARCHES = ("any", "token", "label", "concept", "id")


def filtered(columns: Columns, explained: Sequence[int], filters: Filters) -> NDArray[np.bool_]:
    """(F,) bool: features that pass all filters. Raises CosaeError for one that does not exist, or is ill-formed."""
    keep_F = np.ones(len(columns["id"]), dtype=bool)
    for name, wanted in filters.items():
        if name in WORDS:
            if not isinstance(wanted, bool):
                raise CosaeError(f"the filter {name} is True or False. Got {wanted!r} instead.")
            if name == "explained":
                has_F = np.isin(columns["id"], explained)
            else:
                has_F = columns["firings"] == 0 if name == "dead" else columns["matched"] > 0
            keep_F &= has_F == wanted
            continue
        check_choice("a filter", name, (*NUMBERS, *WORDS))
        if isinstance(wanted, bool) or len(wanted) != 2:
            raise CosaeError(f"the filter {name} is a least and a largest value. Got {wanted!r} instead.")
        low, high = (end if end is not None else side * math.inf for end, side in zip(wanted, (-1, 1), strict=True))
        with np.errstate(invalid="ignore"):
            keep_F &= (columns[name] >= low) & (columns[name] <= high)
    return keep_F


def searched(
    table: Mapping[str, Array],
    spelled: tuple[Array, Sequence[str]],
    explanations: Mapping[int, Explanation],
    concepts: Sequence[str],
    text: str,
    where: str,
) -> NDArray[np.bool_]:
    """(F,) bool: features of which a text in lower case says something. spelled: token ids and their texts in lower
    case; where: one of SEARCHES."""
    found_F = np.zeros(len(table["id"]), dtype=bool)
    if where in ("any", "token"):
        ids, lowered = spelled
        hits = ids[np.fromiter((text in one for one in lowered), bool, len(lowered))]
        found_F |= np.isin(table["top_tokens"], hits).any(1)
    if where in ("any", "label"):
        hit = [id for id, one in explanations.items() if text in one.text.lower()]
        found_F[[id for id in hit if id < len(found_F)]] = True
    if where in ("any", "concept"):
        found_F |= np.isin(table["concept"], [place for place, name in enumerate(concepts) if text in name.lower()])
    if where in ("any", "id") and text.isdecimal() and int(text) < len(found_F):
        found_F[int(text)] = True
    return found_F
