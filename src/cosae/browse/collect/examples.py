"""Which tokens stand for each feature: the largest, a sample of all firings, and samples by size, in bounded memory.

What an interval of 0 … the largest |value| is, is known only at the end. So beside one reservoir of all firings there
is one for each half octave of |value|, of the eight half octaves up to the largest so far (what is below them is left
to the first): an interval at the end is a few of these, and

    an entry of any of them is in a uniform sample of the interval if its key is above τ, the largest of the keys that
    the full ones among them have turned away

since a reservoir holds every entry of its own with a larger key than that. Where fewer than wanted are above τ, entries
below it fill up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosae.browse.collect.kept import Kept, random_key, value_key

Array = NDArray[Any]
TOP, RANDOM, NEGATIVE, PER_BIN, BINS, BIN_OCTAVES = 20, 20, 10, 8, 8, 0.5
INTERVALS, PER_INTERVAL, SHOWN_RANDOM = 5, 5, 10
NOWHERE = np.iinfo(np.int32).min


class Examples:
    """Places kept for each of F features. SLOTS: places a feature, in one numbering over all groups."""

    def __init__(self, n_features: int, signed: bool, seed: int) -> None:
        self.n_features, self.seed = n_features, seed
        self.top, self.random = Kept(n_features, TOP), Kept(n_features, RANDOM)
        self.bins = Kept(n_features * BINS, PER_BIN)
        self.bin_R = np.full(n_features * BINS, NOWHERE, np.int32)
        self.negative = Kept(n_features, NEGATIVE) if signed else None
        self.slots = TOP + RANDOM + BINS * PER_BIN + (NEGATIVE if signed else 0)

    def arrays(self) -> dict[str, Array]:
        """What a checkpoint keeps, by name."""
        groups = {"top": self.top, "random": self.random, "bins": self.bins}
        groups |= {} if self.negative is None else {"negative": self.negative}
        found = {f"{name}_{part}": value for name, kept in groups.items() for part, value in kept.arrays().items()}
        return {**found, "bin": self.bin_R}

    def offer(self, feature_E: Array, place_E: Array, sequence_E: Array, value_E: Array) -> tuple[Array, Array]:
        """Entries of a chunk by feature, tokens ascending within one: numbers of those that were taken, and for each
        the slot that it got. An entry may be taken by several groups."""
        size_E = np.abs(value_E)
        found = [self._offer_top(self.top, feature_E, sequence_E, value_key(size_E), place_E, value_E)]
        key_E = random_key(feature_E, place_E, self.seed)
        some = self.random.could_enter(feature_E, key_E)
        entry, slot = self.random.offer(feature_E[some], key_E[some], place_E[some], value_E[some])
        found.append((some[entry], slot + TOP))
        found.append(self._offer_bins(feature_E, key_E, place_E, value_E, size_E))
        if self.negative is not None:
            key_E = np.where(value_E < 0, value_key(size_E), np.uint32(0))
            entry, slot = self._offer_top(self.negative, feature_E, sequence_E, key_E, place_E, value_E)
            found.append((entry, slot + TOP + RANDOM + BINS * PER_BIN))
        entries, slots = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return entries, slots

    def _offer_top(
        self, kept: Kept, feature_E: Array, sequence_E: Array, key_E: Array, place_E: Array, value_E: Array
    ) -> tuple[Array, Array]:
        """The largest, each of another sequence: a sequence lies in one chunk, whose largest stands for it."""
        some = kept.could_enter(feature_E, key_E)
        order = some[np.lexsort((place_E[some], ~key_E[some], sequence_E[some], feature_E[some]))]
        first = np.ones(len(order), dtype=bool)
        first[1:] = (feature_E[order[1:]] != feature_E[order[:-1]]) | (sequence_E[order[1:]] != sequence_E[order[:-1]])
        some = order[first]
        entry, slot = kept.offer(feature_E[some], key_E[some], place_E[some], value_E[some])
        return some[entry], slot

    def _offer_bins(
        self, feature_E: Array, key_E: Array, place_E: Array, value_E: Array, size_E: Array
    ) -> tuple[Array, Array]:
        bin_E = np.floor(np.log2(size_E) / BIN_OCTAVES).astype(np.int32)
        row_E = feature_E * BINS + bin_E % BINS
        highest_R = self.bin_R.copy()
        np.maximum.at(highest_R, row_E, bin_E)
        risen = np.flatnonzero(highest_R > self.bin_R)  # what they held lies eight half octaves below, or more
        self.bins.key_Rn[risen], self.bins.place_Rn[risen] = 0, -1
        self.bin_R = highest_R
        some = np.flatnonzero((bin_E == self.bin_R[row_E]) & (key_E > self.bins.key_Rn.min(1)[row_E]))
        order = some[np.argsort(row_E[some], kind="stable")]
        entry, slot = self.bins.offer(row_E[order], key_E[order], place_E[order], value_E[order])
        taken = order[entry]
        return taken, TOP + RANDOM + (bin_E[taken] % BINS) * PER_BIN + slot


@dataclass(frozen=True)
class Choice:
    """Examples to be shown, (n,) each: features ascending, groups in the order of GROUPS, then as a page shows them."""

    feature_n: Array
    group_n: Array
    interval_n: Array
    slot_n: Array
    place_n: Array


def choose(found: Examples, features: range, sequence_of: Callable[[Array], Array]) -> Choice:
    """Of a few features. sequence_of: (…) places → their sequences, of which an interval shows each once."""
    rows = slice(features.start, features.stop)
    parts = [_first(0, _of(found.top, rows), 0, TOP), *_intervals(found, rows, sequence_of)]
    parts.append(_first(2, _of(found.random, rows), TOP, SHOWN_RANDOM))
    if found.negative is not None:
        parts.append(_first(3, _of(found.negative, rows), TOP + RANDOM + BINS * PER_BIN, NEGATIVE))
    row_n, group_n, interval_n, slot_n, place_n = (np.concatenate(one) for one in zip(*parts, strict=True))
    order = np.argsort(row_n, kind="stable")
    feature_n = row_n[order] + features.start
    return Choice(feature_n, group_n[order], interval_n[order], slot_n[order], place_n[order])


Part = tuple[Array, Array, Array, Array, Array]
Held = tuple[Array, Array, Array]


def _of(kept: Kept, rows: slice) -> Held:
    return kept.key_Rn[rows].astype(np.int64), kept.place_Rn[rows], kept.value_Rn[rows]


def _first(group: int, held: Held, base: int, n: int) -> Part:
    """The n largest keys of each row."""
    key_fn, place_fn, _ = held
    order_fn = np.lexsort((place_fn, -key_fn), axis=1)[:, :n]
    return _part(group, -1, order_fn, place_fn, base)


def _part(
    group: int, interval: int, column_fn: Array, place_fM: Array, base: int, keep_fn: Array | None = None
) -> Part:
    place_fn = np.take_along_axis(place_fM, column_fn, 1)
    row_n, at_n = np.nonzero((place_fn >= 0) if keep_fn is None else keep_fn)
    same = np.ones(len(row_n), np.int8)
    return row_n, group * same, interval * same, column_fn[row_n, at_n] + base, place_fn[row_n, at_n]


def _intervals(found: Examples, rows: slice, sequence_of: Callable[[Array], Array]) -> Iterator[Part]:
    """A sample of each interval, the highest first. Columns of the candidates are slots − TOP: reservoir, then bins."""
    n = rows.stop - rows.start
    bins = slice(rows.start * BINS, rows.stop * BINS)
    in_bins = [one.reshape(n, -1) for one in _of(found.bins, bins)]
    key_fM, place_fM, value_fM = (
        np.concatenate(pair, 1) for pair in zip(_of(found.random, rows), in_bins, strict=True)
    )
    size_fM = np.abs(value_fM).astype(np.float64)
    largest_f = np.abs(found.top.value_Rn[rows]).max(1).astype(np.float64)
    free_fM = place_fM >= 0
    free_fM[:, :RANDOM] &= ~(place_fM[:, :RANDOM, None] == in_bins[1][:, None]).any(2)  # held twice
    free_fM &= ~(place_fM[:, :, None] == found.top.place_Rn[rows][:, None]).any(2)  # shown already
    sequence_fM = sequence_of(place_fM)
    bin_fB = found.bin_R[bins].reshape(n, BINS).astype(np.float64)
    turned_fB = found.bins.key_Rn[bins].min(1).reshape(n, BINS).astype(np.int64)
    for interval in reversed(range(INTERVALS)):
        low_f, high_f = (largest_f * (interval + end) / INTERVALS for end in (0, 1))
        met_fB = (2.0 ** ((bin_fB + 1) * BIN_OCTAVES) > low_f[:, None]) & (
            2.0 ** (bin_fB * BIN_OCTAVES) <= high_f[:, None]
        )
        tau_f = np.where(met_fB, turned_fB, 0).max(1)
        if interval == 0:  # reaches below the lowest bin
            tau_f = np.maximum(tau_f, found.random.key_Rn[rows].min(1).astype(np.int64))
        inside_fM = free_fM & (size_fM > low_f[:, None]) & (size_fM <= high_f[:, None])
        above_fM = key_fM >= tau_f[:, None]
        order_fM = np.lexsort((-key_fM, ~above_fM, ~inside_fM), axis=1)
        inside_fM, sequence = (np.take_along_axis(one, order_fM, 1) for one in (inside_fM, sequence_fM))
        again_fM = (np.tril(sequence[:, :, None] == sequence[:, None], -1) & inside_fM[:, None]).any(2)
        inside_fM &= ~again_fM
        inside_fM &= np.cumsum(inside_fM, 1) <= PER_INTERVAL
        yield _part(1, interval, order_fM, place_fM, TOP, inside_fM)
