"""`cosae calibrate`, and how audit and eval say that a threshold was set on another text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cosae
from cosae.cli import main
from cosae.errors import CosaeError
from cosae.evaluate.l0 import beside_calibrated
from cosae.interop.dictionary_learning.write import write as write_dictionary
from cosae.io.digest import file_digest
from cosae.run.audit import run_audit
from cosae.run.evaluate import evaluate
from cosae.run.explore.calibrate import recalibrate
from cosae.run.requests import EvalOptions, EvalRequest
from cosae.sae.calibrate import calibrate, measure_l0, to_jumprelu
from tests.support.small_stores import rows, write_store

D, K = 12, 4


def vectors(scale: float, seed: int, n: int = 3000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, D, generator=generator)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Activations half as long again as those that the SAE was calibrated on: an inner product fires more on them."""
    np.save(tmp_path / "other.npy", vectors(1.5, 1).numpy())
    return tmp_path / "other.npy"


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    sae = cosae.SAE.build(d_in=D, d_sae=30, score="inner", selector="batch_topk", k=K, seed=0, sample=vectors(1, 0))
    found = calibrate(sae, vectors(1, 0))
    sae.metadata = {"l0_target": found.target, "l0_calibrated": found.l0, "kept": "as it was"}
    return cosae.save(sae, tmp_path / "trained")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.iterdir())}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    return int(done.value.code or 0)


