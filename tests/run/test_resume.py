"""Exact resume: whatever ended a run, what it becomes after `resume` is the uninterrupted run to the bit."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cosae.errors import CosaeError
from cosae.interop.dictionary_learning.write import write as write_dictionary
from cosae.interop.read import read_sae
from cosae.recipe import Recipe
from cosae.report.read import read_run
from cosae.run import execute as module
from cosae.run.execute import Logs, execute, resume
from cosae.sae.model import SAE
from cosae.sae.selector import TOPK_SELECTORS
from cosae.train import checkpoint, log, loop
from cosae.train.arm import parse_arm
from cosae.train.loop import Interrupted
from tests.support.tiny_runs import QUIET, assert_same_run, metrics, recipe

CHILD = """
import sys
from pathlib import Path
from cosae.recipe import Recipe
from cosae.report.read import read_run
from cosae.run.execute import Logs, execute
from cosae.train.log import JsonLines
from cosae.train.loop import Interrupted

plain = JsonLines.log
def loud(self, record):
    plain(self, record)
    print(record["step"], flush=True)
JsonLines.log = loud
try:
    execute(Recipe.read(sys.argv[1]), Path(sys.argv[2]), logs=Logs(progress=False))
except Interrupted as stop:
    print("interrupted", stop.step, flush=True)
    sys.exit(130)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    execute(recipe(), out, logs=QUIET)
    return out


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int, signum: int = signal.SIGINT) -> None:
    """Send this process a signal once `step` steps are done, as Ctrl-C would."""
    real, count = log.TrainingDisplay.step, itertools.count(1)

    def stepped(self: log.TrainingDisplay) -> None:
        real(self)
        if next(count) == step:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(log.TrainingDisplay, "step", stepped)


@pytest.mark.parametrize(
    ("step", "signum"), [(17, signal.SIGINT), (20, signal.SIGTERM), (1, signal.SIGINT), (40, signal.SIGINT)]
)
def test_interrupted_and_resumed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, signum: int
) -> None:
    out = tmp_path / "run"
    interrupt_after(monkeypatch, step, signum)
    with pytest.raises(Interrupted) as caught:
        execute(recipe(), out, logs=QUIET)
    monkeypatch.undo()
    assert caught.value.step == step
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    finished = resume(out, QUIET)
    assert_same_run(whole, out)
    assert set(finished.saes) == {"standard", "cosine", "delta", "gated"}


