"""What a report shows of a run: records of run.json, metrics.jsonl, events.jsonl and evaluation.json.

Fields are called as in the files, which hold more. What a file lacks is None or empty here (`lenient`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cosae.report.lenient import Numbers
from cosae.report.texts import Difference, Estimate, SinkNumbers, TextProbing

SINKS = {"sinks_out": "sinks out", "sinks_in": "sinks in"}
"""The two sets of tokens that everything is measured on, in the order of the page."""
RULES = {"auroc": "latent chosen by AUROC", "mean_difference": "latent chosen by mean difference"}
"""The rules of choosing a latent that the figures show."""
BASELINES = {
    "token_identity": "token identity",
    "norm": "norm alone",
    "best_dimension": "best residual dimension",
    "random_sae": "random SAE",
    "logistic": "full logistic probe",
}
"""What concepts are read from instead of a trained SAE; the last is the upper reference."""


@dataclass(frozen=True)
class Arm:
    """One SAE of a run."""

    score: str | None = None
    selector: str | None = None
    frame: str | None = None
    d_sae: float | None = None
    k: float | None = None
    seed: float | None = None
    kernel: str | None = None
    l0_target: float | None = None
    l0_calibrated: float | None = None
    tokens_per_second: float | None = None
    stream_digest: str | None = None
    stopped: str | None = None
    a_moving: bool | None = None
    a_change: float | None = None


@dataclass(frozen=True)
class FilterPolicy:
    kind: str = ""
    factor: float | None = None
    drop_special: bool = False


@dataclass(frozen=True)
class Event:
    """One line of events.jsonl; without an arm it concerns the stream."""

    step: float | None = None
    arm: str | None = None
    text: str = ""


@dataclass(frozen=True)
class Resumed:
    """That a run went on after an interruption, and what it had to pass over."""

    step: float | None = None
    warnings: tuple[str | Event, ...] = ()


@dataclass(frozen=True)
class Run:
    """run.json; `source`, `filter`, `hardware`, `packages` and `recipe` as they stand there."""

    status: str | None = None
    name: str | None = None
    setting: str = ""
    seed: int | None = None
    commit: str | None = None
    started_at: str | None = None
    written_at: str | None = None
    stream_digest: str | None = None
    tokens: int | None = None
    seconds: float | None = None
    sinks: str | Event | None = None
    """What a person should know of the attention sinks among the tokens."""
    warnings: tuple[str | Event, ...] = ()
    resumed: tuple[Resumed, ...] = ()
    norm_summary: Numbers = field(default_factory=Numbers)
    """Norms of the first window of training activations."""
    source: Mapping[str, Any] = field(default_factory=dict)
    filter: Mapping[str, Any] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    packages: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    arms: Mapping[str, Arm] = field(default_factory=dict)


@dataclass(frozen=True)
class ArmMetrics:
    loss: float | None = None
    fve: float | None = None
    l0: float | None = None
    dead_frac: float | None = None
    a: float | None = None
    a_quantiles: tuple[float, ...] = ()


@dataclass(frozen=True)
class Metrics:
    """One line of metrics.jsonl."""

    tokens: float | None = None
    arms: Mapping[str, ArmMetrics] = field(default_factory=dict)


@dataclass(frozen=True)
class Histogram:
    edges: tuple[float, ...] = ()
    counts: tuple[float, ...] = ()
    sink_counts: tuple[float, ...] = ()


@dataclass(frozen=True)
class NormByToken:
    """How much of the variance of the log-norm the token's id predicts."""

    r2: float | None = None
    folds: float | None = None
    split_by: str = "document"


@dataclass(frozen=True)
class Norms:
    median: float | None = None
    cv: float | None = None
    largest_over_median: float | None = None
    position_0_over_median: float | None = None
    sinks_out: Numbers = field(default_factory=Numbers)
    filter: Numbers = field(default_factory=Numbers)
    """The held-out tokens that the training filter would remove."""
    log_norm_by_token: NormByToken = field(default_factory=NormByToken)
    histogram: Histogram = field(default_factory=Histogram)


