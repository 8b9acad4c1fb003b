"""The examples of an SAE's features → the files that hold them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosae.browse.collect.building import Building
from cosae.browse.collect.chunks import BEFORE
from cosae.browse.collect.examples import choose
from cosae.browse.store.format import GROUP_FEATURES, REAL
from cosae.browse.store.writer import ExampleWriter
from cosae.errors import CosaeError
from cosae.io.progress import Progress

Array = NDArray[Any]
TOP_TOKENS = 6
AT_ONCE = 16 * GROUP_FEATURES
"""Features whose examples are chosen together."""


def write_examples(place: Path, building: Building, number: int, progress: Progress) -> tuple[Array, set[int]]:
    """Returns (F, 6) ids of the distinct tokens of the largest, −1 where there are fewer; and ids of all tokens."""
    state, tokens = building.states[number], building.tokens
    n, width = state.sae.d_sae, building.options.window
    ids, documents, starts = (tokens.open(name) for name in ("id", "document", "start"))
    r, flags, names = tokens.open(f"r{number}"), tokens.open(f"flags{number}"), tokens.documents()
    starts = np.asarray(starts)
    ends = np.append(starts[1:], tokens.count)
    top_tokens, used = np.full((n, TOP_TOKENS), -1, np.int64), set()

    def sequence_of(place_n: Array) -> Array:
        found: Array = np.searchsorted(starts, place_n, side="right") - 1
        return found

    with ExampleWriter(place) as writer:
        for first in range(0, n, AT_ONCE):
            features = range(first, min(first + AT_ONCE, n))
            chosen = choose(state.examples, features, sequence_of)
            slots = state.windows.take(slice(features.start, features.stop))
            at = (chosen.feature_n - first, chosen.slot_n)
            if (slots["place"][at] != chosen.place_n).any():
                raise CosaeError(f"{building.work} is damaged: remove it, and build the store again.")
            sequence = sequence_of(chosen.place_n)
            begin = np.maximum(
                np.minimum(chosen.place_n - int(width * BEFORE), ends[sequence] - width), starts[sequence]
            )
            token_nW = begin[:, None] + np.arange(width)
            real_nW = token_nW < np.minimum(begin + width, ends[sequence])[:, None]
            token_nW = np.minimum(token_nW, tokens.count - 1)
            id_nW = np.where(real_nW, ids[token_nW], -1)
            used.update(np.unique(id_nW).tolist())
            rows = {
                "feature": chosen.feature_n,
                "group": chosen.group_n,
                "interval": chosen.interval_n,
                "at": (chosen.place_n - begin).astype(np.int16),
                "sequence": sequence,
                "position": (chosen.place_n - starts[sequence]).astype(np.int32),
                "document": np.array([names.get(d, "") for d in documents[chosen.place_n].tolist()], dtype=object),
                "ids": id_nW.astype(np.int32),
                "value": np.where(real_nW, slots["value"][at], 0).astype(np.float32),
                "r": np.where(real_nW, r[token_nW], 0).astype(np.float32),
                "kappa": np.where(real_nW, slots["kappa"][at], 0).astype(np.int16),
                "flags": np.where(real_nW, flags[token_nW] | REAL, 0).astype(np.uint8),
            }
            groups = np.arange(features.start, features.stop + GROUP_FEATURES, GROUP_FEATURES)
            for low, high in pairwise(np.searchsorted(chosen.feature_n, groups).tolist()):
                writer.add({name: value[low:high] for name, value in rows.items()})
            _note_tokens(top_tokens, chosen.feature_n[chosen.group_n == 0], ids[chosen.place_n[chosen.group_n == 0]])
            progress.advance(len(features))
    return top_tokens, used


def _note_tokens(top_tokens: Array, feature_n: Array, id_n: Array) -> None:
    """The first distinct tokens of each feature, in place."""
    some, first = np.unique(feature_n, return_index=True)
    for feature, ids in zip(some.tolist(), np.split(id_n, first[1:]), strict=len(some) > 0):
        distinct = list(dict.fromkeys(ids.tolist()))[:TOP_TOKENS]
        top_tokens[feature, : len(distinct)] = distinct
