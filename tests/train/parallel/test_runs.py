"""Whole runs by several processes: the same folder as one process writes, at any mesh, and what stops all of them."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cosae import load
from cosae.activations.synthetic import World
from cosae.errors import CosaeError
from cosae.recipe import Recipe
from cosae.run.execute import Logs, execute, resume
from cosae.train.arm import parse_arm
from cosae.train.parallel.config import ParallelConfig
from tests.support.ranks import answers, run_ranks, start_ranks

QUIET = Logs(progress=False)


def recipe_of(mesh: str = "", **more: Any) -> Recipe:
    """A small run; 100 rows of a batch are uneven on three ranks."""
    changes = {
        "data.world": World.parse("log_normal:n_features=24,d_in=8,l0=3"), "d_sae": 24, "k": 3,
        "arms": tuple(map(parse_arm, ("standard", "cosine_per_feature,selector=topk,name=topk"))),
        "filter.window_tokens": 512, "training.steps": 12, "training.batch_tokens": 100,
        "training.buffer_tokens": 1024, "training.optimizer.warmup_steps": 2, "training.dead_after_tokens": 400,
        "training.log_every": 4, "training.checkpoint_every": 5, "evaluation.held_out_tokens": 512,
        "evaluation.calibration_tokens": 256, "evaluation.resamples": 5, "parallel": ParallelConfig.parse(mesh),
    }  # fmt: skip
    return Recipe().changed({**changes, **more})


def train(recipe: Recipe, out: Path) -> int:
    return len(execute(recipe, out, logs=QUIET).saes)


def train_in_turn(recipes: list[tuple[Recipe, Path]]) -> list[int]:
    return [train(recipe, out) for recipe, out in recipes]


def go_on(out: Path, mesh: str) -> int:
    return len(resume(out, QUIET, parallel=ParallelConfig.parse(mesh)).saes)


def assert_same_run(one: Path, other: Path) -> None:
    """The same stream, metrics and SAEs, to rounding."""
    runs = [json.loads((out / "run.json").read_text()) for out in (one, other)]
    assert runs[0]["status"] == runs[1]["status"] == "finished"
    assert runs[0]["stream_digest"] == runs[1]["stream_digest"]
    lines = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (one, other)]
    for mine, theirs in zip(*lines, strict=True):
        assert list(mine["arms"]) == list(theirs["arms"])
        for name, numbers in mine["arms"].items():
            for key, value in numbers.items():
                same = value is None or value == pytest.approx(theirs["arms"][name][key], rel=1e-4, abs=1e-6)
                assert same, (mine["step"], name, key)
    for name in runs[0]["arms"]:
        saes = [load(out / "arms" / name) for out in (one, other)]
        for (key, mine), theirs in zip(saes[0].state_dict().items(), saes[1].state_dict().values(), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4, equal_nan=True), (name, key)


def shorten(out: Path) -> None:
    """Leave the run as it was when the checkpoint at step 5 had been written, and say that it was interrupted."""
    for place in (out / "checkpoints").glob("step_*"):
        if place.name > "step_000000005":
            (place / "checkpoint.json").write_text("damaged")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    train(recipe_of(), out)
    return out


def test_two_processes_write_what_one_writes(one: Path, tmp_path: Path) -> None:
    """Along each axis; only the first process has SAEs to hand on."""
    meshes = ("data=2", "feature=2", "arm=2")
    runs = [(recipe_of(mesh), tmp_path / mesh) for mesh in meshes]
    assert run_ranks(2, tmp_path / "ranks", train_in_turn, runs) == [[2, 2, 2], [0, 0, 0]]
    for _, out in runs:
        assert_same_run(one, out)
    parts = {path.name for path in (tmp_path / "feature=2/checkpoints/step_000000012").iterdir()}
    assert {"arm.standard@0of2.safetensors", "arm.standard@1of2.safetensors"} < parts
    whole = load_file(tmp_path / "data=2/checkpoints/step_000000012/arm.standard.safetensors")
    half = load_file(tmp_path / "feature=2/checkpoints/step_000000012/arm.standard@1of2.safetensors")
    assert half["optimizer.mean.score.rows_FD"].shape == (12, 8)
    assert torch.allclose(half["sae.score.rows_FD"], whole["sae.score.rows_FD"][12:], atol=1e-4)


def test_the_world_must_fit_the_mesh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CosaeError, match="needs 2 processes: start it with `torchrun"):
        train(recipe_of("data=2"), tmp_path / "run")
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CosaeError, match="4 processes, and the mesh data=2 has 2"):
        train(recipe_of("data=2"), tmp_path / "run")
    with pytest.raises(CosaeError, match="arm=3 needs as many arms"):
        train(recipe_of("arm=3"), tmp_path / "run")
    for text in ("data", "data=x", "rows=2", "data=1,data=2"):
        with pytest.raises(CosaeError, match="--parallel takes"):
            ParallelConfig.parse(text)


def other_seed(out: Path) -> None:
    train(recipe_of("data=2", **{"training.seed": int(os.environ["RANK"])}), out)


def no_sense(out: Path) -> None:
    train(recipe_of("feature=2", d_sae=25), out)


def fails_on_one(out: Path) -> None:
    """The second rank's third step raises."""
    if os.environ["RANK"] == "1":
        from cosae.train import loop

        step = loop.train_step

        def broken(*args: Any) -> Any:
            if args[2] == 3:
                raise CosaeError("the disk caught fire")
            return step(*args)

        loop.train_step = broken
    train(recipe_of("data=2"), out)


