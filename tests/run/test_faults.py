"""Faults a run meets: failed writes at every file, torn and renamed checkpoints, two processes, signals at any time,
values that are not finite. Nothing is lost, one clear sentence each."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cosae.activations.stream import ActivationStream
from cosae.activations.synthetic import SyntheticSource
from cosae.errors import CosaeError
from cosae.io import atomic as durable
from cosae.io import lines, lock, staged
from cosae.recipe import Recipe
from cosae.run import execute as module
from cosae.run import folder
from cosae.run.execute import Logs, execute, resume
from cosae.sae import file as sae_file
from cosae.train import checkpoint
from cosae.train.loop import Interrupted
from cosae.types import Activations
from tests.support.tiny_runs import ARMS, QUIET, assert_same_run, recipe

FULL = OSError(28, "No space left on device")


def small(**changes: Any) -> Recipe:
    few = {"training.steps": 20, "training.checkpoint_every": 6}
    return replace(recipe(), arms=ARMS[:2]).changed({**few, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    execute(small(), out, logs=QUIET)
    return out


def failing(plain: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    def fail(*args: Any, **named: Any) -> Any:
        if when(*args):
            raise FULL
        return plain(*args, **named)

    return fail


WRITES: dict[str, tuple[Any, str, Callable[..., bool], str]] = {
    "run.json": (folder, "write_text", lambda path, text: '"interrupted"' in text or '"running"' in text, "run.json"),
    "evaluation.json": (folder, "write_text", lambda path, text: path.name == "evaluation.json", "evaluation.json"),
    "an SAE": (sae_file, "save_file", lambda tensors, path, *_: "cosine" in str(path), "arms/cosine could not be"),
    "checkpoint record": (staged, "sync_file", lambda path: "00012" in str(path), "the one before it"),
    "checkpoint folder": (staged, "sync_folder", lambda path: "00012" in str(path), "the one before it"),
}


@pytest.mark.parametrize("which", WRITES)
def test_a_full_disk_at_any_file_loses_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    owner, name, when, says = WRITES[which]
    out = tmp_path / "run"
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), when))
    with pytest.raises(CosaeError, match=says) as caught:
        execute(small(), out, logs=QUIET)
    monkeypatch.undo()
    assert "No space left" in str(caught.value)
    assert "\n" not in str(caught.value)
    if which == "run.json":  # nothing has begun yet
        assert {p.name for p in out.iterdir()} <= {".lock"}
        execute(small(), out, logs=QUIET)
    else:
        assert f"cosae resume {out}" in str(caught.value)
        resume(out, QUIET)
    assert_same_run(whole, out)
    assert not list(out.rglob("*.partial"))


@pytest.mark.parametrize("file", ["metrics.jsonl", "events.jsonl", "timing.jsonl"])
def test_a_log_that_cannot_be_written_stops_the_run_which_goes_on_later(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    out = tmp_path / "run"
    real = lines.Lines.sync
    synced: list[str] = []

    def sync(self: lines.Lines) -> None:
        synced.append(self.path.name)
        if self.path.name == file and synced.count(file) == 2:
            self._file.close()
            self._file = (out / file).open()  # cannot be written
            self.write({"step": 1})
        real(self)

    monkeypatch.setattr(lines.Lines, "sync", sync)
    with pytest.raises(CosaeError, match=rf"{file} cannot be written .*Saved up to step_"):
        execute(small(), out, logs=QUIET)
    monkeypatch.undo()
    resume(out, QUIET)
    assert_same_run(whole, out)


def test_a_crash_while_resuming_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')

    def dying(handle: int) -> None:
        raise MemoryError

    monkeypatch.setattr(lines.os, "fsync", dying)
    with pytest.raises(MemoryError):
        lines.Lines(path, 2)
    monkeypatch.undo()
    assert path.read_text().count("\n") == 3
    lines.Lines(path, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_failed_rename_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    durable.write_text(path, "before")
    monkeypatch.setattr(Path, "replace", failing(Path.replace, lambda *_: True))
    with pytest.raises(OSError, match="No space"):
        durable.write_text(path, "after")
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


# --------------------------------------------------------------------------------- checkpoints that were tampered with


def test_damaged_and_renamed_checkpoints_are_named_and_set_aside(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(module, "calibrate", failing(module.calibrate, lambda *_: True))
    with pytest.raises(OSError, match="No space"):
        execute(small(), out, logs=QUIET)
    monkeypatch.undo()
    before, last = checkpoint.checkpoints(out)
    last.rename(last.with_name("step_000000099"))
    resume(out, QUIET)
    shown = capsys.readouterr().err
    assert "step_000000099 is damaged (it holds step 20, and was renamed)" in shown
    assert_same_run(whole, out)
    record = json.loads((out / "run.json").read_text())
    (resumption,) = record["resumed"]
    assert resumption["step"] == int(before.name[5:]) == 18
    assert "step_000000099" in resumption["warnings"][0]
    assert (out / "checkpoints" / "damaged_step_000000099").is_dir()


def test_no_whole_checkpoint_is_refused_and_nothing_is_begun_again(whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "status": "running"}))
    for place in checkpoint.checkpoints(out):
        (place / "stream.safetensors").unlink()
    with pytest.raises(CosaeError, match=r"no checkpoint in .* is complete"):
        resume(out, QUIET)


# --------------------------------------------------------------------------------- two processes, signals


def test_a_folder_that_is_being_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    child = "import sys; from pathlib import Path; from cosae.io.lock import hold\n"
    child += "with hold(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", child, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(CosaeError, match=rf"written by another process \(process {holder.pid} on ") as caught:
        execute(small(), out, logs=QUIET)
    assert "\n" not in str(caught.value)
    holder.kill()  # the lock goes with it
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    with lock.hold(out), pytest.raises(CosaeError, match="written by this very process"), lock.hold(out):
        pass
    execute(small(**{"training.steps": 2}), out, logs=QUIET)


@pytest.mark.parametrize(
    ("where", "signum"),
    [
        ("refill", signal.SIGINT),
        ("checkpoint", signal.SIGTERM),
        ("last checkpoint", signal.SIGINT),
        ("calibration", signal.SIGTERM),
        ("evaluation", signal.SIGINT),
        ("record", signal.SIGTERM),
        ("last record", signal.SIGTERM),
    ],
)
def test_a_signal_at_any_time_saves_and_the_run_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, signum: int
) -> None:
    out = tmp_path / "run"
    owner, name, nth = {
        "refill": (ActivationStream, "_begin_round", 3),
        "checkpoint": (checkpoint, "save_file", 6),
        "last checkpoint": (checkpoint, "save_file", 14),
        "calibration": (module, "calibrate", 2),
        "evaluation": (module, "evaluate", 1),
        "record": (module, "write_json", 2),
        "last record": (module, "write_json", 4),
    }[where]
    real, seen = getattr(owner, name), [0]

    def hit(*args: Any, **named: Any) -> Any:
        seen[0] += 1
        if seen[0] == nth:
            os.kill(os.getpid(), signum)
        return real(*args, **named)

    monkeypatch.setattr(owner, name, hit)
    with pytest.raises(KeyboardInterrupt if where == "record" else Interrupted) as caught:
        execute(small(), out, logs=QUIET)
    monkeypatch.undo()
    assert seen[0] >= nth
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    if where == "record":  # before the first step: there is nothing to save
        assert not checkpoint.checkpoints(out)
    else:
        assert checkpoint.checkpoints(out)[-1].name == f"step_{caught.value.step:09d}"
    resume(out, QUIET)
    assert_same_run(whole, out)


def test_a_second_interrupt_in_the_middle_of_a_checkpoint_tears_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    real, seen = checkpoint.save_file, [0]

    def twice(*args: Any) -> None:
        seen[0] += 1
        if seen[0] == 7:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        real(*args)

    monkeypatch.setattr(checkpoint, "save_file", twice)
    with pytest.raises(KeyboardInterrupt) as caught:
        execute(small(), out, logs=QUIET)
    monkeypatch.undo()
    assert not isinstance(caught.value, Interrupted)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_000000006"]
    resume(out, QUIET)
    assert_same_run(whole, out)


# --------------------------------------------------------------------------------- values that are not finite


def spoil(monkeypatch: pytest.MonkeyPatch, bad: dict[int, float]) -> None:
    """Row 7 of some chunks of the world holds such a value."""
    real = SyntheticSource.chunks

    def chunks(self: SyntheticSource, start: int = 0) -> Any:
        for index, chunk in enumerate(real(self, start), start):
            if index in bad:
                x_ND = chunk.x_ND.clone()
                x_ND[7, 3] = bad[index]
                chunk = Activations.bare(x_ND)
            yield chunk

    monkeypatch.setattr(SyntheticSource, "chunks", chunks)


def test_a_model_that_emits_nan_stops_with_its_place_and_goes_on_without_those_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, at = 1024, 1
    monkeypatch.setattr(SyntheticSource.__init__, "__defaults__", (chunk,))
    longer = small(**{"training.steps": 3 * chunk // 64, "filter.window_tokens": 500})
    spoil(monkeypatch, {at: float("nan")})
    out = tmp_path / "run"
    with pytest.raises(CosaeError, match=rf"Got NaN at row 7 of chunk {at} .*cosae resume") as caught:
        execute(longer, out, logs=QUIET)
    assert "\n" not in str(caught.value)
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    Recipe.read(out / "recipe.json").changed({"data.non_finite": "drop"}).write(out / "recipe.json")
    resume(out, QUIET)
    execute(longer.changed({"data.non_finite": "drop"}), tmp_path / "whole", logs=QUIET)
    assert_same_run(tmp_path / "whole", out)
    metadata = json.loads((out / "run.json").read_text())["non_finite"]
    assert (metadata["policy"], metadata["dropped_tokens"], metadata["first"][0]["chunk"]) == ("drop", 1, at)
    (event,) = [
        e for e in map(json.loads, (out / "events.jsonl").read_text().splitlines()) if e["kind"] == "non_finite"
    ]
    assert event["tokens"] == 1
    assert event["arm"] is None
    assert event["step"] > 1


def test_events_are_logged_shown_and_reported_and_change_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cosae.report.page import write_report
    from cosae.train.monitor import LossMonitor

    plain = execute(small(), None, logs=QUIET, measured=False)

    def look(self: LossMonitor, measured: Any) -> list[dict[str, Any]]:
        self.seen += 1
        return [{"kind": "loss_spike", "text": "a <spike>"}] if self.seen == 7 else []

    monkeypatch.setattr(LossMonitor, "look", look)
    out = tmp_path / "run"
    watched = execute(small(), out, logs=Logs(progress=True))
    shown = capsys.readouterr().err
    assert "step 7: standard: a <spike>" in shown
    assert [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()][1:] == [
        {"step": 7, "arm": name, "kind": "loss_spike", "text": "a <spike>"} for name in ("standard", "cosine")
    ]
    page = write_report([out], tmp_path / "page.html").read_text()
    assert ">Events</h3>" in page
    assert "a &lt;spike&gt;" in page
    for name, sae in plain.saes.items():
        for key, value in sae.state_dict().items():
            assert torch.equal(value.nan_to_num(nan=7.0), watched.saes[name].state_dict()[key].nan_to_num(nan=7.0)), key