def test_the_new_file_fires_as_often_as_asked_on_the_new_text(
    trained: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(trained)
    arguments = ["--activations", str(other), "--tokens", "1500", "--quiet"]
    assert run("calibrate", str(trained), "--out", str(tmp_path / "new"), *arguments) == 0
    shown = capsys.readouterr().out
    assert digests(trained) == before
    old, new = cosae.load(trained), cosae.load(tmp_path / "new")
    x_ND = vectors(1.5, 1)
    assert measure_l0(old, x_ND) > 1.2 * K
    assert measure_l0(new, x_ND) == pytest.approx(K, rel=0.05)
    known = new.metadata
    assert known["l0_calibrated"] == pytest.approx(K, abs=0.01)
    assert known["calibrated_on"]["activations"] == str(other)
    assert known["calibration_tokens"] == 1500
    assert known["kept"] == "as it was"
    assert torch.equal(old.W_dec, new.W_dec)
    assert "before" in shown
    assert "after" in shown

    found = recalibrate(trained, EvalRequest(activations=str(other), tokens=1500), tmp_path / "again", k=7)
    assert cosae.load(tmp_path / "again").metadata["l0_target"] == 7
    assert found.before is not None
    assert found.before["sinks_out"]["l0"] > 1.2 * K
    assert found.after["sinks_out"]["l0"] == pytest.approx(7, rel=0.06)
    assert found.after["sinks_out"]["fve"] != found.before["sinks_out"]["fve"]


@pytest.mark.parametrize("selector", ["topk", "batch_topk"])
def test_as_jumprelu_each_feature_fires_as_often(
    selector: str, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x_ND = vectors(1.5, 1)
    sae = cosae.SAE.build(D, 30, "cosine", selector, K, 0, sample=vectors(1, 0))
    calibrate(sae, vectors(1, 0))
    new = to_jumprelu(sae, x_ND)
    counts = [torch.bincount(one.encode(x_ND).feature_E, minlength=30) for one in (sae, new)]
    assert torch.equal(*counts)
    assert bool((counts[0] > 0).any())
    assert (new.cfg.selector, new.d_sae, torch.equal(new.W_dec, sae.W_dec)) == ("jumprelu", 30, True)
    few = to_jumprelu(sae, x_ND[:1])  # most fire nowhere there
    assert few.encode(x_ND[:1]).feature_E.tolist() == sae.encode(x_ND[:1]).feature_E.tolist()
    assert bool(few.threshold.isfinite().all())
    cosae.save(sae, tmp_path / "sae")
    asked = ["--activations", str(other), "--tokens", "1500", "--jumprelu", "--quiet"]
    assert run("calibrate", str(tmp_path / "sae"), "--out", str(tmp_path / "new"), *asked) == 0
    assert "before" in capsys.readouterr().out
    written = cosae.load(tmp_path / "new")
    assert written.cfg.selector == "jumprelu"
    assert written.metadata["l0_calibrated"] == pytest.approx(written.metadata["l0_target"])
    assert run("calibrate", str(tmp_path / "new"), "--out", str(tmp_path / "no"), *asked) == 2
    assert "Got the selector jumprelu" in capsys.readouterr().err
    assert run("calibrate", str(tmp_path / "sae"), "--out", str(tmp_path / "no"), "--k", "3", *asked) == 2
    assert "drop --k" in capsys.readouterr().err


def test_audit_and_eval_show_both_numbers(trained: Path, other: Path, tmp_path: Path) -> None:
    request = EvalRequest(activations=str(other), tokens=2000)
    new = recalibrate(trained, request, tmp_path / "new").out
    for path, level in ((trained, "look"), (new, "ok")):
        (one,) = run_audit([path], request)["saes"]
        (line,) = [line for line in one["lines"] if line["topic"] == "calibrated L0"]
        assert line["level"] == level
        assert ("cosae calibrate" in line["sentence"]) == (level == "look")
        assert "4.0 on the text" in line["evidence"]
        assert "with sinks" in line["evidence"]
        found = evaluate("reconstruction", [f"A={path}"], request)
        assert found["l0"]["A"]["differs"] == (level == "look")
        assert ("cosae calibrate" in found["warnings"].get("A", "")) == (level == "look")
    assert evaluate("geometry", [f"A={trained}"], request)["l0"] == {}


def test_labelled_texts_are_text_too(tmp_path: Path) -> None:
    texts = tmp_path / "t.jsonl"
    lines = [{"text": f"{'import' if i % 2 else 'a letter to'} number {i}", "label": i % 2} for i in range(120)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in lines))
    sae = cosae.SAE.build(d_in=192, d_sae=256, selector="topk", k=3, seed=0)
    sae.metadata = {"model": "embedded", "site": "resid_post.1", "l0_calibrated": 9.0}
    cosae.save(sae, tmp_path / "sae")
    options = EvalOptions(texts=(str(texts),), seeds=1, max_texts=60)
    found = evaluate("probing", [f"A={tmp_path / 'sae'}"], EvalRequest(tokens=200), options)
    assert found["l0"]["A on t"] == {"sinks_in": 3.0, "sinks_out": 3.0, "calibrated": 9.0, "differs": True}


def test_twenty_per_cent_either_way_is_a_difference() -> None:
    known = {"l0_calibrated": 10.0}
    assert [beside_calibrated({"sinks_out": v}, known)["differs"] for v in (7.9, 8.1, 11.9, 12.1)] == [
        *(True, False, False, True)
    ]
    assert beside_calibrated({"sinks_out": 5.0}, {})["differs"] is False


def test_a_foreign_sae_becomes_one_of_ours(trained: Path, other: Path, tmp_path: Path) -> None:
    theirs = write_dictionary(cosae.load(trained), tmp_path / "theirs")
    request = EvalRequest(activations=str(other), tokens=1500)
    recalibrate(theirs, request, tmp_path / "ours", k=5)
    ours = cosae.load(tmp_path / "ours")
    assert ours.metadata["format"] == "dictionary_learning"
    assert ours.metadata["l0_calibrated"] == pytest.approx(5, abs=0.01)


def test_a_store_sets_a_threshold(trained: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_store(store, rows(200, D), rows(900, D, document=0))
    recalibrate(trained, EvalRequest(store=str(store), tokens=400), tmp_path / "new")
    assert cosae.load(tmp_path / "new").metadata["calibrated_on"]["store"] == str(store)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"out": "trained"}, "replaces nothing"),
        ({"request": {"inject": "log_normal:sigma=1"}}, "drop --inject"),
        ({"k": 31}, "at most d_sae = 30"),
        ({"k": 0}, "above 0"),
        ({"k": float("nan")}, "above 0"),
        ({"topk": True}, "no threshold to calibrate"),
        ({"guessed": True}, "give --k"),
    ],
)
def test_what_cannot_be_is_refused(
    change: dict[str, Any], word: str, trained: Path, other: Path, tmp_path: Path
) -> None:
    if "topk" in change or "guessed" in change:
        sae = cosae.SAE.build(d_in=D, d_sae=30, selector="topk" if "topk" in change else "jumprelu", k=K, seed=0)
        sae.metadata = {"k_guessed": True}
        trained = cosae.save(sae, tmp_path / "another")
    request = EvalRequest(activations=str(other), tokens=400, **change.get("request", {}))
    out = tmp_path / change.get("out", "new")
    before = digests(trained)
    with pytest.raises(CosaeError, match=word):
        recalibrate(trained, request, out, change.get("k"))
    assert digests(trained) == before
    assert out.exists() == ("out" in change)
