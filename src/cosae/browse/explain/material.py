"""Which texts a feature is explained from, and which it is judged on: never of the same sequences.

Explained from: every second of the largest examples, and two of each interval. Judged on, as positives: other examples
of all intervals, the largest and the random ones; as negatives: windows of the sample in which the feature is silent,
drawn at random, where a neighbour fires, and where one of the feature's own tokens stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cosae.browse.store.reader import FeatureStore
from cosae.browse.store.records import Example, Feature

Kind = Literal["positive", "random", "neighbour", "same_token"]
BEFORE = 0.75


@dataclass(frozen=True)
class Text:
    """A stretch of tokens. on_W: where the feature fires, or in a negative the tokens to mark in fuzzing."""

    kind: Kind
    ids_W: tuple[int, ...]
    on_W: tuple[bool, ...]
    sequence: int

    @property
    def positive(self) -> bool:
        return self.kind == "positive"


@dataclass(frozen=True)
class Material:
    """Of one feature. shown: what it is explained from; silent: texts without it, for the unigram baseline alone;
    judged: positives and negatives in an order that a seed decides."""

    shown: tuple[Text, ...]
    silent: tuple[Text, ...]
    judged: tuple[Text, ...]


def material(store: FeatureStore, feature: Feature, n_judged: int, seed: int) -> Material | None:
    """n_judged positives and as many negatives; None where the feature has fewer than two texts for either part.

    A third of the negatives is of each kind; where there are too few of one, random ones stand in.
    """
    rng = np.random.default_rng([seed, feature.row.id])
    shown, left = _split(feature)
    used = {one.sequence for one in shown}
    free = [one for one in left if one.sequence not in used]
    positives = _distinct(_balanced(free), n_judged, set())
    if len(shown) < 2 or len(positives) < 2:
        return None
    used |= {one.sequence for one in positives}
    silent = _Silent(store, feature, used)
    n = len(positives)
    negatives = [*silent.drawn("neighbour", n // 3, rng), *silent.drawn("same_token", n // 3, rng)]
    negatives += silent.drawn("random", n - len(negatives), rng)
    if len(negatives) < 2:
        return None
    judged = [*(_text(one) for one in positives), *negatives]
    order = rng.permutation(len(judged))
    texts = tuple(_text(one) for one in shown)
    return Material(texts, tuple(silent.drawn("random", len(texts), rng)), tuple(judged[i] for i in order))


def _split(feature: Feature) -> tuple[list[Example], list[Example]]:
    """What is shown, and the rest."""
    shown = list(feature.group("top")[::2])
    left = list(feature.group("top")[1::2])
    taken: dict[int | None, int] = {}
    for one in feature.group("interval"):
        taken[one.interval] = taken.get(one.interval, 0) + 1
        (shown if taken[one.interval] <= 2 else left).append(one)
    return shown, [*left, *feature.group("random"), *feature.group("negative")]


def _balanced(examples: Sequence[Example]) -> Iterable[Example]:
    """One of each interval in turn, then of the random and the largest."""
    kinds: dict[object, list[Example]] = {}
    for one in examples:
        kinds.setdefault(one.interval if one.group == "interval" else one.group, []).append(one)
    for place in range(max(map(len, kinds.values()), default=0)):
        for listed in kinds.values():
            yield from listed[place : place + 1]


def _distinct(examples: Iterable[Example], n: int, used: set[int]) -> list[Example]:
    """The first n of different sequences."""
    found: dict[int, Example] = {}
    for one in examples:
        if len(found) < n and one.sequence not in used:
            found.setdefault(one.sequence, one)
    return list(found.values())


def _text(one: Example) -> Text:
    on_W = (one.value_W != 0) & one.counted_W
    return Text("positive", tuple(one.ids_W.tolist()), tuple(on_W.tolist()), one.sequence)


class _Silent:
    """Windows of the sample in which a feature never fires."""

    def __init__(self, store: FeatureStore, feature: Feature, used: set[int]) -> None:
        self._store, self._feature = store, feature
        self._texts = store.texts()
        self._width = store.read.window
        self._used = set(used)
        own, _ = store.codes(feature.sae, feature.row.id)
        self._fires_N = np.zeros(len(self._texts.ids_N), dtype=bool)
        self._fires_N[own] = True
        marks = [sum(one.value_W != 0) for one in feature.group("top")]
        self._marks = max(1, int(np.median(marks))) if marks else 1

    def drawn(self, kind: Kind, n: int, rng: np.random.Generator) -> list[Text]:
        """Up to n of a kind, each of another sequence than all before."""
        found: list[Text] = []
        centres = self._centres(kind)
        for token in rng.permutation(centres)[: 50 * max(n, 1)].tolist():
            if len(found) == n:
                break
            sequence = int(self._texts.sequence_N[token])
            if sequence in self._used:
                continue
            first, end = np.searchsorted(self._texts.sequence_N, [sequence, sequence + 1])
            start = max(min(token - int(self._width * BEFORE), int(end) - self._width), int(first))
            window = slice(start, min(start + self._width, int(end)))
            if self._fires_N[window].any():
                continue
            self._used.add(sequence)
            ids = self._texts.ids_N[window]
            on_W = np.zeros(len(ids), dtype=bool)
            on_W[token - start] = True
            if self._marks > 1 and len(ids) > 1:
                on_W[rng.choice(len(ids), min(self._marks - 1, len(ids)), replace=False)] = True
            found.append(Text(kind, tuple(ids.tolist()), tuple(on_W.tolist()), sequence))
        return found

    def _centres(self, kind: Kind) -> NDArray[np.int64]:
        ids_N, pair_N = self._texts.ids_N, self._texts.pair_N
        if kind == "neighbour":
            near = [one.id for one in (*self._feature.by_cosine[:3], *self._feature.by_cofiring[:3])]
            parts = [self._store.codes(self._feature.sae, id)[0] for id in dict.fromkeys(near)]
            return np.unique(np.concatenate([np.zeros(0, np.int64), *parts])).astype(np.int64)
        if kind == "same_token":
            own = [int(one.ids_W[one.at]) for one in self._feature.examples]
            return np.flatnonzero(np.isin(ids_N, own) & pair_N)
        return np.flatnonzero(pair_N)