def refused(folder: Path, call: Any) -> list[tuple[str, str]]:
    """(kind, sentence) of what ended each of two ranks."""
    context, _store = start_ranks(2, folder, call, folder / "run")
    found = answers(context, 2, folder)
    assert all(one is not None and not one[0] for one in found)
    return [one[1][:2] for one in found if one is not None]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (other_seed, "rank 1 of 2 differs from rank 0 in training.seed"),
        (no_sense, "feature=2 must divide the width"),
        (fails_on_one, "the disk caught fire"),
    ],
)
@pytest.mark.slow
def test_one_sentence_ends_all(call: Any, sentence: str, tmp_path: Path) -> None:
    """One rank says it, the others leave quietly."""
    ends = refused(tmp_path, call)
    assert sorted(kind for kind, _ in ends) == ["CosaeError", "SystemExit"]
    (said,) = [text for kind, text in ends if kind == "CosaeError"]
    assert sentence in said


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_run_goes_on(one: Path, tmp_path: Path) -> None:
    """At other meshes to rounding, at the same mesh to the bit."""
    out = tmp_path / "run"
    recipe = recipe_of("data=2", **{"training.steps": 4000})
    context, _store = start_ranks(2, tmp_path / "ranks", train, recipe, out)
    while not list((out / "checkpoints").glob("step_*")):
        time.sleep(0.05)
    os.kill(context.processes[1].pid, signal.SIGKILL)
    began = time.monotonic()
    found = answers(context, 2, tmp_path / "ranks")
    assert time.monotonic() - began < 60
    assert found[1] is None
    assert found[0] is not None
    assert "rank 1 of 2 ended without a word" in found[0][1][1]
    assert "cosae resume" in found[0][1][1]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("", "data=2"), ("data=2", "feature=2"), ("feature=2", ""), ("arm=2", "")])
def test_a_run_goes_on_at_another_mesh(one: Path, first: str, then: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    begun, mesh = recipe_of(first), ParallelConfig.parse(then)
    if begun.parallel.n == 1:
        train(begun, out)
    else:
        run_ranks(2, tmp_path / "first", train, begun, out)
    shorten(out)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    if mesh.n == 1:
        go_on(out, then)
    else:
        run_ranks(2, tmp_path / "then", go_on, out, then)
    assert_same_run(one, out)


@pytest.mark.slow
def test_the_same_mesh_goes_on_to_the_bit(tmp_path: Path) -> None:
    recipe = recipe_of("data=2,feature=2")
    run_ranks(4, tmp_path / "a", train, recipe, tmp_path / "whole")
    run_ranks(4, tmp_path / "b", train, recipe, tmp_path / "cut")
    shorten(tmp_path / "cut")
    record = json.loads((tmp_path / "cut/run.json").read_text())
    (tmp_path / "cut/run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    run_ranks(4, tmp_path / "c", go_on, tmp_path / "cut", "data=2,feature=2")
    last = "checkpoints/step_000000012"
    for file in (tmp_path / "whole" / last).glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "cut" / last / file.name).read_bytes(), file.name
