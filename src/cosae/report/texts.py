"""What a report shows of labelled texts that were probed, and of the tokens that are sinks: records of evaluation.json.

Fields are called as in the file, which holds more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference, with its 95 % interval."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference:
    """A paired difference of an arm from `versus`, with its interval."""

    arm: str = ""
    versus: str | None = None
    metric: str = ""
    difference: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.difference, self.low, self.high)


@dataclass(frozen=True)
class SinkNumbers:
    """One SAE on the sinks of the held-out tokens."""

    n_sinks: int | None = None
    large: int | None = None
    large_at_0: int | None = None
    l0_at_0: float | None = None
    l0_on: float | None = None
    l0_off: float | None = None
    features_on: int | None = None
    firing_frac: float | None = None
    error_frac: float | None = None


@dataclass(frozen=True)
class LabelledSet:
    name: str = ""
    texts: int | None = None
    encoded: int | None = None
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextDifference(Difference):
    """From `versus`; without `versus` and `sinks`, of an arm's sinks out from its sinks in."""

    sinks: str = ""
    reading: str = ""


@dataclass(frozen=True)
class Over:
    """What intervals were drawn over."""

    over: str | None = None


@dataclass(frozen=True)
class TextProbing:
    """Probing of classes of texts; `summary` is by sinks, arm or reference, reading ("auroc/top_1") and metric."""

    sets: tuple[LabelledSet, ...] = ()
    arms: tuple[str, ...] = ()
    baseline: str | None = None
    interval: Over = field(default_factory=Over)
    summary: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Estimate]]]] = field(default_factory=dict)
    paired: tuple[TextDifference, ...] = ()
    masked: tuple[TextDifference, ...] = ()

    def accuracy(self, sinks: str, name: str, reading: str) -> Estimate:
        """Mean accuracy of an arm or reference; empty where it is not there."""
        return self.summary.get(sinks, {}).get(name, {}).get(reading, {}).get("accuracy", Estimate())

    def difference(self, arm: str, sinks: str, reading: str) -> Estimate:
        """In accuracy, of an arm from the baseline arm; empty for the baseline itself."""
        return _first(self.paired, (arm, sinks, reading))

    def masking(self, arm: str, reading: str) -> Estimate:
        """In accuracy, what leaving the sinks out of the pool does to an arm."""
        return _first(self.masked, (arm, "", reading))


def _first(rows: tuple[TextDifference, ...], wanted: tuple[str, str, str]) -> Estimate:
    found = (r for r in rows if (r.arm, r.sinks, r.reading) == wanted and r.metric == "accuracy")
    return next(found, TextDifference()).estimate
