"""Whatever goes wrong on the way: no tokenising process, thread or open file is left behind."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cosae.run.capture.stores as capturing
import cosae.run.execute as executing
import cosae.run.explore.calibrate as calibrating
import cosae.run.plan.time as timing
from cosae.recipe import DataConfig, Recipe
from cosae.run import audit, evaluate, saes
from cosae.run.capture.request import Capture
from cosae.run.dataset.model import ModelDataset
from cosae.run.dataset.open import open_dataset
from cosae.run.execute import execute, resume
from cosae.run.plan.check import plan_capture, plan_run
from cosae.run.requests import EvalRequest
from tests.support.tiny_model_runs import one_arm
from tests.support.tiny_runs import QUIET

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are counted in /proc")


def left() -> tuple[set[int], set[str], set[int]]:
    """Living child processes, open files and threads."""
    children = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == os.getpid() and state != "Z":
            children.add(int(stat.parent.name))
    files = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            files.add(str(link.readlink()))
    named = {one.ident or 0 for one in threading.enumerate() if one.name.startswith("cosae")}
    return children, {file for file in files if not file.startswith("/proc")}, named


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """One SAE on a tiny model, whose text two processes tokenise and whose chunks are made ahead in a thread."""
    changes = {"data.n_workers": 2, "data.prefetch_chunks": 1}
    return one_arm(tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("texts"), **changes)


@pytest.fixture(scope="module")
def whole(small: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    execute(small, out, logs=QUIET)
    return out


@pytest.fixture
def watched(small: Recipe, whole: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The processes that were there as the text was read; afterwards nothing more may be open than before."""
    before, seen = left(), []

    def start(self: ModelDataset, *arguments: Any) -> Any:
        found = draw(self, *arguments)
        seen.append(len(left()[0] - before[0]))
        return found

    draw = ModelDataset._draw
    monkeypatch.setattr(ModelDataset, "_draw", start)
    with_workers = lambda config, use: open_dataset(replace(config, n_workers=2), use)  # noqa: E731
    monkeypatch.setattr(saes, "open_dataset", with_workers)
    yield seen
    for _ in range(100):  # a thread whose process is gone ends a moment later
        if (after := left())[2] <= before[2]:
            break
        time.sleep(0.05)
    assert after[0] <= before[0], "processes are left"
    assert after[1] <= before[1], "files are left open"
    assert after[2] <= before[2], "threads are left"


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("broken")


def resumed(one: Recipe, whole: Path, out: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executing, "calibrate", broken)
        with pytest.raises(RuntimeError, match="broken"):
            execute(one, out, logs=QUIET)
    return resume(out, QUIET)


def captured(data: DataConfig, *rest: Any) -> Capture:
    return Capture(data, ("resid_post.2",), 1000, 300, "float32")


PATHS: dict[str, tuple[Any, str, Callable[[Recipe, Path, Path], Any]]] = {
    "train, before the run": (executing, "check_run", lambda one, whole, out: execute(one, out, logs=QUIET)),
    "train, initialising": (executing, "_variance", lambda one, whole, out: execute(one, out, logs=QUIET)),
    "train, training": (executing, "train", lambda one, whole, out: execute(one, out, logs=QUIET)),
    "train, measuring": (executing, "evaluate", lambda one, whole, out: execute(one, out, logs=QUIET)),
    "resume": (executing, "evaluate", resumed),
    "plan": (timing, "measure", lambda one, whole, out: plan_run(one, out)),
    "plan capture": (timing, "batch_size", lambda one, whole, out: plan_capture(captured(one.data), out)),
    "capture, before the store": (capturing, "hold", lambda one, whole, out: capture(one, out)),
    "capture": (capturing, "_rows", lambda one, whole, out: capture(one, out)),
    "audit, opening": (saes.Sample, "of", lambda one, whole, out: run_audit(whole)),
    "audit": (audit, "audit", lambda one, whole, out: run_audit(whole)),
    "calibrate": (calibrating, "warn_elsewhere", lambda one, whole, out: calibrated(whole, out)),
    "eval": (evaluate, "describe", lambda one, whole, out: measured(whole)),
}


def capture(one: Recipe, out: Path) -> Any:
    return capturing.capture_stores(captured(one.data), out)


def calibrated(whole: Path, out: Path) -> Any:
    return calibrating.recalibrate(whole / "arms" / "standard", EvalRequest(tokens=500), out)


def run_audit(whole: Path) -> Any:
    return audit.run_audit([whole / "arms" / "standard"], EvalRequest(tokens=500))


def measured(whole: Path) -> Any:
    return evaluate.evaluate("reconstruction", [str(whole / "arms" / "standard")], EvalRequest(tokens=500))


@pytest.mark.parametrize("path", PATHS)
def test_an_error_leaves_nothing_running(
    small: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: list[int], path: str
) -> None:
    where, name, call = PATHS[path]
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(RuntimeError, match="broken") as _kept:  # with its frames, which would keep what they opened
        call(small, whole, tmp_path / "out")
    if path in ("train, measuring", "audit", "eval"):
        assert 2 in watched


def test_what_ends_well_leaves_nothing_running(small: Recipe, whole: Path, tmp_path: Path, watched: list[int]) -> None:
    kept = [execute(small, None, logs=QUIET), plan_run(small, None), capture(small, tmp_path / "store")]
    kept += [plan_capture(captured(small.data), tmp_path / "other"), run_audit(whole), measured(whole)]
    assert 2 in watched
    assert len(kept) == 6
