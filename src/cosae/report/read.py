"""The directory of a run → its records. Only what holds no run, or no JSON, is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError, short
from cosae.io.legacy import upgrade, upgrade_evaluation
from cosae.io.untrusted import one_line, parse_json, read_text
from cosae.report.lenient import read_record
from cosae.report.records import Evaluation, Event, Explanations, Metrics, Run, RunRecord

FORMAT, VERSION = "cosae-run", 2
MAX_BYTES = 2**28


def read_runs(paths: Sequence[Path | str]) -> list[RunRecord]:
    """The runs in some directories. Raises CosaeError when there is none, and as `read_run` does."""
    if not paths:
        raise CosaeError("a report needs at least one run; got none: give the directory that `train` or `demo` wrote")
    return [read_run(path) for path in paths]


def read_run(path: Path | str) -> RunRecord:
    """The run in a directory. Raises CosaeError for a missing path, a foreign or newer format, broken JSON."""
    path = Path(path)
    if not path.is_dir():
        what = "a file" if path.exists() else "nothing"
        raise CosaeError(f"a report needs the directory of a run; there is {what} at {path}")
    if not (path / "run.json").is_file():
        raise CosaeError(f"{path} is not a run: it holds no run.json; give the directory that `train` or `demo` wrote")
    run, file = _object(path / "run.json", upgrade), path / "evaluation.json"
    if run.get("format") != FORMAT:
        raise CosaeError(f"{path} is not a cosae run: format must be {FORMAT!r}, got {short(run.get('format'))}")
    if (version := run.get("version")) not in (1, VERSION):
        raise CosaeError(f"{path} has version {short(version)}, not {VERSION}: use the cosae that wrote the run")
    evaluation = _object(file, upgrade_evaluation) if file.is_file() else {}
    return RunRecord(
        path,
        read_record(Run, run),
        tuple(read_record(Metrics, line) for line in _lines(path / "metrics.jsonl")),
        tuple(read_record(Event, line) for line in _lines(path / "events.jsonl")),
        read_record(Evaluation, evaluation),
        bool(evaluation),
        _explained(path / "features"),
    )


def _explained(store: Path) -> dict[str, Explanations]:
    """What `cosae explain` found of a run's features, by arm, from the feature store in the run; empty without one."""
    saes = _part(_there(store / "store.json"), "record", "saes")
    means = _there(store / "explain.json")
    found: dict[str, Explanations] = {}
    for number, sae in enumerate(saes if isinstance(saes, list) else []):
        name = str(_part(sae, "name"))
        features = _part(_there(store / f"sae{number}" / "explanations.json"), "record", "features")
        one = read_record(Explanations, {"features": features, "means": _part(means, "saes", name)})
        found |= {name: one} if one.features else {}
    return found


def _there(path: Path) -> Mapping[str, Any]:
    return _object(path, lambda value: value) if path.is_file() else {}


def _part(value: Any, *names: str) -> Any:
    """A part of a part of an object; None where there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _object(path: Path, upgraded: Callable[[Any], Any]) -> Mapping[str, Any]:
    try:
        value = upgraded(parse_json(read_text(path, MAX_BYTES)))
    except ValueError as error:
        if isinstance(error, CosaeError):
            raise
        raise CosaeError(
            f"{path} is damaged (not JSON: {one_line(error)}); write it again or take the run from a copy"
        ) from None
    if not isinstance(value, dict):
        raise CosaeError(f"{path} is damaged: it must hold a JSON object, got {type(value).__name__} instead")
    return value


def _lines(path: Path) -> list[Any]:
    """Lines of a JSONL file. The last may be cut off: a run that was killed leaves that behind."""
    rows: list[Any] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for at, line in enumerate(lines, start=1):
        try:
            rows += [parse_json(line)] if line.strip() else []
        except ValueError:
            if at < len(lines):
                raise CosaeError(f"{path} is damaged: line {at} is not JSON; take the run from a copy") from None
    return rows
