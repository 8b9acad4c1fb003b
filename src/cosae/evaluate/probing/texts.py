"""Probing of whole texts: do a few features tell a class of texts from the others? (paper §6)

In: labelled sets, drawn here, encoded and pooled (`probing.encode_texts`), with sinks in and out. Out: plain numbers.

One class against the others, as many negatives as positives, split into train and test by seed: `draw`, which reads
labels alone, so that only texts of a question are encoded. On train, features are ranked by each rule
(`probing.ranking`); a logistic regression on the first 1, 2 and 5, and one on all ("full"), is scored on test texts by
accuracy and AUROC.

    auroc                    |AUROC − ½|: a feature may speak against a class here, the regression turns it
    mean_difference          |mean₊ − mean₋| of raw pooled codes: the paper's and SAEBench's rule
    standardised_difference  the same over the feature's standard deviation

Unlike in SAEBench, features are standardised on train before the regression, so that their size matters in the choice
alone; "full" is the same regression, fitted once, not the best test epoch of a longer training.

Floors: the text's mean norm, its length, its best single dimension of pooled x. Ceilings: all of pooled x, the bag of
its tokens. Intervals draw sets and seeds (a seed draws texts and, where an arm has several SAEs, takes the next one).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cosae.activations.sample import SINKS
from cosae.errors import CosaeError
from cosae.evaluate.probing.logistic import scores
from cosae.evaluate.probing.ranking import (
    EVERY_RULE,
    Labels,
    Rule,
    auroc_of_dimensions,
    qualities_of_latents,
    rank_quality,
)
from cosae.evaluate.statistics import RESAMPLES, Array, crossed_draws, crossed_interval
from cosae.io.progress import SILENT, Progress
from cosae.types import Codes

TOPS = (1, 2, 5)
METRICS = ("accuracy", "auroc")
FLOORS = ("norm", "length", "best_dimension")
CEILINGS = ("logistic", "bag_of_tokens")
MIN_TEXTS = 20
"""Texts of a class, and others, that train needs."""
LEAST_TEXTS = 50
"""Texts of a question, both kinds and both sides, that leave train so many."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class PooledSet:
    """One labelled set, encoded and pooled. S texts; the mappings' first key is sinks_in or sinks_out.

    class_S   (S,) int64 index into classes
    splits    (class, seed) → the texts of a question, among the S; none: `draw` makes them of all S
    n_texts   texts of the whole set, where S are those that were drawn
    l0        arm → features that fire per token of the texts
    codes     arm → one Codes of S rows for each SAE of the arm
    dense     "norm" (S, 1), "length" (S, 1) and "x" (S, D): mean |x|, tokens counted, pooled x
    tokens_SV (S, V) sparse: how often each token id stands in the text
    """

    name: str
    classes: tuple[str, ...]
    class_S: Rows
    codes: Mapping[str, Mapping[str, Sequence[Codes]]]
    dense: Mapping[str, Mapping[str, NDArray[Any]]]
    tokens_SV: Any = None
    splits: Mapping[tuple[int, int], Split] | None = None
    n_texts: int | None = None
    l0: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """Texts of one question, ascending: train_R, test_R and whether each is of the class."""

    train_R: Rows
    test_R: Rows
    train_label: Labels
    test_label: Labels

    @property
    def rows(self) -> Rows:
        """All its texts."""
        return np.concatenate([self.train_R, self.test_R])

    def among(self, rows_S: Rows) -> Split:
        """The same question to the texts that are among rows_S (ascending), numbered as they stand there."""
        train, test = np.isin(self.train_R, rows_S), np.isin(self.test_R, rows_S)
        train_R, test_R = np.searchsorted(rows_S, self.train_R[train]), np.searchsorted(rows_S, self.test_R[test])
        return Split(train_R, test_R, self.train_label[train], self.test_label[test])


