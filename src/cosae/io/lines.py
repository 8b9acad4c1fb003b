"""Files of JSON lines that a run goes on with after a crash, and what JSON holds of a record."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError
from cosae.io.atomic import replaced
from cosae.io.untrusted import parse_json

Index = list[tuple[int, int]]
"""Step and CRC of every line of a file."""


def finite(value: Any) -> Any:
    """The same record with None where a float is NaN or infinite: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


class Lines:
    """A file of JSON lines that each hold a "step", flushed one by one.

    Opening it to go on after `resume_step` steps drops the lines after that step, and what a crash tore; a run that
    starts (0) starts an empty file. The file is replaced in one step: a crash while resuming loses no line.

    index    step and CRC of every line so far, for a checkpoint
    known    the index as the checkpoint holds it, None where it holds none. A line that is not in it is dropped; where
             there was such a line, or one is lost, the file as it was found is kept beside
    warning  what was lost, in a sentence; None where nothing was
    """

    def __init__(self, path: Path, resume_step: int = 0, known: Index | None = None) -> None:
        self.path = path
        self.index: Index = []
        left, foreign = Counter(known or ()), 0
        self.warning: str | None = None
        with self._disk_errors():
            with replaced(path) as staged, staged.open("wb") as kept:
                for step, line in _whole_lines(path) if resume_step > 0 else ():
                    entry = (step, zlib.crc32(line))
                    if step > resume_step:
                        continue
                    if known is not None and left[entry] == 0:
                        foreign += 1
                        continue
                    left[entry] -= 1
                    kept.write(line)
                    self.index.append(entry)
                if lost := [step for step, _ in left.elements()]:
                    are = "is" if len(lost) == 1 else "are"
                    self.warning = f"{len(lost)} of its {len(known or ())} lines {are} lost, of steps {_ranges(lost)}"
                elif foreign:
                    self.warning = f"{foreign} of its lines are not the run's"
                if self.warning is not None:
                    self.warning = f"{path.name} was damaged before the run went on: {self.warning}{_set_aside(path)}."
            self._file = path.open("a", encoding="utf-8")

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CosaeError(f"{self.path} cannot be written ({error}): make room and resume the run.") from None

    def write(self, record: dict[str, Any]) -> None:
        """One more line; NaN and infinity become null. Raises CosaeError where the disk refuses."""
        text = json.dumps(finite(record), allow_nan=False) + "\n"
        with self._disk_errors():
            self._file.write(text)
            self._file.flush()
        self.index.append((record["step"], zlib.crc32(text.encode())))

    def sync(self) -> None:
        """All lines so far survive a power cut: before a checkpoint is written. Raises CosaeError."""
        with self._disk_errors():
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # a full disk was reported when the line was written
            self._file.close()


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are whole, with their steps; none where there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            with suppress(ValueError, KeyError, TypeError):
                step = parse_json(line)["step"]
                if line.endswith(b"\n") and isinstance(step, int):
                    yield step, line


def _set_aside(path: Path) -> str:
    """Copy a damaged file beside itself under a free name; says under which."""
    if not path.exists():
        return ""
    names = (path.with_name(f"damaged_{f'{i}_' if i else ''}{path.name}") for i in itertools.count())
    aside = next(name for name in names if not name.exists())
    shutil.copyfile(path, aside)
    return f"; {aside.name} is the file as it was found"


def _ranges(steps: Sequence[int], shown: int = 6) -> str:
    """1, 10 to 50, 90: steps as they follow one another at the commonest distance."""
    steps = sorted(set(steps))
    gap = Counter(b - a for a, b in itertools.pairwise(steps)).most_common(1)
    runs: list[list[int]] = []
    for step in steps:
        if runs and gap and step - runs[-1][-1] == gap[0][0]:
            runs[-1] = [runs[-1][0], step]
        else:
            runs.append([step])
    words = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(words[:shown]) + (f" and {len(words) - shown} more" if len(words) > shown else "")
