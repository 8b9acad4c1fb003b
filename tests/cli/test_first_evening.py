"""What a newcomer types first: runs named by their folder, sizes that contradict, a disk that is full, few steps."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cosae
from cosae.cli import main
from cosae.errors import CosaeError
from cosae.evaluate.verdict import verdict
from cosae.recipe import Recipe
from cosae.run import folder
from cosae.run.audit import run_audit
from cosae.run.evaluate import evaluate
from cosae.run.plan import check as plans
from cosae.run.requests import EvalRequest
from cosae.shown import counted

WORLD = "log_normal:sigma=0.5,d_in=12,n_features=24,l0=2"
SMALL = ["--world", WORLD, "--d-sae", "24", "--k", "3", "--batch", "32", "--steps", "2", "--quiet", "--set"]
SIZES = ["filter.window_tokens=200", "training.buffer_tokens=128", "evaluation.held_out_tokens=200"]
SIZES += ["evaluation.calibration_tokens=200", "training.optimizer.warmup_steps=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two SAEs on vectors, and the file of the vectors beside it."""
    folder = tmp_path_factory.mktemp("first")
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(1500, 12, generator=generator)
    sizes: dict[str, Any] = {"filter__window_tokens": 200, "training__buffer_tokens": 256, "batch_tokens": 32}
    sizes |= {"evaluation__held_out_tokens": 100, "evaluation__calibration_tokens": 100, "steps": 5}
    cosae.fit(x_ND, ["standard", "cosine"], out=folder / "run", d_sae=24, k=3, evaluate=False, **sizes)
    import numpy as np

    np.save(folder / "x.npy", x_ND.numpy())
    return folder / "run"


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return int(end.value.code or 0)


def test_audit_eval_and_inspect_take_the_folder_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = EvalRequest(activations=str(run.parent / "x.npy"), tokens=500)
    names = ["cosine", "standard"]
    assert [one["name"] for one in run_audit([run], request)["saes"]] == names
    assert sorted(evaluate("reconstruction", [str(run)], request)["saes"]) == names
    single = evaluate("reconstruction", [f"A={run / 'arms' / 'cosine'}"], request)
    assert list(single["saes"]) == ["A"]
    with pytest.raises(CosaeError, match=r"holds several SAEs: name one of them: .*arms/cosine"):
        evaluate("reconstruction", [f"A={run}"], request)
    assert status("inspect", str(run)) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {name: one["score"] for name, one in shown.items()} == {"cosine": "cosine", "standard": "inner"}
    assert status("inspect", str(run / "arms" / "cosine")) == 0
    assert json.loads(capsys.readouterr().out) == shown["cosine"]


def test_a_run_that_has_not_ended_holds_no_saes_yet(tmp_path: Path) -> None:
    Recipe().write(tmp_path / "recipe.json")
    with pytest.raises(CosaeError, match=r"without finished SAEs.*resume"):
        run_audit([tmp_path], EvalRequest(activations="x.npy"))


@pytest.mark.parametrize("k", [25, 10**5, 10**12, 2**70])
@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_k_above_the_width_says_so_whatever_its_size(
    k: int, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [str(k) if value == "3" else value for value in SMALL]
    assert status(verb, "--out", str(tmp_path / "run"), *small, *SIZES) == 2
    assert "k must be at most d_sae = 24" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_full_disk_asks_for_another_place_and_not_for_fewer_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plans, "free_disk", lambda _: 100_000)
    wide = ["4096" if value == "24" else value for value in SMALL]
    assert status("train", "--out", str(tmp_path / "run"), *wide, *SIZES) == 2
    said = capsys.readouterr().err
    assert "of the disk at" in said
    assert "Choose another place with --out" in said
    assert "d_sae" not in said
    assert "buffer_tokens from" not in said


@pytest.mark.parametrize("verb", [["audit"], ["eval", "reconstruction"]], ids=" ".join)
def test_a_disk_that_fills_up_is_no_run_to_resume(
    verb: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder, "write_text", full)
    data = ["--activations", str(run.parent / "x.npy"), "--tokens", "100", "--out", str(tmp_path / "out")]
    assert status(*verb, str(run), *data, "--quiet") == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "choose another --out" in said
    assert "resume" not in said


def test_one_step_is_a_run_with_exponents_that_hardly_differ(tmp_path: Path) -> None:
    one = ["training.steps=1", "training.optimizer.lr=1e-9"]
    arguments = ["--out", str(tmp_path / "run"), "--arms", "cosine_per_feature", *SMALL, *SIZES, *one]
    assert status("train", *arguments) == 0


def test_the_plan_of_a_capture_counts_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("plan", "capture", "--tokens", "1", "--held-out-tokens", "2000", "--quiet") == 0
    assert "1 training token and 2,000 held-out" in capsys.readouterr().out


def test_steps_within_the_warm_up_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = [value for value in SIZES if "warmup" not in value]
    assert status("train", "--out", str(tmp_path / "run"), *SMALL, *short, "--dry-run") == 0
    assert "warning: of 2 steps the first 100 are the warm-up" in capsys.readouterr().err
    assert Recipe().warnings == []
    assert Recipe().changed({"training.steps": 124}).warnings != []
    assert Recipe().changed({"training.steps": 125}).warnings == []


@pytest.mark.parametrize(
    ("fooled", "numbers"),
    [
        ("no", {"invariant": True, "sinks_out": {"share": 0.0}}),
        ("no", {"invariant": False, "sinks_out": {"share": 0.01}}),
        ("yes", {"invariant": False, "sinks_out": {"share": 0.5}}),
        ("unknown", {"invariant": False, "sinks_out": {"share": None}}),
    ],
)
def test_no_headline_is_silent_on_a_reconstruction_worse_than_the_mean(fooled: str, numbers: dict[str, Any]) -> None:
    for fve, worse in ((-0.5, True), (0.9, False), (None, False)):
        said = verdict({"norm_driven": numbers, "reconstruction": {"sinks_out": {"fve": fve}}})
        assert said["fooled"] == fooled
        assert ("worse than their mean" in said["because"]) is worse


def test_one_thing_is_no_things() -> None:
    assert [counted(n, "document") for n in (0, 1, 2, 12_000)] == [
        "0 documents", "1 document", "2 documents", "12,000 documents"
    ]  # fmt: skip
    assert counted(2, "batch") == "2 batches"


def test_a_folder_with_one_document_is_told_in_the_singular(tmp_path: Path) -> None:
    from cosae.text.documents import read_documents

    (tmp_path / "one.txt").write_text("   \n")
    with pytest.raises(CosaeError, match="Got 1 document, none with text"):
        list(read_documents(str(tmp_path)))
