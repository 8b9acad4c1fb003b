"""Balanced accuracy with intervals, and a baseline that asks nobody: which tokens stand in the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from cosae.browse.explain.material import Text
from cosae.browse.store.records import Score
from cosae.evaluate.statistics import Array, percentile_interval

RESAMPLES = 1000


def balanced_accuracy(truth: Sequence[bool], said: Sequence[int | None], seed: int) -> Score:
    """Mean of the shares of positives and of negatives that were told right; None answers are counted as failed and are
    in no share. 95 % bootstrap over the texts of each kind; no value where a kind has none left."""
    told = [(wanted, answer == 1) for wanted, answer in zip(truth, said, strict=True) if answer is not None]
    kinds = [np.array([yes == wanted for wanted, yes in told if wanted is kind]) for kind in (True, False)]
    failed = sum(answer is None for answer in said)
    judged = sum(map(len, kinds))
    if not all(map(len, kinds)):
        return Score(None, None, None, judged, failed)
    rng = np.random.default_rng(seed)
    value_R = sum(rng.binomial(len(right), right.mean(), RESAMPLES) / len(right) for right in kinds) / 2
    low, high = percentile_interval(np.asarray(value_R, np.float64))
    return Score(float(np.mean([right.mean() for right in kinds])), low, high, judged, failed)


def unigram(shown: Sequence[Text], silent: Sequence[Text], judged: Sequence[Text]) -> list[int | None]:
    """1 for texts that hold a token which, in the texts shown and as many silent ones, fires in half of its places."""
    fires: Counter[int] = Counter()
    stands: Counter[int] = Counter()
    for text in shown:
        fires.update(id for id, on in zip(text.ids_W, text.on_W, strict=True) if on)
    for text in (*shown, *silent):
        stands.update(text.ids_W)
    known = {id for id, n in fires.items() if 2 * n >= stands[id]}
    return [int(not known.isdisjoint(text.ids_W)) for text in judged]


def mean_of(scores: Sequence[Score | None], seed: int) -> Score | None:
    """The mean over features that have a value, 95 % bootstrap over features; counts summed. None without a feature."""
    found = [one for one in scores if one is not None]
    value = np.array([one.value for one in found if one.value is not None])
    judged, failed = sum(one.judged for one in found), sum(one.failed for one in found)
    if not len(value):
        return Score(None, None, None, judged, failed) if found else None
    low, high = percentile_interval(_means(value, seed))
    return Score(float(value.mean()), low, high, judged, failed)


def paired(a: Mapping[int, float], b: Mapping[int, float], seed: int) -> dict[str, float | int] | None:
    """b − a over the places that both have: mean and 95 % interval; None below two places."""
    both = sorted(a.keys() & b.keys())
    if len(both) < 2:
        return None
    difference = np.array([b[place] - a[place] for place in both])
    low, high = percentile_interval(_means(difference, seed))
    return {"features": len(both), "difference": float(difference.mean()), "low": low, "high": high}


def _means(value_n: Array, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    means: Array = value_n[rng.integers(0, len(value_n), (RESAMPLES, len(value_n)))].mean(1)
    return means