def test_interrupted_again_and_again(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    interrupt_after(monkeypatch, 6)
    with pytest.raises(Interrupted):
        execute(recipe(), out, logs=QUIET)
    for more in (1, 13):
        interrupt_after(monkeypatch, more)
        with pytest.raises(Interrupted):
            resume(out, QUIET)
    monkeypatch.undo()
    resume(out, QUIET)
    assert_same_run(whole, out)


def test_a_schedule_of_k_is_gone_on_with_and_ends_at_k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = zip(TOPK_SELECTORS, ("standard", "topk", "absolute"), strict=True)
    arms = tuple(parse_arm(f"standard,selector={kind},k=12→4,k_steps=30,name={name}") for kind, name in names)
    run = replace(recipe(**{"filter.kind": "none"}), arms=arms)
    execute(run, tmp_path / "whole", logs=QUIET)
    interrupt_after(monkeypatch, 17)
    with pytest.raises(Interrupted):
        execute(run, tmp_path / "run", logs=QUIET)
    monkeypatch.undo()
    finished = resume(tmp_path / "run", QUIET)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    for line in metrics(tmp_path / "run"):
        for arm in arms:
            wanted = arm.k_at(line["step"] - 1) or 4
            assert (line["arms"][arm.name]["k"], line["arms"][arm.name]["l0"]) == (wanted, wanted)
    assert {(sae.k, sae.selector.k) for sae in finished.saes.values()} == {(4, 4)}
    assert finished.calibrations[arms[0].name].l0 == pytest.approx(4, abs=0.01)
    with pytest.raises(CosaeError, match=r"k_steps .* at most the run's 20 steps"):
        execute(run.changed({"training.steps": 20}), None, logs=QUIET)


def test_an_arm_starts_from_another_librarys_sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = SAE.build(16, 48, "inner", "topk", 4, seed=3, centre="zero")
    with torch.no_grad():
        sae.decoder.rows_FD.mul_(torch.linspace(0.5, 3, 48)[:, None])
    write_dictionary(sae, tmp_path / "theirs")
    text = f"standard,selector=topk,prefixes=8,name=standard,start={tmp_path / 'theirs'}"
    run = replace(recipe(), arms=(parse_arm(text),))
    x_ND = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    arm = run.resolved(16).arms[0]
    built = arm.build(16, x_ND, read=read_sae)
    torch.testing.assert_close(built(x_ND), sae(x_ND), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(built.W_dec.norm(dim=-1), torch.ones(48))
    assert built.cfg.prefixes == built.decoder.prefixes == (8, 48)
    with pytest.raises(CosaeError, match="give the arm k=4"):
        replace(arm, sae=replace(arm.sae, k=5)).build(16, x_ND, read=read_sae)
    execute(run, tmp_path / "whole", logs=QUIET)
    interrupt_after(monkeypatch, 17)
    with pytest.raises(Interrupted):
        execute(run, tmp_path / "run", logs=QUIET)
    monkeypatch.undo()
    resume(tmp_path / "run", QUIET)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_an_extended_run_is_the_one_that_was_planned_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = recipe(**{"training.steps": 15})
    execute(short.changed({"training.steps": 33, "training.extended_from": (15,)}), tmp_path / "planned", logs=QUIET)
    out = tmp_path / "run"
    execute(short, out, logs=QUIET)
    before = (out / "run.json").read_bytes()
    for steps in (15, 3):
        with pytest.raises(CosaeError, match=f"has done 15 steps.* Got {steps}"):
            resume(out, QUIET, extend_to=steps)
    assert (out / "run.json").read_bytes() == before
    interrupt_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        resume(out, Logs(True), extend_to=33)
    monkeypatch.undo()
    assert "extended from step 15 to 33" in capsys.readouterr().err
    with pytest.raises(CosaeError, match="not finished"):
        resume(out, QUIET, extend_to=50)
    finished = resume(out, QUIET)
    assert_same_run(tmp_path / "planned", out)
    assert finished.run["parts"] == [{"start": 0, "end": 15}, {"start": 15, "end": 33}]
    lr = {line["step"]: line["arms"]["standard"]["lr"] for line in metrics(out)}
    assert (lr[15] < 0.4 * lr[10], lr[16] < 0.4 * lr[10], lr[22]) == (True, True, lr[10])


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_process_ended_from_outside_goes_on_to_the_same_end(whole: Path, tmp_path: Path, how: signal.Signals) -> None:
    """Ctrl-C saves where it is; kill -9 goes back to the last checkpoint."""
    out, file = tmp_path / "run", tmp_path / "recipe.json"
    recipe().write(file)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file), str(out)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 14:
            time.sleep(0.02)  # anywhere in the steps after it
            child.send_signal(how)
            break
    rest = child.stdout.read()
    child.wait(30)
    child.stdout.close()
    if how == signal.SIGKILL:
        assert child.returncode == -signal.SIGKILL
    elif "interrupted" in rest:
        assert child.returncode == 130
        assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    if json.loads((out / "run.json").read_text())["status"] != "finished":
        resume(out, QUIET)
    assert_same_run(whole, out)


def crashed(out: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A run that died after `step` steps without a word: checkpoints every 10 steps remain."""
    real = loop.train_step

    def dying(state: Any, x: Any, at: int, *rest: Any) -> Any:
        if at == step:
            raise MemoryError
        return real(state, x, at, *rest)

    monkeypatch.setattr(loop, "train_step", dying)
    with pytest.raises(MemoryError):
        execute(recipe(), out, logs=QUIET)
    monkeypatch.undo()


@pytest.fixture(scope="module")
def died_at_33(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("died") / "run"
    with pytest.MonkeyPatch.context() as patch:
        crashed(out, patch, 33)
    assert [p.name for p in checkpoint.checkpoints(out)] == ["step_000000020", "step_000000030"]
    return out


def test_steps_after_the_checkpoint_are_done_again(whole: Path, died_at_33: Path, tmp_path: Path) -> None:
    out = shutil.copytree(died_at_33, tmp_path / "run")
    assert max(line["step"] for line in metrics(out)) == 32
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 34, "tok')  # torn by the crash
    resume(out, QUIET)
    assert_same_run(whole, out)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    whole: Path, died_at_33: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(died_at_33, tmp_path / "run")
    newest = checkpoint.checkpoints(out)[-1] / "arm.cosine.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    (out / "checkpoints" / ".step_000000040.partial").mkdir()
    resume(out, module.Logs(progress=True))
    shown = capsys.readouterr().err
    assert "step_000000030 is damaged" in shown
    assert "going on from the checkpoint before it" in shown
    assert_same_run(whole, out)


def test_a_full_disk_stops_with_a_sentence_and_the_run_goes_on_later(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    real, count = checkpoint.save_file, itertools.count()

    def save_file(tensors: Any, file: Path) -> None:
        if next(count) >= 7:  # in the second checkpoint
            raise OSError(28, "No space left on device")
        real(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(CosaeError, match="step 20 could not be written"):
        execute(recipe(), out, logs=QUIET)
    monkeypatch.undo()
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    resume(out, QUIET)
    assert_same_run(whole, out)


@pytest.mark.long
def test_a_run_that_died_while_measuring_measures_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def dying(*args: Any, **named: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(module, "evaluate", dying)
    with pytest.raises(MemoryError):
        execute(recipe(), out, logs=QUIET)
    monkeypatch.undo()
    resume(out, QUIET)
    assert_same_run(whole, out)


# --------------------------------------------------------------------------------- what cannot go on


def refused(out: Path, says: str, **options: Any) -> None:
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} if out.is_dir() else {}
    with pytest.raises(CosaeError, match=says) as caught:
        resume(out, QUIET, **options)
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in before} == before


def test_no_run_is_one_sentence(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "holds no run to go on with")
    refused(tmp_path, "holds no run to go on with")


@pytest.mark.long
def test_a_run_that_died_before_its_first_checkpoint_begins_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    crashed(out, monkeypatch, 3)
    (out / "recipe.json").unlink()  # as if it had died between the first two files
    resume(out, QUIET)
    assert "there is no checkpoint yet: the run begins again" in capsys.readouterr().err
    assert_same_run(whole, out)


def test_a_finished_run_is_left_alone(whole: Path) -> None:
    refused(whole, "is finished")


def test_a_damaged_record_is_one_sentence(died_at_33: Path, tmp_path: Path) -> None:
    out = shutil.copytree(died_at_33, tmp_path / "run")
    (out / "run.json").write_text("{")
    refused(out, "is not readable JSON")
    (out / "run.json").write_text("[]")
    refused(out, "does not hold a mapping")
    (out / "run.json").unlink()
    (out / "recipe.json").write_text("{")
    refused(out, "is not well-formed")


@pytest.mark.parametrize(
    "change",
    [
        {"training.seed": 1},
        {"training.batch_tokens": 32},
        {"data.world.sigma": 0.25},
        {"filter.factor": 5.0},
        {"perturbation.kind": "log_normal"},
        {"d_sae": 64, "arms": tuple({"name": arm.name, "d_sae": 64} for arm in recipe().arms)},
        {"arms": ({"name": "another"},)},
        {"arms": tuple({"name": arm.name, "score": "cosine"} for arm in recipe().arms)},
    ],
    ids=str,
)
def test_a_recipe_changed_under_the_run_is_refused(died_at_33: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    out = shutil.copytree(died_at_33, tmp_path / "run")
    Recipe.read(out / "recipe.json").changed(change).write(out / "recipe.json")
    refused(out, "recipe")


def test_a_run_on_a_tensor_needs_the_tensor_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND = torch.randn(900, 16, generator=torch.Generator().manual_seed(0))
    small = recipe(**{"data.world": None, "training.steps": 12})
    execute(small, tmp_path / "whole", logs=QUIET, tensor=x_ND)
    interrupt_after(monkeypatch, 5)
    with pytest.raises(Interrupted):
        execute(small, tmp_path / "run", logs=QUIET, tensor=x_ND)
    monkeypatch.undo()
    refused(tmp_path / "run", "a tensor in memory")
    refused(tmp_path / "run", "sha256", tensor=x_ND + 1)
    resume(tmp_path / "run", QUIET, tensor=x_ND)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# --------------------------------------------------------------------------------- what was asked at the start


def interrupted(out: Path, monkeypatch: pytest.MonkeyPatch, step: int = 17, **asked: Any) -> None:
    interrupt_after(monkeypatch, step)
    with pytest.raises(Interrupted):
        execute(recipe(), out, **{"logs": QUIET, **asked})
    monkeypatch.undo()


@pytest.mark.parametrize("metrics_only", [False, True])
def test_a_resumed_run_logs_where_it_was_started_to_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metrics_only: bool
) -> None:
    board: list[tuple[int | None, int]] = []
    runs: list[tuple[str, str, list[int]]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            self.purge = purge_step

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            board.append((self.purge, step))

        def close(self) -> None: ...

    class Run:
        def __init__(self, project: str, id: str, **named: Any) -> None:
            runs.append((project, id, []))

        def log(self, numbers: Any, step: int) -> None:
            runs[-1][2].append(step)

        def finish(self) -> None: ...

    def services() -> None:
        for name, kind in (("torch.utils.tensorboard", {"SummaryWriter": Writer}), ("wandb", {"init": Run})):
            monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**kind))

    out = tmp_path / "run"
    services()
    interrupted(out, monkeypatch, logs=Logs(progress=False, tensorboard=True, wandb="norms"))
    services()
    resume(out, Logs(progress=False, metrics_only=metrics_only))
    record = json.loads((out / "run.json").read_text())["logs"]
    if metrics_only:
        assert max(step for _, step in board) == 16
        assert (record["tensorboard"], record["wandb"], len(runs)) == (False, None, 1)
    else:
        assert {step for purge, step in board if purge == 18} == set(range(18, 41, 2))
        assert [project for project, _, _ in runs] == ["norms", "norms"]
        assert (runs[0][1], runs[1][2]) == (runs[1][1], list(range(18, 41, 2)))  # the same run goes on
        assert record == {"tensorboard": True, "wandb": "norms", "wandb_run": runs[0][1]}


@pytest.mark.parametrize(("asked", "then", "measured"), [(False, None, False), (True, None, True), (False, True, True)])
def test_a_resumed_run_measures_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool, then: bool | None, measured: bool
) -> None:
    out = tmp_path / "run"
    interrupted(out, monkeypatch, measured=asked)
    assert (resume(out, QUIET, evaluate=then).evaluation is not None) == measured
    assert (out / "evaluation.json").exists() == measured


# --------------------------------------------------------------------------------- lines lost between the two


def cut(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:40])


def flip(path: Path) -> None:
    """One digit of one number."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines[4] = lines[4].replace(b'"l0": ', b'"l0": 9', 1)
    path.write_bytes(b"".join(lines))


def zeros(path: Path) -> None:
    path.write_bytes(b"\0" * 99)


@pytest.mark.parametrize(
    ("spoil", "lost", "n"),
    [(cut, "6 to 16", 6), (flip, "8", 1), (Path.unlink, "1, 2 to 16", 9), (zeros, "1, 2 to 16", 9)],
    ids=["cut", "changed", "deleted", "zeros"],
)
def test_lost_lines_are_named_kept_and_the_run_goes_on_exactly(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Any,
    lost: str,
    n: int,
) -> None:
    out = tmp_path / "run"
    interrupted(out, monkeypatch)
    spoil(out / "metrics.jsonl")
    found = (out / "metrics.jsonl").read_bytes() if (out / "metrics.jsonl").exists() else None
    resume(out, QUIET)
    (warning,) = json.loads((out / "run.json").read_text())["resumed"][0]["warnings"]
    assert f"{n} of its 9 lines {'is' if n == 1 else 'are'} lost, of steps {lost}" in warning
    assert warning in capsys.readouterr().err
    assert warning in read_run(out).warnings  # on the page
    aside = out / "damaged_metrics.jsonl"
    assert (aside.read_bytes() if aside.exists() else None) == found
    steps = [line["step"] for line in metrics(out)]
    assert metrics(out) == [line for line in metrics(whole) if line["step"] in steps]
    assert len(steps) == len(metrics(whole)) - n
    (out / "metrics.jsonl").write_bytes((whole / "metrics.jsonl").read_bytes())
    assert_same_run(whole, out)  # all else


def test_untouched_lines_go_on_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    interrupted(out, monkeypatch)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 18, "arms": {}}\n{"step": 2')  # after the checkpoint, then torn: a crash leaves this
    resume(out, QUIET)
    assert json.loads((out / "run.json").read_text())["resumed"][0]["warnings"] == []
    assert not list(out.glob("damaged*"))


def test_a_change_of_the_exponent_is_unknown_where_its_lines_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    interrupted(out, monkeypatch, 31)
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(b"".join(line for line in lines if json.loads(line)["step"] != 30))
    resume(out, QUIET)
    assert json.loads((out / "run.json").read_text())["arms"]["cosine"]["a_change"] is None
