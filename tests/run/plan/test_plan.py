"""Plans before spending: memory near what is measured, disk to the byte, refusals that say what to lower to what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cosae.activations.synthetic import World
from cosae.cli import main
from cosae.errors import CosaeError
from cosae.recipe import DataConfig, Recipe
from cosae.run.capture.request import Capture
from cosae.run.capture.stores import capture_stores
from cosae.run.dataset.open import dataset_of
from cosae.run.execute import Logs, execute, resume
from cosae.run.plan import check as plans
from cosae.run.plan.check import check_capture, check_run, plan_run, screen
from cosae.run.plan.resources import Choice, Item, check_fits, human, total
from cosae.train.arm import ARMS
from tests.support import ROOT

TOLERANCE = 0.35
"""Peak resident memory grew by the plan's figure to within this share of it, in every setting of MEASURED."""
MEASURED = (
    {"d": 256, "m": 8192, "batch": 256, "buffer": 1024},
    {"d": 256, "m": 512, "batch": 64, "buffer": 131072},
    {"d": 256, "m": 512, "batch": 64, "buffer": 131072, "dtype": "bfloat16"},
    {"d": 256, "m": 512, "batch": 64, "buffer": 1024, "window": 131072},
    {"d": 256, "m": 8192, "batch": 2048, "buffer": 4096, "kernel": "reference"},
    {"d": 256, "m": 512, "batch": 64, "buffer": 1024, "held_out": 65536},
)
PROGRAM = """
import json, sys, tempfile, threading, time
from pathlib import Path
from cosae.kernels import keep_memory
from cosae.run.execute import Logs, execute
from cosae.run.dataset.open import dataset_of
from cosae.run.plan.check import check_run
from tests.run.plan.test_plan import small
keep_memory()
out = Path(tempfile.mkdtemp())
execute(small(), out / "warm", logs=Logs(False))
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before = peak = resident()
ended = False
def watch():
    global peak
    while not ended:
        peak = max(peak, resident())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
recipe = small(**json.loads(sys.argv[1]))
execute(recipe, out / "run", logs=Logs(False))
ended = True
watcher.join()
print(json.dumps([peak - before, check_run(recipe, dataset_of(recipe), out / "run").memory.n_bytes]))
"""


