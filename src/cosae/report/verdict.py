"""What the paired intervals of a run allow one to say, in plain words.

In: a RunRecord. Out: `Claim`s (one paired difference each) and sentences. An interval that includes 0 is said to
include 0; when all do, the sentence is that the arms cannot be told apart, and nothing is singled out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cosae.report.records import SINKS, Probing, RunRecord

_RULES = {"auroc": "by AUROC", "mean_difference": "by mean difference"}
_WORDS = {"higher": "higher", "lower": "lower", "includes 0": "not told apart"}


@dataclass(frozen=True)
class Claim:
    """One paired difference from the baseline arm, with its 95 % interval."""

    arm: str
    measure: str
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """higher, lower, or includes 0."""
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "includes 0"

    @property
    def digits(self) -> int:
        """Decimals that it is shown with."""
        return 4 if "FVE" in self.measure else 3


def claims(record: RunRecord) -> list[Claim]:
    """Every paired difference that the report shows in its table of differences."""
    rows: list[tuple[str, str, float | None, float | None, float | None]] = []
    for sinks, words in SINKS.items():
        for fve in record.evaluation.paired_fve:
            if fve.sinks == sinks:
                rows.append((fve.arm, f"FVE, {words}", fve.difference, fve.low, fve.high))
                ends = (fve.median_token_difference, fve.median_token_low, fve.median_token_high)
                rows.append((fve.arm, f"median token FVE, {words}", *ends))
    probing = record.probing or Probing()
    for group in probing.groups:
        for rule, words in _RULES.items():
            for arm in record.arms:
                auroc = probing.difference(arm, rule, group)
                rows.append((arm, f"AUROC, {group}, {words}", auroc.difference, auroc.low, auroc.high))
    return [
        Claim(arm, measure, difference, low, high)
        for arm, measure, difference, low, high in rows
        if difference is not None and low is not None and high is not None
    ]


def fve_claims(record: RunRecord) -> dict[str, Claim]:
    """The paired difference of FVE with sinks out, by arm."""
    return {claim.arm: claim for claim in claims(record) if claim.measure == "FVE, sinks out"}


def verdict(record: RunRecord) -> str:
    """One or two sentences on whether the arms can be told apart."""
    found, versus = claims(record), record.baseline
    if not found:
        return "There are no paired differences in this run, so nothing is said here about which arm is better."
    apart = sum(claim.verdict != "includes 0" for claim in found)
    if not apart:
        said = f"All {len(found)} paired 95 % intervals against {versus} include 0"
        return f"{said}: on these activations, by these measures, the arms cannot be told apart."
    said, by_chance = f"{apart} of {len(found)} paired 95 % intervals against {versus} exclude 0", len(found) / 20
    said += f"; if no arm differed at all, about {by_chance:.0f} would by chance" if by_chance >= 0.95 else ""
    return f"{said}."


def by_measure(found: Sequence[Claim]) -> list[str]:
    """For each measure, which arms are higher, which lower, and which cannot be told from the baseline."""
    sentences, undecided = [], []
    for measure in dict.fromkeys(claim.measure for claim in found):
        here = [claim for claim in found if claim.measure == measure]
        groups = {verdict: [claim.arm for claim in here if claim.verdict == verdict] for verdict in _WORDS}
        if len(groups["includes 0"]) == len(here):
            undecided.append(measure)
            continue
        named = {v: "every other arm" if len(a) == len(here) > 1 else ", ".join(a) for v, a in groups.items() if a}
        listed = [f"{_WORDS[verdict]}: {arms}" for verdict, arms in named.items()]
        sentences.append(f"{measure}: {'; '.join(listed)}.")
    if undecided and sentences:
        sentences.append(f"No arm can be told from the baseline in: {'; '.join(undecided)}.")
    return sentences