@dataclass(frozen=True)
class Reconstruction:
    fve: float | None = None
    median_token_fve: float | None = None
    l0: float | None = None
    dead_frac: float | None = None
    by_norm_quartile: tuple[Numbers, ...] = ()

    @property
    def l0_ratio(self) -> float | None:
        """L0 of the quartile of the largest norms over that of the smallest."""
        l0 = [quartile.l0 for quartile in self.by_norm_quartile] or [None]
        return l0[-1] / l0[0] if l0[0] and l0[-1] is not None else None


@dataclass(frozen=True)
class ReconstructionBySinks:
    sinks_out: Reconstruction = field(default_factory=Reconstruction)
    sinks_in: Reconstruction = field(default_factory=Reconstruction)


@dataclass(frozen=True)
class PairedFVE:
    """Differences of an arm from the arm `versus` on the same documents, with 95 % intervals."""

    arm: str = ""
    versus: str | None = None
    sinks: str = ""
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    median_token_difference: float | None = None
    median_token_low: float | None = None
    median_token_high: float | None = None


@dataclass(frozen=True)
class Exponent:
    """An arm's exponent a after training, and the mean of its value exponents where it has them."""

    kind: str = ""
    mean: float | None = None
    value: float | None = None
    value_exponent: float | None = None
    quantiles: tuple[float, ...] = ()
    histogram: Histogram = field(default_factory=Histogram)

    @property
    def at_end(self) -> float | None:
        return self.value if self.mean is None else self.mean


@dataclass(frozen=True)
class Concept:
    name: str = ""
    group: str = ""


@dataclass(frozen=True)
class Scores:
    """AUROC of every concept, in the order of `Probing.concepts`."""

    auroc: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class PairedAUROC(Difference):
    """On the same concepts."""

    rule: str = ""
    group: str = ""


@dataclass(frozen=True)
class Probing:
    """Probing of labelled concepts, one latent each; `summary` is by arm or baseline, rule, group and metric."""

    n_train: int | None = None
    n_held_out: int | None = None
    seed: int | None = None
    min_positives: int | None = None
    concepts: tuple[Concept, ...] = ()
    arms: Mapping[str, Mapping[str, Scores]] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, Scores] | Scores] = field(default_factory=dict)
    summary: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Estimate]]]] = field(default_factory=dict)
    paired: tuple[PairedAUROC, ...] = ()

    @property
    def groups(self) -> list[str]:
        """The groups that have concepts: contextual (need context), then lexical (plain from the token)."""
        there = {concept.group for concept in self.concepts}
        return [group for group in ("contextual", "lexical") if group in there]

    def mean(self, name: str, rule: str, group: str, metric: str = "auroc") -> Estimate:
        """Mean over the concepts of a group, of an arm by this rule or of a baseline."""
        by_rule = self.summary.get(name, {})
        # a baseline chooses no latent; a random SAE may have been given either rule
        by_group = by_rule.get(rule) or by_rule.get("baseline") or {}
        return by_group.get(group, {}).get(metric, Estimate())

    def scores(self, name: str, rule: str) -> tuple[float | None, ...]:
        """AUROC of every concept, of an arm by this rule or of a baseline; empty when there is none."""
        found = self.baselines.get(name) if name in BASELINES else self.arms.get(name)
        one = found.get(rule) if isinstance(found, Mapping) else found
        return one.auroc if one is not None else ()

    def difference(self, arm: str, rule: str, group: str) -> PairedAUROC:
        """The paired difference in AUROC of an arm; an empty one when there is none."""
        wanted = (arm, rule, group, "auroc")
        return next((p for p in self.paired if (p.arm, p.rule, p.group, p.metric) == wanted), PairedAUROC())


@dataclass(frozen=True)
class ProbingBySinks:
    sinks_out: Probing | None = None
    sinks_in: Probing | None = None


@dataclass(frozen=True)
class Example:
    """A token on which a feature fires, with text around it."""

    value: float | None = None
    before: str = ""
    token: str = ""
    after: str = ""


