"""A run's directory, read: what a report needs from it, and one sentence where it cannot be had.

In: the path of a run. Out: `RunRecord`. The three files are whatever somebody put there: the top is checked,
the rest is reached through `mapping`, `items` and `number`, which answer with nothing where the shape is another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError
from cosae.io.legacy import upgrade

FORMAT, VERSION = "cosae-run", 2


@dataclass(frozen=True)
class RunRecord:
    """One run: its directory, run.json, the lines of metrics.jsonl and events.jsonl, evaluation.json (empty
    without one)."""

    path: Path
    run: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    evaluation: Mapping[str, Any]
    events: tuple[Mapping[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return str(self.run.get("name") or self.path.name)

    @property
    def setting(self) -> str:
        return str(self.run.get("setting") or "")

    @property
    def arms(self) -> dict[str, Mapping[str, Any]]:
        """Arms in the order of the run, as run.json describes them."""
        return {str(name): mapping(arm) for name, arm in mapping(self.run.get("arms")).items()}

    @property
    def baseline(self) -> str | None:
        """The arm the others are compared with: what the evaluation says, else `standard`, else none."""
        for row in items(self.evaluation.get("paired_fve")):
            if "versus" in mapping(row):
                return str(row["versus"])
        return "standard" if "standard" in self.arms else None

    @property
    def probing(self) -> Mapping[str, Any]:
        return mapping(self.evaluation.get("probing"))

    def with_sinks_in(self) -> RunRecord:
        """The same run, with the probing that left the sinks in where the other stood."""
        return replace(self, evaluation={**self.evaluation, "probing": self.evaluation.get("probing_sinks_in")})

    def reconstruction(self, arm: str, sinks: str) -> Mapping[str, Any]:
        """Numbers of an arm with sinks "in" or "out"; empty when it was not measured."""
        return mapping(reach(self.evaluation, "reconstruction", arm, f"sinks_{sinks}"))


def read_run(path: Path | str) -> RunRecord:
    """The run in a directory. Raises CosaeError for a missing path, a foreign or newer format, broken JSON."""
    path = Path(path)
    if not path.is_dir():
        what = "a file" if path.exists() else "nothing"
        raise CosaeError(f"a report needs the directory of a run; there is {what} at {path}")
    if not (path / "run.json").is_file():
        raise CosaeError(f"{path} is not a run: it holds no run.json; give the directory that `train` or `demo` wrote")
    run = _object(path / "run.json")
    if run.get("format") != FORMAT:
        raise CosaeError(
            f"{path / 'run.json'} is not a cosae run: format must be {FORMAT!r}, got {run.get('format')!r}"
        )
    if run.get("version") not in (1, VERSION):
        raise CosaeError(
            f"{path / 'run.json'} has version {run.get('version')!r}; this cosae reads version {VERSION}: "
            "use the cosae that wrote the run"
        )
    evaluation = path / "evaluation.json"
    measured = _object(evaluation) if evaluation.is_file() else {}
    return RunRecord(path, run, _lines(path / "metrics.jsonl"), measured, _lines(path / "events.jsonl"))


def _object(path: Path) -> Mapping[str, Any]:
    try:
        value = upgrade(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise CosaeError(f"{path} is damaged (not JSON: {error}); write it again or take the run from a copy") from None
    if not isinstance(value, dict):
        raise CosaeError(f"{path} is damaged: it must hold a JSON object, got {type(value).__name__} instead")
    return value


def _lines(path: Path) -> tuple[Mapping[str, Any], ...]:
    """Lines of a JSONL file. The last may be cut off: a run that was killed leaves that behind."""
    if not path.is_file():
        return ()
    rows: list[Mapping[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for at, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(mapping(json.loads(line)))
        except (ValueError, RecursionError):
            if at < len(lines):
                raise CosaeError(f"{path} is damaged: line {at} is not JSON; take the run from a copy") from None
    return tuple(rows)


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def items(value: object) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def number(value: object) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def numbers(value: object) -> list[float | None]:
    """The finite numbers of a list, None in the place of others."""
    return [number(v) for v in items(value)]


def finite(value: object) -> list[float]:
    """The finite numbers of a list."""
    return [v for v in numbers(value) if v is not None]


def reach(value: object, *keys: str) -> Any:
    """value[key][key] ..., or None where a step is missing."""
    for key in keys:
        value = mapping(value).get(key)
    return value
