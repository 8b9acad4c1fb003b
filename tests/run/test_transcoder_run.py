"""Transcoders from end to end: pairs from a model, a store, files and tensors; resumed to the bit; measured."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from cosae.cli import main
from cosae.errors import CosaeError
from cosae.models.capture import capture
from cosae.recipe import Recipe
from cosae.run.capture.request import Capture
from cosae.run.capture.stores import capture_stores
from cosae.run.dataset.open import dataset_of
from cosae.run.evaluate import evaluate
from cosae.run.execute import Logs, execute, resume
from cosae.run.fit import fit
from cosae.run.requests import EvalRequest
from cosae.sae.file import load
from cosae.train import log
from cosae.train.loop import Interrupted

QUIET = Logs(progress=False)
SMALL = {
    "evaluation.held_out_tokens": 1500,
    "evaluation.calibration_tokens": 1000,
    "evaluation.probing": False,
    "evaluation.resamples": 20,
    "filter.window_tokens": 1500,
    "training.steps": 12,
    "training.batch_tokens": 64,
    "training.buffer_tokens": 1024,
    "training.checkpoint_every": 5,
    "data.context": 64,
    "data.chunk_sequences": 16,
    "data.site": "mlp_in.3",
    "data.target": "mlp_out.3",
    "d_sae": 64,
    "k": 4,
}
ARMS = ("standard", "cosine,frame=unit,target_frame=input,skip=true,name=skip")


def recipe(**changes: object) -> Recipe:
    from cosae.train.arm import parse_arm

    return Recipe().changed({**SMALL, "arms": tuple(map(parse_arm, ARMS)), **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    execute(recipe(), out, logs=QUIET)
    return out


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both sites, captured by one command."""
    out = tmp_path_factory.mktemp("stores") / "pair"
    request = Capture(recipe().data, ("mlp_in.3", "mlp_out.3"), 3000, 2600, dtype="float32")
    capture_stores(request, out)
    return out