@dataclass(frozen=True)
class ShownFeature:
    """One of a few features that the page shows with examples."""

    feature: float | None = None
    density: float | None = None
    largest: float | None = None
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Score:
    """Balanced accuracy of a judge of explanations, with its 95 % interval."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Explanation:
    """What a language model says that a feature fires on, and how well that tells other texts apart."""

    text: str = ""
    model: str = ""
    detection: Score = field(default_factory=Score)
    fuzzing: Score = field(default_factory=Score)


@dataclass(frozen=True)
class Explanations:
    """Of one arm: by feature, and the means over those that were last explained, beside their baselines."""

    features: Mapping[str, Explanation] = field(default_factory=dict)
    means: Mapping[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    tokens: float | None = None
    documents: float | None = None
    norms: Norms = field(default_factory=Norms)
    reconstruction: Mapping[str, ReconstructionBySinks] = field(default_factory=dict)
    paired_fve: tuple[PairedFVE, ...] = ()
    exponents: Mapping[str, Exponent] = field(default_factory=dict)
    probing: ProbingBySinks = field(default_factory=ProbingBySinks)
    recovery: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    sinks: Mapping[str, SinkNumbers] = field(default_factory=dict)
    texts: TextProbing | None = None
    features: Mapping[str, tuple[ShownFeature, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """One run; `evaluated` says whether there is an evaluation.json."""

    path: Path
    run: Run
    metrics: tuple[Metrics, ...] = ()
    events: tuple[Event, ...] = ()
    evaluation: Evaluation = field(default_factory=Evaluation)
    evaluated: bool = False
    explained: Mapping[str, Explanations] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.run.name or self.path.name

    @property
    def title(self) -> str:
        setting = self.run.setting
        return f"{self.name} ({setting})" if setting and setting != self.name else self.name

    @property
    def arms(self) -> Mapping[str, Arm]:
        return self.run.arms

    @property
    def baseline(self) -> str | None:
        """The arm the others are compared with: what the evaluation says, else `standard`, else none."""
        versus = next((row.versus for row in self.evaluation.paired_fve if row.versus), None)
        return versus or ("standard" if "standard" in self.arms else None)

    @property
    def probing(self) -> Probing | None:
        """Probing with sinks left out, which the summary shows."""
        return self.evaluation.probing.sinks_out

    @property
    def warnings(self) -> list[str]:
        """What to know before any number of the run: where it is not whole, and what it says of itself."""
        run, said = self.run, []
        if run.status != "finished":
            said.append(f"This run is not finished (status: {run.status}); the page covers what there is so far.")
        if not self.evaluated:
            said.append("This run has not been evaluated, so there are no held-out numbers.")
        for name, arm in self.arms.items():
            if arm.stopped:
                said.append(
                    f"The arm {name} stopped before the end ({arm.stopped}); its numbers come from its last good state."
                )
            if arm.a_moving:
                far = (
                    "" if arm.a_change is None else f" ({arm.a_change:+.3f} over the last tenth of the steps till then)"
                )
                said.append(
                    f"The exponent of {name} was still moving when the learning rate began to fall{far}: its value is "
                    "where the run stopped, not where it wants to be."
                )
        own = [run.sinks, *run.warnings, *(warning for one in run.resumed for warning in one.warnings)]
        said += [one.text if isinstance(one, Event) else one for one in own if one]
        return [one for one in dict.fromkeys(said) if one]

    @property
    def largest_norm(self) -> float | None:
        """The largest norm over the median: held out, else of the first training window."""
        return self.evaluation.norms.largest_over_median or self.run.norm_summary.max_over_median

    @property
    def removed_frac(self) -> float | None:
        """Share of tokens that the filter removes: held out, else of the first training window."""
        held_out = self.evaluation.norms.filter.removed_frac
        return self.run.norm_summary.filtered_frac if held_out is None else held_out

    def reconstruction(self, arm: str, sinks: str = "sinks_out") -> Reconstruction:
        """The held-out numbers of an arm; empty when it was not measured."""
        found: Reconstruction = getattr(self.evaluation.reconstruction.get(arm, ReconstructionBySinks()), sinks)
        return found

    @property
    def has_sinks(self) -> bool:
        """Whether there are tokens of the norms that the filter of sinks removes."""
        return any(one.large for one in self.evaluation.sinks.values())

    def exponent(self, arm: str) -> Exponent:
        return self.evaluation.exponents.get(arm, Exponent())
