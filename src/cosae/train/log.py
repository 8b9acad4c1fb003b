"""Where a run's numbers go: JSONL always, TensorBoard and W&B when asked, a display where a person looks.

A logger reads numbers and changes nothing: with it or without, weights are bit-identical.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from tqdm.auto import tqdm

from cosae.errors import CosaeError
from cosae.io.lines import Index, Lines
from cosae.io.progress import Progress

TIMING = "timing.jsonl"


class Logger(Protocol):
    """Takes one record per logged step: {"step", "tokens", "seconds", "arms": {name: {metric: number}}}."""

    def log(self, record: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: what was measured, the same to the bit however often the run was interrupted; timing.jsonl beside
    it: {"step", "seconds"}, which no two runs share."""

    def __init__(self, path: Path, resume_step: int = 0, known: Mapping[str, Index] | None = None) -> None:
        known = known or {}
        self.metrics, self.timing = (
            Lines(place, resume_step, known.get(place.name)) for place in (path, path.with_name(TIMING))
        )

    def log(self, record: dict[str, Any]) -> None:
        self.metrics.write({key: value for key, value in record.items() if key != "seconds"})
        self.timing.write({"step": record["step"], "seconds": record["seconds"]})

    def close(self) -> None:
        self.metrics.close()
        self.timing.close()


class TensorBoard:
    """Scalars under ARM/METRIC in the run's folder tensorboard/. Needs the extra `cosae[tensorboard]`.

    start: steps that are done; what was logged of later ones, before an interruption, is no longer shown."""

    def __init__(self, run: Path, start: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise CosaeError(f"TensorBoard is not installed: {_hint('tensorboard')}.") from None
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1 if start else None)

    def log(self, record: dict[str, Any]) -> None:
        for name, metric, value in scalars(record):
            self._writer.add_scalar(f"{name}/{metric}", value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Scalars under ARM/METRIC in a W&B run. Needs the extra `cosae[wandb]`; WANDB_MODE=offline works.

    recipe: nothing of the machine is sent beside it (host, command line, git, what is printed, packages, hardware and
    its load) but what W&B always says of itself: its version, that of Python, and the platform, as linux-x86_64
    name: the run's id within the project; a run of this id that is there already is gone on with.
    arms: the names under which W&B knows them, where those differ"""

    QUIET: ClassVar = {
        "host": "", "console": "off", "save_code": False, "disable_git": True, "disable_job_creation": True,
        "x_disable_meta": True, "x_save_requirements": False, "x_disable_machine_info": True, "x_disable_stats": True,
    }  # fmt: skip

    def __init__(
        self, run: Path, project: str, recipe: dict[str, Any], name: str, arms: Mapping[str, str] | None = None
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise CosaeError(f"W&B is not installed: {_hint('wandb')}.") from None
        self._arms = arms or {}
        try:
            known = {"project": project, "id": name, "resume": "allow", "settings": dict(self.QUIET)}
            self._run = wandb.init(**known, dir=str(run), config=recipe)
        except Exception as error:
            hint = "log in, set WANDB_MODE=offline, or leave it out (`cosae resume --metrics-only`)"
            raise CosaeError(f"W&B could not start ({error}): {hint}.") from None

    def log(self, record: dict[str, Any]) -> None:
        self._run.log({f"{self._arms.get(n, n)}/{m}": v for n, m, v in scalars(record)}, step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _hint(extra: str) -> str:
    return f"pip install 'cosae[{extra}]', or leave it out (`cosae resume --metrics-only`)"


def scalars(record: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(arm, metric, value) of every plain number in a record."""
    return [
        (name, metric, float(value))
        for name, numbers in record["arms"].items()
        for metric, value in numbers.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


class TrainingDisplay:
    """The phase `training`: its bar with a line for each arm on a terminal or in a notebook, plain lines elsewhere."""

    def __init__(self, progress: Progress, config: Any, arms: Sequence[str], start: int = 0) -> None:
        self._progress, self._tokens = progress, config.batch_tokens
        self._width = max((len(name) for name in arms), default=0)
        self._around = progress.phase("training", config.steps, "steps", start)
        rows = progress.watched and (sys.stderr.isatty() or any("notebook" in k.__module__ for k in tqdm.__mro__))
        self._arms, self._n_events = arms if rows else (), 0
        self._lines: dict[str, Any] = {}

    def __enter__(self) -> TrainingDisplay:
        self._phase = self._around.__enter__()
        self._phase.next_line = 0.0  # its first line is that of the first step
        self._lines = {name: tqdm(total=0, bar_format="{desc}", leave=True) for name in self._arms}
        return self

    def __exit__(self, *raised: Any) -> None:
        for line in self._lines.values():
            line.close()
        self._around.__exit__(*raised)

    def step(self) -> None:
        """One more step is done."""
        self._progress.advance()

    def log(self, record: dict[str, Any]) -> None:
        phase = self._phase
        if not self._progress.shown or (phase.bar is None and not self._progress.due(phase)):
            return
        texts = {
            name: f"  {name:<{self._width}}  {describe(numbers)}" if numbers else f"  {name}: stopped"
            for name, numbers in {**dict.fromkeys(self._lines), **record["arms"]}.items()
        }
        rate = "" if phase.rate is None else f"  {phase.rate * self._tokens:,.0f} tokens/s"
        events = f"  {self._n_events} event{'s' if self._n_events > 1 else ''}" if self._n_events else ""
        if phase.bar is not None:
            phase.bar.set_postfix_str(rate + events, refresh=False)
            self._progress.draw(phase)
            for name, line in self._lines.items():
                line.set_description_str(texts[name])
        else:
            head = f"step {record['step']}/{phase.total}{rate}{phase.left}{events}"
            self._progress.note("\n".join([head, *texts.values()]))

    def event(self, event: dict[str, Any]) -> None:
        """Something worth a line: above the bars, and counted beside them."""
        self._n_events += 1
        who = "" if event["arm"] is None else f"{event['arm']}: "
        if event["kind"] != "stopped":  # logged already
            self._progress.note(f"step {event['step']}: {who}{event['text']}")

    def close(self) -> None:
        """Nothing: the phase ends with its block."""


def describe(numbers: dict[str, Any]) -> str:
    """Loss, FVE (without attention sinks too, where they are trained on), L0, dead share and exponents in a line."""
    a, calm = numbers.get("a"), numbers.get("fve_sinks_out")
    fve = f"{numbers['fve']:.3f}" if calm is None else f"{numbers['fve']:.3f} (sinks out {calm:.3f})"
    text = f"loss {numbers['loss']:.4f}  FVE {fve}  L0 {numbers['l0']:5.1f}  dead {100 * numbers['dead_frac']:4.1f} %"
    delta = numbers.get("value_exponent")
    text = text if a is None else f"{text}  a {a:+.3f}"
    return text if delta is None else f"{text}  δ {delta:+.3f}"