def call(*arguments: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert not end.value.code


def weights(run: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(run.glob("arms/*/sae_weights.safetensors"))}


def test_pairs_come_from_one_pass_and_stay_together() -> None:
    with dataset_of(recipe()) as data:
        chunk = next(data.source.chunks())
        sample = data.sample("held_out", 1500)
        mlp = data.model.get_submodule(data.target.module_path)
        for found in (chunk, sample.activations):
            assert found.y_ND is not None
            with torch.no_grad():
                torch.testing.assert_close(mlp(found.x_ND), found.y_ND, rtol=1e-4, atol=1e-4)
        again = capture(data.model, data.sequences("held_out", 1500), ["mlp_in.3", "mlp_out.3"])
        assert again["mlp_out.3"].x_ND.shape[1] == data.d_out


def test_interrupted_and_resumed_to_the_bit(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = log.TrainingDisplay.step, itertools.count(1)

    def stepped(self: log.TrainingDisplay) -> None:
        real(self)
        if next(count) == 7:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(log.TrainingDisplay, "step", stepped)
    with pytest.raises(Interrupted):
        execute(recipe(), tmp_path / "run", logs=QUIET)
    monkeypatch.undo()
    resume(tmp_path / "run", QUIET)
    assert weights(tmp_path / "run") == weights(whole)
    digests = {json.loads((run / "run.json").read_text())["stream_digest"] for run in (whole, tmp_path / "run")}
    assert len(digests) == 1


def test_a_run_says_what_it_reconstructs(whole: Path) -> None:
    record = json.loads((whole / "run.json").read_text())
    assert record["source"]["target"]["name"] == record["recipe"]["data"]["target"] == "mlp_out.3"
    sae = load(whole / "arms" / "skip")
    assert (sae.metadata["site"], sae.metadata["target"]) == ("mlp_in.3", "mlp_out.3")
    assert sae.cfg.skip
    assert sae.cfg.d_out == sae.decoder.rows_FD.shape[1]
    measured = json.loads((whole / "evaluation.json").read_text())["reconstruction"]
    with dataset_of(recipe()) as data:
        found = data.sample("held_out", 1500).activations
    assert found.y_ND is not None
    residual = (found.y_ND - sae(found.x_ND).detach()).double().square().sum()
    total = (found.y_ND.double() - found.y_ND.double().mean(0)).square().sum()
    assert measured["skip"]["sinks_in"]["fve"] == pytest.approx(1 - float(residual / total), abs=1e-5)


def test_a_pair_of_stores_is_read_as_a_pair(stores: Path, tmp_path: Path) -> None:
    from_store = recipe().changed({"data.target": None, "data.site": "resid_post.5"})
    asked = from_store.changed(
        {"data.store": str(stores), "data.store_site": "mlp_in.3", "data.target": "mlp_out.3", "data.context": 256}
    )
    with dataset_of(asked) as data, dataset_of(recipe()) as live:
        chunk = next(data.source.chunks())
        assert chunk.y_ND is not None
        mlp = live.model.get_submodule("model.layers.3.mlp")
        with torch.no_grad():
            torch.testing.assert_close(mlp(chunk.x_ND), chunk.y_ND, rtol=1e-4, atol=1e-4)
    execute(asked, tmp_path / "run", logs=QUIET)
    found = evaluate(
        "reconstruction", [str(tmp_path / "run")], EvalRequest(store=str(stores), store_site="mlp_in.3", tokens=500)
    )
    assert set(found["found"]["saes"]) == {"standard", "skip"}


def test_stores_of_other_tokens_make_no_pair(stores: Path, tmp_path: Path) -> None:
    other = tmp_path / "pair"
    request = Capture(recipe().data, ("mlp_out.3",), 2000, 2600, dtype="float32")
    capture_stores(request, other / "mlp_out.3")
    (other / "mlp_in.3").symlink_to(stores / "mlp_in.3")
    asked = Recipe().changed({"data.store": str(other), "data.store_site": "mlp_in.3", "data.target": "mlp_out.3"})
    with pytest.raises(CosaeError, match=r"not hold the same tokens .*tokens.*one\s+command"):
        dataset_of(asked)


def test_files_and_tensors(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    x_ND = torch.randn(2000, 8, generator=draw)
    y_ND = (x_ND @ torch.randn(8, 5, generator=draw)).relu()
    small = {"d_sae": 32, "k": 4, "steps": 30, "batch_tokens": 64, "progress": False}
    run = fit(x_ND, ["cosine"], target=y_ND, **small)
    assert run.saes["cosine"](x_ND).shape == (2000, 5)
    assert run.saes["cosine"].metadata["source"]["target"]["d_out"] == 5
    np.save(tmp_path / "x.npy", x_ND.numpy())
    np.save(tmp_path / "y.npy", y_ND.numpy())
    arguments = ["--activations", str(tmp_path / "x.npy"), "--target", str(tmp_path / "y.npy"), "--quiet"]
    sizes = ["--arms", "cosine", "--d-sae", "32", "--k", "4", "--steps", "30", "--batch", "64"]
    sizes += ["--set", "training.buffer_tokens=512", "filter.window_tokens=512"]
    call("train", *arguments, *sizes, "--out", str(tmp_path / "run"))
    assert load(tmp_path / "run" / "arms" / "cosine").d_out == 5
    with pytest.raises(CosaeError, match=r"a row for each of 2000 activations. Got 1999"):
        fit(x_ND, ["cosine"], target=y_ND[:-1], **small)
    with pytest.raises(CosaeError, match=r"target.* must be finite"):
        fit(x_ND, ["cosine"], target=y_ND / 0, **small)
    with pytest.raises(CosaeError, match="linear skip is for a transcoder"):
        fit(x_ND, ["cosine,skip=true"], **small)
    with pytest.raises(CosaeError, match=r"another site than mlp_in.3"):
        execute(recipe(**{"data.target": "mlp_in.3"}), None, logs=QUIET)


def test_saved_transcoders_are_spliced_and_audited(whole: Path, tmp_path: Path) -> None:
    spliced = evaluate("splice", [str(whole / "arms" / "skip")], EvalRequest(tokens=400))
    assert spliced["found"]["target"] == "mlp_out.3"
    call("audit", str(whole / "arms" / "skip"), "--tokens", "500", "--out", str(tmp_path / "audit"), "--quiet")
    audited = json.loads((tmp_path / "audit" / "audit.json").read_text())["saes"][0]
    assert audited["sae"]["d_out"] == load(whole / "arms" / "skip").d_out
    with pytest.raises(CosaeError, match="this is a transcoder"):
        evaluate("causal", [str(whole / "arms" / "skip")], EvalRequest(tokens=400))
