"""Files of JSON lines that a run goes on with after a crash, and what JSON holds of a record."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError
from cosae.io.atomic import replaced


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
