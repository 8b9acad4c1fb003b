"""What is summed up for every feature while tokens pass by: 1.2 KB a feature, whatever their number.

The histogram has 16 bins an octave of |value|, of the 16 octaves up to the largest so far: a ring, in which a bin that
a rise of the largest takes over is emptied into `below`. It is the same however the tokens are cut into chunks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
RING, BINS_OCTAVE = 256, 16
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NOWHERE = np.iinfo(np.int32).min // 2


class Numbers:
    """Sums over counted tokens, (F,) each.

    firings, negatives, vanished, appeared   int64 counts; pair_firings: on the tokens that features are paired on
    size, norm        float64 sums over firings of |value| and of the token's |x|
    pair_sum, pair_square   float64 sums of value and value² over pair tokens
    largest           float32 largest |value|
    quartiles         (F, 4) int64 firings in each quartile of |x|
    ring, top, below  (F, RING) int32 histogram, int32 its highest bin, int64 firings below its lowest
    """

    def __init__(self, n: int) -> None:
        counts = ("firings", "negatives", "vanished", "appeared", "pair_firings", "below")
        self.of: dict[str, Array] = {name: np.zeros(n, np.int64) for name in counts}
        self.of |= {name: np.zeros(n) for name in ("size", "norm", "pair_sum", "pair_square")}
        self.of |= {"largest": np.zeros(n, np.float32), "quartiles": np.zeros((n, 4), np.int64)}
        self.of |= {"ring": np.zeros((n, RING), np.int32), "top": np.full(n, NOWHERE, np.int32)}
        self.n = n
        self.tokens, self.norm_sum = 0, 0.0
        self.quartile_tokens = np.zeros(4, np.int64)

    def add(self, feature_E: Array, value_E: Array, norm_E: Array, quartile_E: Array, pair_E: Array) -> None:
        """Entries of counted tokens, features ascending."""
        of, n = self.of, self.n
        size_E = np.abs(value_E.astype(np.float64))
        of["firings"] += np.bincount(feature_E, minlength=n)
        of["negatives"] += np.bincount(feature_E[value_E < 0], minlength=n)
        of["size"] += np.bincount(feature_E, size_E, n)
        of["norm"] += np.bincount(feature_E, norm_E, n)
        of["quartiles"] += np.bincount(feature_E * 4 + quartile_E, minlength=4 * n).reshape(n, 4)
        in_pair, value_e = feature_E[pair_E], value_E[pair_E].astype(np.float64)
        of["pair_firings"] += np.bincount(in_pair, minlength=n)
        of["pair_sum"] += np.bincount(in_pair, value_e, n)
        of["pair_square"] += np.bincount(in_pair, value_e**2, n)
        if len(feature_E):
            first = np.flatnonzero(np.append(True, feature_E[1:] != feature_E[:-1]))
            largest = np.maximum.reduceat(np.abs(value_E), first)
            of["largest"][feature_E[first]] = np.maximum(of["largest"][feature_E[first]], largest)
            self._count(feature_E, np.floor(np.log2(size_E) * BINS_OCTAVE).astype(np.int32), first)

    def _count(self, feature_E: Array, bin_E: Array, first: Array) -> None:
        ring, top, below = self.of["ring"], self.of["top"], self.of["below"]
        fired, highest = feature_E[first], np.maximum.reduceat(bin_E, first)
        risen = highest > top[fired]
        rows, old, new = fired[risen], top[fired[risen]], highest[risen]
        if len(rows):
            slots = np.arange(RING)
            held, holds = (end[:, None] - (end[:, None] - slots) % RING for end in (old, new))
            moved = np.where(held != holds, ring[rows], 0)
            below[rows] += moved.sum(1)
            ring[rows] -= moved
            top[rows] = new
        deep_E = bin_E <= top[feature_E] - RING
        below += np.bincount(feature_E[deep_E], minlength=self.n)
        flat_E = feature_E[~deep_E] * RING + bin_E[~deep_E] % RING
        np.add.at(ring.reshape(-1), flat_E, np.int32(1))

    def histogram(self) -> Array:
        """(F, RING) with the highest bin last."""
        slot = (self.of["top"][:, None] + 1 + np.arange(RING)) % RING
        counts: Array = np.take_along_axis(self.of["ring"], slot, 1)
        return counts

    def quantiles(self, counts: Array) -> Array:
        """(F, 5) |value| at QUANTILES of the firings, the geometric middle of a bin: to 2.2 %. NaN where none fired."""
        whole = np.cumsum(counts, 1) + self.of["below"][:, None]
        total = whole[:, -1]
        found = np.full((self.n, len(QUANTILES)), np.nan)
        alive = total > 0
        for column, mark in enumerate(QUANTILES):
            at = (whole < np.maximum(np.ceil(mark * total), 1)[:, None]).sum(1)
            middle = 2.0 ** ((self.of["top"] - RING + 1 + at + 0.5) / BINS_OCTAVE)
            found[alive, column] = np.minimum(middle, self.of["largest"])[alive]
        return found
