"""A whole run on a language model made on disk: text folder and embedded corpus, both ends of the split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cosae
from cosae.errors import CosaeError
from cosae.run.dataset import corpus as module
from cosae.run.dataset.base import DataUse
from cosae.run.dataset.model import ModelDataset
from cosae.run.dataset.open import dataset_of
from cosae.run.execute import execute, resume
from cosae.text.documents import read_documents
from cosae.train import log
from cosae.train.arm import ARMS
from cosae.train.loop import Interrupted
from tests.support.tiny_model_runs import recipe, save_tokenizer, write_texts
from tests.support.tiny_models import make_model
from tests.support.tiny_runs import QUIET, assert_same_run


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_model(request.param).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def test_a_folder_of_texts_end_to_end(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    run = execute(recipe(model_folder, texts), tmp_path / "run", logs=QUIET)
    assert run.evaluation is not None
    assert run.evaluation["probing"] is None
    assert run.evaluation["norms"]["sinks"] > 0  # BOS at position 0
    for name, row in run.evaluation["reconstruction"].items():
        assert row["sinks_out"]["fve"] > 0
        assert row["sinks_out"]["tokens"] < row["sinks_in"]["tokens"]
        loaded = cosae.load(tmp_path / "run" / "arms" / name)
        assert (loaded.metadata["site"], loaded.metadata["model"]) == ("resid_post.2", str(model_folder))
        assert loaded.metadata["hook_name"] == "blocks.2.hook_resid_post"
    assert {arm["stream_digest"] for arm in run.run["arms"].values()} == {run.run["stream_digest"]}


def test_interrupted_and_resumed_on_a_model(
    model_folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = recipe(model_folder, texts)
    execute(small, tmp_path / "whole", logs=QUIET)
    real, count = log.TrainingDisplay.step, [0]

    def stepped(self: log.TrainingDisplay) -> None:
        real(self)
        count[0] += 1
        if count[0] == 7:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(log.TrainingDisplay, "step", stepped)
    with pytest.raises(Interrupted):
        execute(small, tmp_path / "run", logs=QUIET)
    monkeypatch.undo()
    resume(tmp_path / "run", QUIET)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_train_and_held_out_share_no_document_and_calibration_no_sequence(model_folder: Path, texts: Path) -> None:
    data = dataset_of(recipe(model_folder, texts, **{"evaluation.held_out_tokens": 10**6}))
    train, held_out, calibration = (data.sample(split, 400) for split in ("train", "held_out", "calibration"))
    assert train.documents
    assert held_out.documents
    assert not set(train.documents) & set(held_out.documents)
    assert not set(train.documents) & set(calibration.documents)
    known = {
        split: {d.name for d in read_documents(str(texts), split, held_out_frac=0.3)} for split in ("train", "held_out")
    }
    assert set(train.documents) <= known["train"]
    assert set(held_out.documents) <= known["held_out"]
    places = [
        set(zip(s.activations.doc_N.tolist(), s.activations.index_N.tolist(), strict=True))
        for s in (held_out, calibration)
    ]
    assert not places[0] & places[1]
    rows = {split: {tuple(row) for row in s.activations.x_ND[s.activations.position_N > 4].tolist()} for split, s in
            (("train", train), ("held_out", held_out))}  # fmt: skip
    assert not rows["train"] & rows["held_out"]


def test_a_corpus_that_is_all_on_one_side_is_refused_before_training(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x y z " * 200)
    for frac in (0.01, 0.99):
        with pytest.raises(CosaeError, match=r"[Cc]orpus") as caught:
            execute(
                recipe(model_folder, tmp_path / "one.txt", **{"data.held_out_frac": frac}), tmp_path / "run", logs=QUIET
            )
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


def test_samples_repeat(model_folder: Path, texts: Path) -> None:
    one, two = (dataset_of(recipe(model_folder, texts, **{"training.seed": 5})) for _ in range(2))
    for split in ("train", "held_out"):
        assert torch.equal(one.sample(split, 200).activations.x_ND, two.sample(split, 200).activations.x_ND)
    assert one.source.describe() == two.source.describe()


def test_the_embedded_corpus_end_to_end(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probing on the corpus' own concepts, a few files of it."""
    real = module.read_documents

    def few(corpus: str, split: str, **named: Any) -> Any:
        found = sorted(real(corpus, split, **named), key=lambda d: len(d.text))
        return iter(found[len(found) // 2 :][:6])

    monkeypatch.setattr(module, "read_documents", few)
    small = recipe(model_folder, "pylib", **{"training.steps": 6, "data.max_chars": 6000})
    run = execute(replace(small, arms=(ARMS["standard"], ARMS["cosine"])), tmp_path / "run", logs=QUIET)
    assert run.evaluation is not None
    for sinks in ("sinks_out", "sinks_in"):
        found = run.evaluation["probing"][sinks]
        assert 0.5 < found["summary"]["standard"]["auroc"]["all"]["auroc"]["mean"] <= 1
    assert run.evaluation["documents"] >= 1


def test_captured_tokens_serve_a_second_run(model_folder: Path, texts: Path) -> None:
    small = recipe(model_folder, texts)
    kept = dataset_of(small, keep_tokens=10_000)
    assert isinstance(kept, ModelDataset)
    plain = execute(small, None, logs=QUIET, measured=False)
    first = execute(small, None, logs=QUIET, measured=False, data=kept)
    injected = small.changed({"perturbation.kind": "log_normal", "name": "loud"})
    second = execute(injected, None, logs=QUIET, measured=False, data=kept.again(DataUse.of(injected)))
    alone = execute(injected, None, logs=QUIET, measured=False)
    assert plain.run["stream_digest"] == first.run["stream_digest"] != second.run["stream_digest"]
    assert second.run["stream_digest"] == alone.run["stream_digest"]
    for a, b in ((plain, first), (second, alone)):
        assert torch.equal(a.saes["cosine"].W_dec, b.saes["cosine"].W_dec)
    with pytest.raises(CosaeError, match="share captured activations"):
        kept.again(DataUse.of(small.changed({"training.steps": 9})))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data.site": "resid_post.9"}, "resid_post.9"),
        ({"data.corpus": "nowhere"}, "nowhere"),
        ({"data.context": 1}, "context must be at least 2"),
        ({"data.packing": "tight"}, "packing must be"),
        ({"data.model_dtype": "int8"}, "int8"),
        ({"data.batch_sequences": 0}, "batch_sequences must be at least 1"),
        ({"data.chunk_sequences": 0}, "chunk_sequences must be at least 1"),
        ({"data.held_out_frac": 0.0}, "held_out_frac"),
        ({"data.held_out_frac": 1.5}, "held_out_frac"),
        ({"data.min_chars": 10**6}, "corpus"),
    ],
    ids=str,
)
def test_what_a_model_run_refuses(
    model_folder: Path, texts: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(CosaeError, match=says) as caught:
        execute(recipe(model_folder, texts, **change), tmp_path / "run", logs=QUIET, measured=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