def draw(
    name: str,
    classes: Sequence[str],
    class_S: Rows,
    seeds: int,
    max_texts: int,
    usable_S: Labels | None = None,
    max_classes: int | None = None,
) -> dict[tuple[int, int], Split]:
    """(class, seed) → the texts of each question that can be asked of a labelled set: of two classes about the second
    alone, the first being its mirror image. usable_S: texts that may be drawn; max_classes: of more, those with most.

    Raises CosaeError where there is no class with 20 train texts and as many others.
    """
    row_U = np.flatnonzero(np.ones(len(class_S), dtype=bool) if usable_S is None else usable_S)
    by_size = np.argsort(-np.bincount(class_S[row_U], minlength=len(classes)), kind="stable")
    candidates = [1] if len(classes) == 2 else sorted(by_size[:max_classes].tolist())
    drawn = {(c, s): split_of(class_S[row_U], c, s, max_texts) for c in candidates for s in range(seeds)}
    found = {
        key: Split(row_U[split.train_R], row_U[split.test_R], split.train_label, split.test_label)
        for key, split in drawn.items()
        if split is not None
    }
    if not found:
        count_C = np.bincount(class_S[row_U], minlength=len(classes)).tolist()
        raise CosaeError(
            f"{name} has no class with {MIN_TEXTS} train texts and as many others, a fifth being kept for test: a "
            f"class and its others need {LEAST_TEXTS // 2} texts each. Got {count_C} texts of its classes and "
            f"max_texts {max_texts}: give more."
        )
    return found


