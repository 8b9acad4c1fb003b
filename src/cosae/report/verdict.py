"""What the paired intervals of a run allow one to say, in plain words.

In: a RunRecord. Out: `Claim`s (one paired difference from the baseline each) and the answer that a page begins with.

The answer rests on few intervals, sinks left out: FVE and the median token's FVE for reconstruction, AUROC of one
group of concepts by two rules for concepts, accuracy on labelled texts by the same two. Each is made wider, so that all
hold together with 95 % (Bonferroni); the baseline's is [0, 0]. An arm is ahead of another if their wider intervals do
not overlap in one measure of a kind, and not the other way round in another. The best is among the arms that no other
is ahead of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from cosae.report.format import fixed
from cosae.report.records import SINKS, Probing, RunRecord
from cosae.report.texts import TextProbing

_RULES = {"auroc": "by AUROC", "mean_difference": "by mean difference"}
_KINDS = {"Reconstruction": ("FVE", "median token FVE"), "Concepts": ("AUROC",), "Texts": ("accuracy",)}
"""What the answer ranks arms in → how the measures of it begin."""


@dataclass(frozen=True)
class Claim:
    """One paired difference from the baseline arm, with its 95 % interval and the wider one that is judged by.

    counted  whether the answer rests on it
    level    confidence of the wider interval
    """

    arm: str
    measure: str
    difference: float
    low: float
    high: float
    counted: bool = False
    level: float = 0.95

    @property
    def wider(self) -> tuple[float, float]:
        """The interval at `level`: each half grows as that of a normal distribution."""
        grown = _z(self.level) / _z(0.95)
        return self.difference - grown * (self.difference - self.low), self.difference + grown * (
            self.high - self.difference
        )

    @property
    def verdict(self) -> str:
        """higher, lower, or not told apart."""
        low, high = self.wider
        return "higher" if low > 0 else "lower" if high < 0 else "not told apart"

    @property
    def digits(self) -> int:
        """Decimals that it is shown with."""
        return 4 if "FVE" in self.measure else 3


@dataclass(frozen=True)
class Answer:
    """What a page begins with.

    lines  (reconstruction, concepts, not told apart) and what is said of each
    how    by which intervals
    """

    lines: tuple[tuple[str, str], ...]
    how: str = ""

    def text(self) -> list[str]:
        """As lines for a terminal."""
        return [*(f"{name}: {said}" for name, said in self.lines), *([self.how] if self.how else [])]


def _z(level: float) -> float:
    return NormalDist().inv_cdf(0.5 + level / 2)


def claims(record: RunRecord) -> list[Claim]:
    """Every paired difference that the report shows in its table of differences."""
    found: list[Claim] = []

    def add(arm: str, measure: str, ends: Sequence[float | None], counted: bool) -> None:
        difference, low, high = ends
        if difference is not None and low is not None and high is not None:
            found.append(Claim(arm, measure, difference, low, high, counted))

    for sinks, words in SINKS.items():
        for fve in record.evaluation.paired_fve:
            if fve.sinks == sinks and fve.arm in record.arms:
                add(fve.arm, f"FVE, {words}", (fve.difference, fve.low, fve.high), sinks == "sinks_out")
                ends = (fve.median_token_difference, fve.median_token_low, fve.median_token_high)
                add(fve.arm, f"median token FVE, {words}", ends, sinks == "sinks_out")
    probing = record.probing or Probing()
    for at, group in enumerate(probing.groups):
        for rule, words in _RULES.items():
            for arm in record.arms:
                auroc = probing.difference(arm, rule, group)
                add(arm, f"AUROC, {group}, {words}", (auroc.difference, auroc.low, auroc.high), at == 0)
    texts = record.evaluation.texts or TextProbing()
    for sinks, pooled in SINKS.items():
        for rule, words in _RULES.items():
            for arm in record.arms:
                gap = texts.difference(arm, sinks, f"{rule}/top_1")
                add(arm, f"accuracy on texts, {words}, {pooled}", (gap.mean, gap.low, gap.high), sinks == "sinks_out")
    level = 1 - 0.05 / max(sum(claim.counted for claim in found), 1)
    return [replace(claim, level=level) for claim in found]


def fve_claims(record: RunRecord) -> dict[str, Claim]:
    """The paired difference of FVE with sinks out, by arm."""
    return {claim.arm: claim for claim in claims(record) if claim.measure == "FVE, sinks out"}


def answer(record: RunRecord) -> Answer:
    """Which arm is best in what, and which are not told apart."""
    versus, counted = record.baseline, [claim for claim in claims(record) if claim.counted]
    if len(record.arms) < 2:
        what = "has one arm" if record.arms else "has no arms"
        return Answer((("Nothing to compare", f"this run {what}, so it says nothing about which SAE is better."),))
    if not counted or versus is None:
        said = "this run holds no paired differences, so it says nothing about which arm is better."
        return Answer((("Nothing to compare", said),))
    lines, level = [], []
    for kind, words in _KINDS.items():
        if measured := [claim for claim in counted if claim.measure.startswith(words)]:
            ranking = _Ranking.of(measured, versus)
            lines.append((kind, f"{ranking.best_words()}."))
            level += [f"in {kind.lower()}, {said}" for said in ranking.level_words()]
        elif kind != "Texts" and not (kind == "Concepts" and record.evaluation.texts):
            lines.append((kind, "not measured."))
    lines.append(("Not told apart", "; ".join(level) + "." if level else "none of the best arms."))
    return Answer(tuple(lines), _how(counted, versus))


@dataclass(frozen=True)
class _Ranking:
    """The arms by measures of one kind: ends[measure][arm], the baseline's [0, 0]."""

    versus: str
    ends: Mapping[str, Mapping[str, tuple[float, float]]]
    claims: Sequence[Claim]

    @classmethod
    def of(cls, claims: Sequence[Claim], versus: str) -> _Ranking:
        ends: dict[str, dict[str, tuple[float, float]]] = {}
        for claim in claims:
            ends.setdefault(claim.measure, {versus: (0.0, 0.0)})[claim.arm] = claim.wider
        return cls(versus, ends, claims)

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(arm for by_arm in self.ends.values() for arm in by_arm))

    def _higher(self, one: str, other: str) -> list[str]:
        """The measures by which one arm is higher than another."""
        both = {m: by_arm for m, by_arm in self.ends.items() if one in by_arm and other in by_arm}
        return [measure for measure, by_arm in both.items() if by_arm[one][0] > by_arm[other][1]]

    def ahead(self, one: str, other: str) -> bool:
        return bool(self._higher(one, other)) and not self._higher(other, one)

    def level(self, one: str, other: str) -> bool:
        return not self._higher(one, other) and not self._higher(other, one)

    @property
    def best(self) -> list[str]:
        return [one for one in self.arms if not any(self.ahead(other, one) for other in self.arms)]

    def best_words(self) -> str:
        best = self.best
        if len(best) == len(self.arms) and all(self.level(one, other) for one in best for other in best):
            return "no arm is told apart from another"
        if len(best) == 1:
            return f"{best[0]} is best{self._by_how_much(best[0])}"
        if not all(self.level(one, other) for one in best for other in best):
            top = {m: [a for a in best if not any(m in self._higher(o, a) for o in best)] for m in self.ends}
            return "the measures disagree: " + "; ".join(f"{_or(arms)} by {_short(m)}" for m, arms in top.items())
        return f"the best is {_or(best)}"

    def _by_how_much(self, arm: str) -> str:
        """Differences from the baseline that are told from 0, with their wider intervals."""
        said = []
        for claim in self.claims:
            if claim.arm == arm and claim.verdict != "not told apart":
                middle, low, high = (fixed(v, claim.digits - 1, True) for v in (claim.difference, *claim.wider))
                said.append(f"{_short(claim.measure)} {middle} [{low}, {high}]")
        return f" ({'; '.join(said)} against {self.versus})" if said else ""

    def level_words(self) -> list[str]:
        """The best arms where they are several, and which others are not told apart from the baseline."""
        best, said = self.best, []
        if len(best) > 1 and all(self.level(one, other) for one in best for other in best):
            every = len(best) == len(self.arms)
            said = [("both arms" if len(best) == 2 else f"all {len(best)} arms") if every else _and(best)]
        others = [arm for arm in self.arms if arm not in best and arm != self.versus and self.level(arm, self.versus)]
        return said + ([f"{_and(others)} from {self.versus}"] if others else [])


def _how(counted: Sequence[Claim], versus: str) -> str:
    n, level = len(counted), counted[0].level
    of = "; ".join(dict.fromkeys(_short(claim.measure) for claim in counted))
    wider = f", each widened from 95 % to {100 * level:.2f} % so that all hold together with 95 % (Bonferroni)"
    return (
        f"By {n} paired interval{'s' if n > 1 else ''} against {versus}, sinks left out ({of})"
        f"{wider if n > 1 else ''}. "
        "They say what other texts would change, not what another seed would."
    )


def _short(measure: str) -> str:
    return measure.removesuffix(", sinks out")


def _and(words: Sequence[str], last: str = "and") -> str:
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else words[0]


def _or(words: Sequence[str]) -> str:
    return _and(words, "or")
