"""The n entries with the largest keys of each of many rows, whatever their number: heaps and reservoirs alike.

A key of an entry's |value| keeps the largest; a key drawn from (seed, feature, token) keeps a uniform sample without
replacement, the same however the tokens are cut into chunks. Both are 32-bit unsigned: an fp32 number's bits rise with
it. No loop runs over entries or rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
KEY_MOST = np.uint64(0xFFFFFFFF)


def value_key(size_E: Array) -> Array:
    """(E,) uint32 that rise with |value| ≥ 0."""
    return np.ascontiguousarray(size_E, dtype=np.float32).view(np.uint32)


def random_key(feature_E: Array, place_E: Array, seed: int) -> Array:
    """(E,) uint32 ≥ 1, uniform: splitmix64 of (seed, feature, place)."""
    with np.errstate(over="ignore"):
        mixed = place_E.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed += feature_E.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03) + np.uint64(seed)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


class Kept:
    """R rows of n places: key_Rn uint32 (0: empty), place_Rn int64 (token of the pass; −1), value_Rn float32."""

    def __init__(self, rows: int, n: int) -> None:
        self.n = n
        self.key_Rn = np.zeros((rows, n), np.uint32)
        self.place_Rn = np.full((rows, n), -1, np.int64)
        self.value_Rn = np.zeros((rows, n), np.float32)

    def arrays(self) -> dict[str, Array]:
        """What a checkpoint keeps."""
        return {"key": self.key_Rn, "place": self.place_Rn, "value": self.value_Rn}

    def could_enter(self, row_E: Array, key_E: Array) -> Array:
        """Numbers of the entries that are above what their row holds: a few, once rows are full."""
        found: Array = np.flatnonzero(key_E > self.key_Rn.min(1)[row_E])
        return found

    def offer(self, row_e: Array, key_e: Array, place_e: Array, value_e: Array) -> tuple[Array, Array]:
        """Take what belongs among the largest; of equal keys the earlier token. Entries must come in the order of their
        tokens within a row.

        Returns numbers of the entries that were taken, and the place in its row that each got.
        """
        rows, inverse_e = np.unique(row_e, return_inverse=True)
        held = len(rows) * self.n
        row_a = np.concatenate([np.repeat(np.arange(len(rows)), self.n), inverse_e]).astype(np.uint64)
        key_a = np.concatenate([self.key_Rn[rows].reshape(-1), key_e]).astype(np.uint64)
        order = np.argsort((row_a << np.uint64(32)) | (KEY_MOST - key_a), kind="stable")
        row_a = row_a[order]
        rank_a = np.arange(len(order)) - np.searchsorted(row_a, row_a)
        stays = order[rank_a < self.n]
        new = stays[stays >= held]
        gone_h = np.ones(held, dtype=bool)
        gone_h[stays[stays < held]] = False
        freed = np.flatnonzero(gone_h)  # row by row, as many as are new: every row had n or more to choose from
        entry, row, slot = new - held, rows[freed // self.n], freed % self.n
        self.key_Rn[row, slot], self.place_Rn[row, slot], self.value_Rn[row, slot] = (
            key_e[entry],
            place_e[entry],
            value_e[entry],
        )
        return entry, slot
