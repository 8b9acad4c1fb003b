"""Where a run's numbers go: JSONL always, TensorBoard and W&B when asked, a progress display where a person looks.

A logger reads numbers and changes nothing: with it or without, weights are bit-identical.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from cosae.errors import CosaeError
from cosae.io.atomic import replaced

TIMING = "timing.jsonl"


class Logger(Protocol):
    """Takes one record per logged step: {"step", "tokens", "seconds", "arms": {name: {metric: number}}}."""

    def log(self, record: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Lines:
    """A file of JSON lines that each hold a "step", flushed one by one.

    Opening it to go on after `resume_step` steps drops the lines after that step, and what a crash tore; a run that
    starts (0) starts an empty file. The file is replaced in one step: a crash while resuming loses no line.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        with self._disk_errors():
            with replaced(path) as staged, staged.open("w", encoding="utf-8") as kept:
                if path.exists() and resume_step > 0:
                    with path.open(encoding="utf-8", errors="replace") as before:
                        kept.writelines(line for line in before if _until(line, resume_step))
            self._file = path.open("a", encoding="utf-8")

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CosaeError(f"{self.path} cannot be written ({error}): make room and resume the run.") from None

    def write(self, record: dict[str, Any]) -> None:
        """One more line; NaN and infinity become null. Raises CosaeError where the disk refuses."""
        with self._disk_errors():
            self._file.write(json.dumps(finite(record), allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """All lines so far survive a power cut: before a checkpoint is written. Raises CosaeError."""
        with self._disk_errors():
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # a full disk was reported when the line was written
            self._file.close()


def _until(line: str, last_step: int) -> bool:
    """Whether a line is complete and of a step up to the last."""
    try:
        return line.endswith("\n") and bool(json.loads(line)["step"] <= last_step)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


class JsonLines:
    """metrics.jsonl: what was measured, the same to the bit however often the run was interrupted; timing.jsonl beside
    it: {"step", "seconds"}, which no two runs share."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self._metrics = Lines(path, resume_step)
        self._timing = Lines(path.with_name(TIMING), resume_step)

    def log(self, record: dict[str, Any]) -> None:
        self._metrics.write({key: value for key, value in record.items() if key != "seconds"})
        self._timing.write({"step": record["step"], "seconds": record["seconds"]})

    def sync(self) -> None:
        """As `Lines.sync`."""
        self._metrics.sync()
        self._timing.sync()

    def close(self) -> None:
        self._metrics.close()
        self._timing.close()


def finite(value: Any) -> Any:
    """The same record with None where a float is NaN or infinite: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


class TensorBoard:
    """Scalars under ARM/METRIC in the run's folder tensorboard/. Needs the extra `cosae[tensorboard]`."""

    def __init__(self, run: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise CosaeError(
                "TensorBoard is not installed: pip install 'cosae[tensorboard]', or leave it out."
            ) from None
        self._writer = SummaryWriter(str(run / "tensorboard"))

    def log(self, record: dict[str, Any]) -> None:
        for name, metric, value in scalars(record):
            self._writer.add_scalar(f"{name}/{metric}", value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Scalars under ARM/METRIC in a W&B run. Needs the extra `cosae[wandb]`; WANDB_MODE=offline works."""

    def __init__(self, run: Path, project: str, recipe: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise CosaeError("W&B is not installed: pip install 'cosae[wandb]', or leave it out.") from None
        try:
            self._run = wandb.init(project=project, name=run.name, dir=str(run), config=recipe)
        except Exception as error:
            raise CosaeError(
                f"W&B could not start ({error}): log in, set WANDB_MODE=offline, or leave it out."
            ) from None

    def log(self, record: dict[str, Any]) -> None:
        self._run.log({f"{n}/{m}": v for n, m, v in scalars(record)}, step=record["step"])

    def close(self) -> None:
        self._run.finish()


def scalars(record: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(arm, metric, value) of every plain number in a record."""
    return [
        (name, metric, float(value))
        for name, numbers in record["arms"].items()
        for metric, value in numbers.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


class Progress:
    """One bar for the run and one line per arm on a terminal; a plain line now and then elsewhere."""

    def __init__(self, steps: int, batch_tokens: int, arms: list[str], start: int = 0, shown: bool = True) -> None:
        self._tokens = batch_tokens
        self._terminal = shown and sys.stderr.isatty()
        self._shown = shown
        self._width = max((len(name) for name in arms), default=0)
        self._bar: Any = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=not self._terminal,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            position=0,
        )
        self._lines: dict[str, Any] = {}
        if self._terminal:
            self._lines = {
                name: tqdm(total=0, bar_format="{desc}", position=i + 1, leave=True) for i, name in enumerate(arms)
            }
        self._next_line = 0.0
        self._n_events = 0

    def step(self) -> None:
        self._bar.update(1)

    def log(self, record: dict[str, Any]) -> None:
        rate = self._bar.format_dict["rate"] if self._terminal else None
        if rate:
            self._bar.set_postfix_str(f"{rate * self._tokens:,.0f} tokens/s{self._events()}")
        for name, line in self._lines.items():
            numbers = record["arms"].get(name)
            line.set_description_str(
                f"  {name:<{self._width}}  {describe(numbers)}" if numbers else f"  {name}: stopped"
            )
        if self._shown and not self._terminal and record["seconds"] >= self._next_line:
            self._next_line = record["seconds"] + 15
            rate = record["tokens"] / max(record["seconds"], 1e-9)
            left = (self._bar.total - record["step"]) * record["seconds"] / max(record["step"], 1)
            head = f"step {record['step']}/{self._bar.total}  {rate:,.0f} tokens/s  about {left:,.0f} s left"
            lines = [head + self._events()]
            lines += [f"  {name:<{self._width}}  {describe(numbers)}" for name, numbers in record["arms"].items()]
            print("\n".join(lines), file=sys.stderr, flush=True)

    def event(self, event: dict[str, Any]) -> None:
        """Something worth a line: above the bars, and counted beside them."""
        self._n_events += 1
        who = "" if event["arm"] is None else f"{event['arm']}: "
        if event["kind"] != "stopped":  # logged already
            self.message(f"step {event['step']}: {who}{event['text']}")

    def _events(self) -> str:
        return f"  {self._n_events} event{'s' if self._n_events > 1 else ''}" if self._n_events else ""

    def message(self, text: str) -> None:
        """A line above the bars."""
        if self._terminal:
            tqdm.write(text, file=sys.stderr)
        elif self._shown:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        for line in self._lines.values():
            line.close()
        self._bar.close()


def describe(numbers: dict[str, Any]) -> str:
    """Loss, FVE, L0, dead share and a of one arm in a line."""
    a = numbers.get("a")
    text = (
        f"loss {numbers['loss']:.4f}  FVE {numbers['fve']:.3f}  L0 {numbers['l0']:5.1f}  "
        f"dead {100 * numbers['dead_frac']:4.1f} %"
    )
    return text if a is None else f"{text}  a {a:+.3f}"