def split_of(class_S: Rows, wanted: int, seed: int, max_texts: int = 2000, test_frac: float = 0.2) -> Split | None:
    """As many texts of the class as of the others, at most max_texts in all, a fifth of each kind for test.

    A function of its arguments alone. None where train would have fewer than 20 of either kind.
    """
    rng = np.random.default_rng([seed, wanted])
    kinds = [rng.permutation(np.flatnonzero((class_S == wanted) == side)) for side in (True, False)]
    n = min(*map(len, kinds), max_texts // 2)
    n_test = max(1, round(test_frac * n))
    if n - n_test < MIN_TEXTS:
        return None
    sides = []
    for part in (slice(0, n - n_test), slice(n - n_test, n)):
        rows_R = np.sort(np.concatenate([kind[part] for kind in kinds]))
        sides.append((rows_R, class_S[rows_R] == wanted))
    return Split(sides[0][0], sides[1][0], sides[0][1], sides[1][1])


def probe_texts(
    sets: Sequence[PooledSet],
    *,
    baseline: str | None = None,
    tops: Sequence[int] = TOPS,
    rules: Sequence[Rule] = EVERY_RULE,
    full: bool = True,
    seeds: int = 3,
    max_texts: int = 2000,
    seed: int = 0,
    n_resamples: int = RESAMPLES,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Every arm of the sets, with sinks in and out, by each rule; what it returns is ready for JSON.

    baseline   the arm that others are compared with; the first by default
    seeds      splits drawn, and SAEs of an arm taken in turn: split s reads SAE s mod their number
    max_texts  texts of one question, train and test together
    progress   told of each question answered

    Returns sets (name, texts, those encoded, the classes probed), arms, seeds;
    values[sinks][arm][reading][metric]: (sets × seeds), means over classes, a reading being "RULE/top_K", or "full",
    or "floor" / "ceiling" of what is no SAE;
    summary[sinks][arm][reading][metric]: mean, low, high; paired: rows of arm, versus, sinks, reading, metric,
    difference, low, high; masked: rows of arm, reading, metric and the same, of sinks out minus sinks in;
    latents[sinks][arm][rule][set][class]: the first ones chosen, by the first seed;
    interval: what was drawn.

    Raises CosaeError for no sets, arms that differ between them, an unknown baseline, and a set without a class of 20
    train texts and 20 others.
    """
    arms = _check(sets, baseline, tops, seeds)
    baseline = arms[0] if baseline is None else baseline
    values: dict[str, Any] = {sinks: {} for sinks in SINKS}
    latents: dict[str, Any] = {sinks: {arm: {rule: {} for rule in rules} for arm in arms} for sinks in SINKS}
    described = []
    questions = [one.splits or draw(one.name, one.classes, one.class_S, seeds, max_texts) for one in sets]
    for d, (one, splits) in enumerate(zip(sets, questions, strict=True)):
        probed = list(dict.fromkeys(c for c, _ in splits))
        for s in progress.each(range(seeds), f"probing texts of {one.name}", "splits"):
            found, chosen = _scores(one, {c: splits[c, s] for c in probed}, arms, rules, tops, full, s)
            for (sinks, name, reading), means in found.items():
                by_metric = values[sinks].setdefault(name, {}).setdefault(reading, {})
                for metric, value in zip(METRICS, means, strict=True):
                    by_metric.setdefault(metric, [[None] * seeds for _ in sets])[d][s] = value
            for (sinks, arm, kind, rule), feature_K in chosen.items() if s == 0 else ():
                latents[sinks][arm][rule].setdefault(one.name, {})[kind] = feature_K.tolist()
        n_texts = len(one.class_S) if one.n_texts is None else one.n_texts
        named = [one.classes[c] for c in probed]
        known = {"name": one.name, "texts": n_texts, "encoded": len(one.class_S), "classes": named}
        described.append({**known, "l0": {name: dict(by) for name, by in one.l0.items()}})
    drawn = crossed_draws(len(sets), seeds, seed, n_resamples)
    over = " and ".join(word for word, n in (("sets", len(sets)), ("seeds", seeds)) if n > 1) or None
    how = "bootstrap" if len(sets) > 1 else "Student's t" if seeds > 1 else None
    resampled = {"sets": len(sets), "seeds": seeds, "seed": seed, "resamples": n_resamples}
    summary: dict[str, Any] = {sinks: {} for sinks in SINKS}
    paired, masked = [], []
    names = [(sinks, arm, reading) for sinks in SINKS for arm in values[sinks] for reading in values[sinks][arm]]
    for (sinks, arm, reading), metric in product(names, METRICS):
        value_DS = np.array(values[sinks][arm][reading][metric])
        summary[sinks].setdefault(arm, {}).setdefault(reading, {})[metric] = _interval(value_DS, drawn, "mean", 0.0)
        if arm in arms and arm != baseline:
            gap_DS = value_DS - np.array(values[sinks][baseline][reading][metric])
            row = {"arm": arm, "versus": baseline, "sinks": sinks, "reading": reading, "metric": metric}
            paired.append({**row, **_interval(gap_DS, drawn, "difference", -1.0)})
        if arm in arms and sinks == "sinks_out":
            gap_DS = value_DS - np.array(values["sinks_in"][arm][reading][metric])
            row = {"arm": arm, "reading": reading, "metric": metric}
            masked.append({**row, **_interval(gap_DS, drawn, "difference", -1.0)})
    return {
        "sets": described,
        "arms": arms,
        "baseline": baseline,
        "seeds": seeds,
        "interval": {"over": over, "how": how, **resampled},
        "values": values,
        "summary": summary,
        "paired": paired,
        "masked": masked,
        "latents": latents,
    }


def _scores(
    one: PooledSet,
    splits: Mapping[int, Split],
    arms: Sequence[str],
    rules: Sequence[Rule],
    tops: Sequence[int],
    full: bool,
    seed: int,
) -> tuple[dict[tuple[str, str, str], Array], dict[tuple[str, str, str, Rule], Rows]]:
    """(sinks, arm or reference, reading) → accuracy and AUROC, means over the classes; and the features chosen."""
    found: dict[tuple[str, str, str], list[Array]] = {}
    features: dict[tuple[str, str, str, Rule], Rows] = {}
    for (c, split), sinks in product(splits.items(), SINKS):
        for arm in arms:
            codes = one.codes[sinks][arm][seed % len(one.codes[sinks][arm])]
            chosen = choose(codes, split, rules, max(tops))
            features |= {(sinks, arm, one.classes[c], rule): chosen[rule] for rule in rules}
            for reading, x in _readings(codes.to_scipy(), chosen, tops, full):
                found.setdefault((sinks, arm, reading), []).append(_score(x, split))
        for name, reading, x in _references(one, sinks, split):
            found.setdefault((sinks, name, reading), []).append(_score(x, split))
    return {key: np.mean(by_class, axis=0) for key, by_class in found.items()}, features


def _readings(
    code_SF: sparse.csr_matrix, chosen: Mapping[Rule, Rows], tops: Sequence[int], full: bool
) -> Iterator[tuple[str, Any]]:
    """What a regression reads of one arm: the first features of each rule, and all."""
    for rule, feature_K in chosen.items():
        columns_SK = code_SF[:, feature_K].toarray()
        yield from ((f"{rule}/top_{top}", columns_SK[:, :top]) for top in tops)
    if full:
        yield "full", code_SF


def choose(codes: Codes, split: Split, rules: Sequence[Rule], n: int) -> dict[Rule, Rows]:
    """By rule the n features of the largest absolute quality on train texts, best first; the smallest id of equals."""
    keep_S = np.zeros(codes.n_tokens, dtype=bool)
    keep_S[split.train_R] = True
    quality = qualities_of_latents(codes.take(keep_S), split.train_label[:, None], rules)
    size = {rule: np.abs(quality[rule][:, 0] - (0.5 if rule == "auroc" else 0.0)) for rule in rules}
    return {rule: np.argsort(-size_F, kind="stable")[:n] for rule, size_F in size.items()}


def _references(one: PooledSet, sinks: str, split: Split) -> Iterator[tuple[str, str, Any]]:
    """What is no SAE: name, floor or ceiling, features (S, n)."""
    dense = one.dense[sinks]
    area_D = auroc_of_dimensions(dense["x"][split.train_R], split.train_label[:, None])[:, 0]
    best = int(np.abs(area_D - 0.5).argmax())
    yield "norm", "floor", dense["norm"]
    yield "length", "floor", dense["length"]
    yield "best_dimension", "floor", dense["x"][:, best : best + 1]
    yield "logistic", "ceiling", dense["x"]
    if one.tokens_SV is not None:
        yield "bag_of_tokens", "ceiling", one.tokens_SV


def _score(x: Any, split: Split) -> Array:
    """Accuracy at the regression's own threshold, and AUROC, on test texts."""
    train, test = x[split.train_R], x[split.test_R]
    if isinstance(train, np.ndarray):
        train, test = train.astype(np.float64), test.astype(np.float64)
    logit_M1 = scores(train, split.train_label[:, None], test)
    accuracy = float(((logit_M1[:, 0] > 0) == split.test_label).mean())
    return np.array([accuracy, rank_quality(logit_M1, split.test_label[:, None])[0][0]])


def _check(sets: Sequence[PooledSet], baseline: str | None, tops: Sequence[int], seeds: int) -> list[str]:
    if not sets or seeds < 1 or not tops or min(tops) < 1:
        raise CosaeError("probing texts needs a labelled set, a seed and a number of features to take. Got none.")
    names = [one.name for one in sets]
    if len(set(names)) < len(names):
        raise CosaeError(f"labelled sets must have different names. Got {', '.join(names)}.")
    arms = list(sets[0].codes[SINKS[0]])
    taken = set(arms) & {*FLOORS, *CEILINGS}
    if taken:
        raise CosaeError(f"an arm must not have the name of a floor or ceiling. Got {', '.join(taken)}: rename it.")
    if not arms or any(list(one.codes[s]) != arms for one in sets for s in SINKS):
        raise CosaeError("every set must be encoded by the same arms, at least one, with sinks in and out.")
    if baseline is not None and baseline not in arms:
        raise CosaeError(f"baseline must be one of {', '.join(arms)}. Got {baseline!r} instead.")
    return arms


def _interval(value_DS: Array, drawn: Sequence[tuple[Rows, Rows]], name: str, least: float) -> dict[str, float | None]:
    low, high = crossed_interval(value_DS, drawn, (least, 1.0))
    return {name: float(value_DS.mean()), "low": low, "high": high}
