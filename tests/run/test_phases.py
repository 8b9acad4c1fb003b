"""The phases of a run, a capture, a measurement and an audit: each is named, and a signal ends each within seconds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import cosae.models.capture as capture_module
from cosae.activations.store.reader import Store
from cosae.cli import main
from cosae.io.progress import Progress
from cosae.presets import PRESETS
from cosae.recipe import Recipe
from cosae.run.audit import run_audit
from cosae.run.capture.request import Capture
from cosae.run.capture.stores import capture_stores
from cosae.run.execute import Logs, execute, resume
from cosae.run.requests import EvalRequest
from cosae.train import loop
from tests.support.tiny_model_runs import one_arm
from tests.support.tiny_runs import QUIET, assert_same_run

PASS_SECONDS = 0.05
RUN = [
    "loading model",
    "reading text",
    "first window",
    "initialising with the geometric median",
    "filling buffer",
    "training",
    "reading held-out activations",
    "calibrating thresholds",
    "measuring norms",
    "measuring reconstruction",
    "encoding held-out tokens: standard",
]
LONG = ("first window", "filling buffer", "calibrating thresholds", "measuring norms", "measuring reconstruction")
"""Phases like another one that is tried every time."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """One SAE on a tiny model: a chunk of its activations takes 16 forward passes."""
    changes = {
        "data.batch_sequences": 4,
        "data.chunk_sequences": 64,
        "training.steps": 30,
        "training.checkpoint_every": 12,
        "training.buffer_tokens": 2560,
    }
    return one_arm(tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("texts"), **changes)


@pytest.fixture(scope="module")
def whole(small: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    execute(small, out, logs=QUIET)
    return out


@pytest.fixture
def hit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Send this process SIGTERM as a phase begins, or in its third forward pass; returns when."""

    def arrange(name: str, inside: bool = False) -> list[float]:
        real, sent, left = Progress.phase, [], [0]

        def strike() -> None:
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)

        @contextmanager
        def phase(self: Progress, this: str, *args: Any, **named: Any) -> Iterator[Any]:
            with real(self, this, *args, **named) as one:
                if this == name and not sent:
                    if inside:
                        left[0] = 3
                    else:
                        strike()
                yield one

        read = capture_module.read_sites

        def slow(*args: Any) -> Any:
            time.sleep(PASS_SECONDS if left[0] or sent else 0)
            left[0] -= 1
            if left[0] == 0:
                strike()
            return read(*args)

        monkeypatch.setattr(Progress, "phase", phase)
        monkeypatch.setattr(capture_module, "read_sites", slow)
        return sent

    return arrange


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in RUN])
def test_a_signal_ends_any_phase_of_a_run_and_the_run_goes_on(
    small: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hit: Any, name: str
) -> None:
    out, sent = tmp_path / "run", hit(name, inside=name in ("first window", "filling buffer"))
    with pytest.raises(KeyboardInterrupt):
        execute(small, out, logs=QUIET)
    assert time.monotonic() - sent[0] < 2
    monkeypatch.undo()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".") and path.name != ".lock"]
    if RUN.index(name) <= RUN.index("initialising with the geometric median"):
        assert not out.exists()  # nothing was begun
        execute(small, out, logs=QUIET)
    else:
        assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
        resume(out, QUIET)
    assert_same_run(whole, out)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_signal_in_the_middle_of_a_chunk_does_not_wait_for_its_end(
    small: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefetch: int
) -> None:
    """Reading goes on while steps are made, in this thread or another: the step before it is saved."""
    out, began, passes = tmp_path / "run", [0.0], [0]
    real, read = loop._advance, capture_module.read_sites

    def advance(state: Any, **named: Any) -> Any:
        began[0] = began[0] or (time.monotonic() if named["step"] == 3 else 0.0)
        return real(state, **named)

    def slow(*args: Any) -> Any:
        if began[0]:
            passes[0] += 1
            if passes[0] == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(PASS_SECONDS)
        return read(*args)

    monkeypatch.setattr(loop, "_advance", advance)
    monkeypatch.setattr(capture_module, "read_sites", slow)
    ahead = small.changed({"data.prefetch_chunks": prefetch})
    with pytest.raises(loop.Interrupted) as caught:
        execute(ahead, out, logs=QUIET)
    monkeypatch.undo()
    assert passes[0] <= 5, "a chunk takes 16 passes"
    assert (out / "checkpoints" / f"step_{caught.value.step:09d}").is_dir()
    resume(out, QUIET)
    assert_same_run(whole, out)


def test_every_phase_is_named_and_those_that_take_long_are_counted(
    small: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(small, tmp_path / "run", logs=Logs(progress=True))
    lines = capsys.readouterr().err.splitlines()
    places = [next(i for i, line in enumerate(lines) if line.split(" (")[0] == name) for name in RUN]
    assert places == sorted(places)
    assert "first window (0 of 512 tokens)" in lines
    assert "filling buffer (0 of 2560 tokens)" in lines
    for name in ("calibrating thresholds", "reading held-out activations", "encoding held-out tokens: standard"):
        assert [line for line in lines if line.startswith(f"{name} (0 of ")], name


def test_a_capture_ends_at_once_and_goes_on_to_the_same_bytes(
    small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hit: Callable[..., list[float]]
) -> None:
    request = Capture(small.data, ("resid_post.2",), 3000, 500, "float32", shard_tokens=1000)
    capture_stores(request, tmp_path / "whole")
    sent = hit("capturing", inside=True)
    with pytest.raises(KeyboardInterrupt):
        capture_stores(request, tmp_path / "store")
    assert time.monotonic() - sent[0] < 2
    monkeypatch.undo()
    capture_stores(request, tmp_path / "store")
    assert list(Store(tmp_path / "store").faults()) == []
    shards = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("whole", "store")]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]


