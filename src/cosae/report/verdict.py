"""What the paired intervals of a run allow one to say, in plain words.

In: a RunRecord. Out: `Claim`s (one paired difference each) and sentences. An interval that includes 0 is said to
include 0; when all do, the sentence is that the arms cannot be told apart, and nothing is singled out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cosae.report.probing import groups_of, paired
from cosae.report.records import RunRecord, items, mapping, number

_SHORT = {"auroc": "by AUROC", "mean_difference": "by mean difference"}


@dataclass(frozen=True)
class Claim:
    """One paired difference from the baseline arm, with its 95 % interval."""

    arm: str
    what: str
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """higher, lower, or includes 0."""
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "includes 0"


def claims(record: RunRecord) -> list[Claim]:
    """Every paired difference that the report shows in its table of differences."""
    found: list[Claim | None] = []
    for sinks in ("out", "in"):
        for row in map(mapping, items(record.evaluation.get("paired_fve"))):
            if row.get("sinks") == sinks:
                arm, words = str(row.get("arm")), f"sinks {sinks}"
                found.append(_claim(arm, f"FVE, {words}", row, ("difference", "low", "high")))
                keys = ("median_token_difference", "median_token_low", "median_token_high")
                found.append(_claim(arm, f"median token FVE, {words}", row, keys))
    for group in groups_of(record):
        for rule, words in _SHORT.items():
            for arm in record.arms:
                row = paired(record, arm, rule, group)
                found.append(_claim(arm, f"AUROC, {group}, {words}", row, ("difference", "low", "high")))
    return [claim for claim in found if claim is not None]


def _claim(arm: str, what: str, row: object, keys: tuple[str, str, str]) -> Claim | None:
    difference, low, high = (number(mapping(row).get(key)) for key in keys)
    if difference is None or low is None or high is None:
        return None
    return Claim(arm, what, difference, low, high)


def verdict(record: RunRecord) -> str:
    """One or two sentences on whether the arms can be told apart."""
    found, versus = claims(record), record.baseline
    if not found:
        return "There are no paired differences in this run, so nothing is said here about which arm is better."
    apart = [claim for claim in found if claim.verdict != "includes 0"]
    if not apart:
        return (
            f"All {len(found)} paired 95 % intervals against {versus} include 0: "
            "on these activations, by these measures, the arms cannot be told apart."
        )
    chance = len(found) / 20
    return (
        f"{len(apart)} of {len(found)} paired 95 % intervals against {versus} exclude 0; "
        f"if no arm differed at all, about {chance:.0f} would by chance."
        if chance >= 0.95
        else f"{len(apart)} of {len(found)} paired 95 % intervals against {versus} exclude 0."
    )


def by_measure(found: Sequence[Claim]) -> list[str]:
    """For each measure, which arms are higher, which lower, and which cannot be told from the baseline."""
    sentences = []
    for what in dict.fromkeys(claim.what for claim in found):
        groups = {
            verdict: [c.arm for c in found if c.what == what and c.verdict == verdict]
            for verdict in ("higher", "lower", "includes 0")
        }
        if groups["higher"] or groups["lower"]:
            words = {"higher": "higher", "lower": "lower", "includes 0": "not told apart"}
            every = sum(map(len, groups.values()))
            listed = [
                f"{words[v]}: {'every other arm' if len(arms) == every > 1 else ', '.join(arms)}"
                for v, arms in groups.items()
                if arms
            ]
            sentences.append(f"{what}: {'; '.join(listed)}.")
    undecided = [
        what for what in dict.fromkeys(c.what for c in found) if not any(s.startswith(f"{what}:") for s in sentences)
    ]
    if undecided and sentences:
        sentences.append(f"No arm can be told from the baseline in: {'; '.join(undecided)}.")
    return sentences