def small(
    d: int = 16,
    m: int = 64,
    batch: int = 64,
    buffer: int = 256,
    window: int = 256,
    held_out: int = 256,
    dtype: str = "float32",
    kernel: str = "auto",
) -> Recipe:
    """Two arms on a world, four steps."""
    return Recipe(arms=(ARMS["standard"], ARMS["cosine"]), d_sae=m, k=16, kernel=kernel).changed(
        {
            "data.world": World(d_in=d, n_features=256, l0=3),
            "training.steps": 4,
            "training.batch_tokens": batch,
            "training.buffer_tokens": buffer,
            "training.store_dtype": dtype,
            "training.checkpoint_every": 2,
            "filter.window_tokens": window,
            "evaluation.held_out_tokens": held_out,
            "evaluation.calibration_tokens": 256,
            "evaluation.resamples": 5,
        }
    )


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("setting", MEASURED, ids=str)
def test_predicted_memory_is_near_measured_peak_growth(setting: dict[str, Any]) -> None:
    command = [sys.executable, "-c", PROGRAM, json.dumps(setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    measured, planned = json.loads(done.stdout)
    assert abs(measured - planned) < TOLERANCE * planned, f"{human(measured)} measured, {human(planned)} planned"


def checked(recipe: Recipe, out: Path | None) -> plans.Plan:
    return check_run(recipe, dataset_of(recipe), out)


def test_a_plan_names_every_part_and_the_worst_moment_counts_once() -> None:
    plan = checked(small(m=4096, buffer=4096), Path("nowhere"))
    named = " ".join(item.what for item in (*plan.memory.resident, *plan.memory.passing))
    for part in ("buffer", "arm standard", "arm cosine", "window", "step", "checkpoint", "evaluation", "world"):
        assert part in named
    assert plan.memory.n_bytes == total(plan.memory.resident) + max(item.n_bytes for item in plan.memory.passing)
    arm = next(item for item in plan.memory.resident if item.what.startswith("arm standard"))
    assert arm.n_bytes == 4 * 2 * 4096 * 16 * 4
    lighter = checked(small(m=4096).changed({"training.optimizer.state_dtype": "bfloat16"}), None)
    assert next(i for i in lighter.memory.resident if i.what.startswith("arm standard")).n_bytes == 3 * 2 * 4096 * 64


def test_the_disk_of_checkpoints_is_what_a_run_writes(tmp_path: Path) -> None:
    recipe = small(m=512, buffer=2048)
    plan = checked(recipe, tmp_path / "run")
    execute(recipe, tmp_path / "run", logs=Logs(False), measured=False)
    written = sum(p.stat().st_size for p in (tmp_path / "run").rglob("*.safetensors"))
    # two checkpoints stay, the plan has room for the third that is written beside them
    kept = total(plan.disk[:2]) * 2 / 3 + plan.disk[2].n_bytes
    assert written < total(plan.disk)
    assert 0.7 * kept < written < 1.1 * kept


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_disk_of_a_store_is_what_a_capture_writes(tmp_path: Path, dtype: str) -> None:
    (tmp_path / "text").mkdir()
    for i in range(60):
        (tmp_path / "text" / f"{i}.txt").write_text(f"value_{i} = {i} * {i}\n" * 30)
    data = DataConfig(corpus=str(tmp_path / "text"), context=64, chunk_sequences=16)
    wanted = Capture(data, ("resid_post.0",), tokens=8192, held_out_tokens=1024, dtype=dtype)
    plan = check_capture(wanted, tmp_path / "store")
    capture_stores(wanted, tmp_path / "store")
    written = sum(path.stat().st_size for path in (tmp_path / "store").iterdir())
    assert abs(written - total(plan.disk)) < 0.05 * written


@pytest.mark.parametrize(
    ("change", "lowered"),
    [
        ({"d_sae": 4_000_000}, "d_sae from 4000000"),
        ({"training.buffer_tokens": 300_000_000}, "training.buffer_tokens from 300000000"),
        ({"filter.window_tokens": 300_000_000}, "filter.window_tokens from 300000000"),
        ({"evaluation.held_out_tokens": 300_000_000}, "evaluation.held_out_tokens from 300000000"),
    ],
    ids=str,
)
def test_what_cannot_fit_in_memory_is_refused_and_the_advice_is_true(
    change: dict[str, int], lowered: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plans, "free_memory", lambda _: 2_000_000_000)
    monkeypatch.setattr(plans, "free_disk", lambda _: 10**15)
    recipe = small().changed(change)
    with pytest.raises(CosaeError, match=f"of which 2 GB are free; .* Lower {lowered} to") as caught:
        execute(recipe, tmp_path / "run", logs=Logs(False))
    assert not (tmp_path / "run").exists()
    value = int(str(caught.value).rstrip(".").rsplit(" ", 1)[1])
    (setting,) = change
    fits = checked(recipe.changed({setting: value}), None).memory.n_bytes
    assert 1_700_000_000 < fits <= 2_000_000_000


def test_what_cannot_fit_on_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plans, "free_disk", lambda _: 1_000_000)
    with pytest.raises(CosaeError, match=r"1 MB are free.*Choose another place with --out"):
        checked(small(buffer=131072), tmp_path / "run")
    for verb in ("capture", "plan"):
        more = ("capture",) if verb == "plan" else ()
        with pytest.raises(SystemExit) as stopped:
            main([verb, *more, "--tokens", "100000", "--held-out-tokens", "1000", "--out", str(tmp_path / "s")])
        assert stopped.value.code == 2
        assert "Lower --tokens from 100000 to" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_capture_from_python_looks_at_the_room_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "free_disk", lambda _: 1_000_000)
    asked = Capture(DataConfig(), ("resid_post.0",), tokens=100_000, held_out_tokens=0)
    with pytest.raises(CosaeError, match=r"of the disk at .*Lower --tokens from 100000 to"):
        capture_stores(asked, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_run_goes_on_only_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints take no further room, and a buffer whose size decides the weights is not to be lowered."""
    out, recipe = tmp_path / "run", small(buffer=4096).changed({"training.checkpoint_every": 2})
    with monkeypatch.context() as patch:
        patch.setattr("cosae.run.execute.calibrate", _no_room)
        with pytest.raises(OSError, match="no room"):
            execute(recipe, out, logs=Logs(False))
    kept = sum(path.stat().st_size for path in (out / "checkpoints").rglob("*.safetensors"))
    needed = total(checked(recipe, out).disk)
    assert 0 < kept < needed
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(plans, "free_memory", lambda _: 1000)
        with pytest.raises(CosaeError, match="of the memory") as caught:
            resume(out, Logs(False))
        assert "training." not in str(caught.value)
        assert str(caught.value).endswith("Choose a machine or a moment with more memory free.")
    with monkeypatch.context() as patch:
        patch.setattr(plans, "free_disk", lambda _: needed - kept - 1)
        with pytest.raises(CosaeError, match=r"of the disk at .*Choose another place"):
            resume(out, Logs(False))
    assert contents(out) == before
    monkeypatch.setattr(plans, "free_disk", lambda _: needed - kept)
    assert set(resume(out, Logs(False)).saes) == {arm.name for arm in recipe.arms}


def _no_room(*_: object, **__: object) -> None:
    raise OSError("no room")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_rows_that_are_already_on_disk_need_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Capture(DataConfig(), ("resid_post.0",), tokens=10_000, held_out_tokens=0, dtype="float32")
    needed = total(check_capture(wanted, tmp_path).disk)
    monkeypatch.setattr(plans, "free_disk", lambda _: needed // 2)
    with pytest.raises(CosaeError, match="of the disk"):
        check_capture(wanted, tmp_path)
    (tmp_path / "train-00000.safetensors").write_bytes(bytes(needed // 2 + 1))
    check_capture(wanted, tmp_path)


def test_advice_where_no_single_number_is_enough() -> None:
    choices = [Choice("a", 100, 10, lambda v: 1000 + v), Choice("b", 5, 5, lambda _: 2000)]
    with pytest.raises(CosaeError, match="lower a together"):
        check_fits([Item("all", 1100)], choices, 500, "memory", "a smaller model")
    with pytest.raises(CosaeError, match=r"\(1.5 kB\).*smaller model"):
        check_fits([Item("the model", 1500)], [], 500, "memory", "a smaller model")


def test_a_planned_run_is_not_changed_by_its_plan(tmp_path: Path) -> None:
    """The sample draws from no generator that the run uses."""
    recipe = small()
    torch.manual_seed(0)
    plan = plan_run(recipe, tmp_path / "run")
    assert plan.time is not None
    assert list(plan.time.parts) == [
        "loading model and text",
        "first window",
        "initialising",
        "filling buffer",
        "reading the stream",
        "steps of standard",
        "steps of cosine",
        "reading held-out activations",
        "calibrating thresholds",
        "measuring",
    ]
    assert all(seconds > 0 for name, seconds in plan.time.parts.items() if name != "filling buffer")
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))
    assert not (tmp_path / "run").exists()
    assert "tokens a second: stream" in screen(plan)
    longer = plan_run(replace(recipe, training=replace(recipe.training, steps=4000)), None)
    assert longer.time is not None
    assert longer.time.parts["steps of standard"] > 50 * plan.time.parts["steps of standard"]


@pytest.mark.parametrize("verb", [["plan"], ["plan", "train"], ["train", "--dry-run"]], ids=" ".join)
def test_the_command_line_plans(verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = ["--world", "none:n_features=64,d_in=16", "--steps", "10", "--d-sae", "64", "--out", str(out), "--quiet"]
    options += ["--set", "training.buffer_tokens=4096", "filter.window_tokens=2048"]
    options += ["training.optimizer.warmup_steps=2"]
    with pytest.raises(SystemExit) as stopped:
        main([*verb, *options])
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.err) == (0, "")
    for line in ("memory: about", "disk: about", "time: about", "the shuffle buffer", "steps of standard_unit_frame"):
        assert line in printed.out
    assert not out.exists()