@pytest.mark.parametrize(
    "name", ["loading model", "reading held-out activations", "encoding tokens at the median norm"]
)
def test_an_audit_ends_at_once_and_writes_nothing(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], hit: Callable[..., list[float]], name: str
) -> None:
    sent, out = hit(name), tmp_path / "audit"
    with pytest.raises(SystemExit) as ended:
        main(["audit", str(whole / "arms" / "standard"), "--tokens", "500", "--out", str(out)])
    assert time.monotonic() - sent[0] < 2
    assert ended.value.code == 130
    assert "Nothing was written: give the same command again." in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("measurement", "name"),
    [("splice", "running the model"), ("norms", "encoding tokens at the median norm: standard")],
)
def test_a_measurement_ends_at_once(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], hit: Callable[..., list[float]],
    measurement: str, name: str,
) -> None:  # fmt: skip
    sent = hit(name)
    with pytest.raises(SystemExit) as ended:
        main(["eval", measurement, str(whole / "arms" / "standard"), "--tokens", "500"])
    assert (time.monotonic() - sent[0] < 2, ended.value.code) == (True, 130)
    assert f"measuring {measurement}" in capsys.readouterr().err


def test_a_run_that_was_stopped_before_its_first_step_says_how_to_go_on(
    small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hit: Any
) -> None:
    small.write(tmp_path / "recipe.json")
    hit("filling buffer", inside=True)
    with pytest.raises(SystemExit):
        main(["train", "--recipe", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "run")])
    assert f"Go on with: cosae resume {tmp_path / 'run'}" in capsys.readouterr().err
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "run")
    hit("first window", inside=True)
    with pytest.raises(SystemExit):
        main(["train", "--recipe", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "run")])
    assert "Nothing was saved yet: start again." in capsys.readouterr().err


def test_an_audit_names_its_phases(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_audit([whole / "arms" / "standard"], EvalRequest(tokens=500), progress=Progress())
    lines = capsys.readouterr().err.splitlines()
    for name in ("loading model", "auditing standard", "encoding tokens (0 of "):
        assert [line for line in lines if line.startswith(name)], name


VERBS: dict[str, list[str]] = {
    "train": ["train", "--recipe", "{recipe}", "--out", "{out}"],
    "plan": ["plan", "--recipe", "{recipe}", "--out", "{out}"],
    "demo": ["demo", "--out", "{out}"],
    "resume": ["resume", "{begun}"],
    "capture": ["capture", "--recipe", "{recipe}", "--tokens", "3000", "--out", "{out}"],
    "audit": ["audit", "{sae}", "--tokens", "500", "--out", "{out}"],
    "eval": ["eval", "splice", "{sae}", "--tokens", "500"],
    "calibrate": ["calibrate", "{sae}", "--tokens", "500", "--out", "{out}"],
    "features": ["features", "{sae}", "--prompts", "50", "--context", "32"],
    "steer": ["steer", "{sae}", "ab ab", "--feature", "1", "--add", "3", "--new-tokens", "30"],
    "export neuronpedia": ["export", "neuronpedia", "{sae}", "--out", "{out}", "--prompts", "50", "--context", "32"],
    "export delphi": ["export", "delphi", "{sae}", "--out", "{out}", "--prompts", "50", "--context", "32"],
}


@pytest.mark.parametrize("place", ["while the model is loaded", "in the fourth pass of the model"])
@pytest.mark.parametrize("verb", VERBS)
def test_sigterm_ends_every_verb_that_runs_a_model_and_no_half_output_is_left(
    small: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    verb: str, place: str,
) -> None:  # fmt: skip
    import torch
    import transformers

    small.write(tmp_path / "recipe.json")
    for name in ("demo", "demo-injected"):
        monkeypatch.setitem(PRESETS, name, lambda: small)
    shutil.copytree(whole, tmp_path / "begun")
    for done in ("run.json", "checkpoints/step_000000030", "evaluation.json"):
        path = tmp_path / "begun" / done
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    known = {"recipe": "recipe.json", "out": "out", "begun": "begun"}
    places = {name: str(tmp_path / file) for name, file in known.items()} | {"sae": str(whole / "arms" / "standard")}
    sent: list[float] = []

    def strike() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    passes, forward = [0], torch.nn.Embedding.forward

    def one_pass(self: Any, ids: Any) -> Any:
        passes[0] += 1
        if passes[0] == 4:
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PASS_SECONDS if sent else 0)
        return forward(self, ids)

    if place == "while the model is loaded":
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: strike())
    else:
        monkeypatch.setattr(torch.nn.Embedding, "forward", one_pass)
    with pytest.raises(SystemExit) as ended:
        main([part.format(**places) for part in VERBS[verb]])
    said = capsys.readouterr().err
    assert sent, said
    assert (time.monotonic() - sent[0] < 2, ended.value.code) == (True, 130), said
    assert "Traceback" not in said
    assert "interrupted. " in said or "saved. Go on with: " in said
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in left} <= {"recipe.json", "run.json", ".lock", "capture.json"}, left
