"""`cosae eval`: every measurement of saved SAEs through the command line, on a file of vectors and on a model."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch

import cosae
from cosae.cli import main
from cosae.evaluate.context import TextProbes
from cosae.evaluate.probing.encode_texts import encode_texts
from cosae.interop.sae_probes import datasets as sae_probes
from cosae.models.capture import capture
from cosae.recipe import DataConfig
from cosae.run.dataset.open import open_dataset
from cosae.sae.calibrate import calibrate
from cosae.text.labelled import read_labelled
from tests.support.tiny_model_runs import WORDS, save_tokenizer

from tests.support.tiny_models import make_model, make_sequences  # isort: skip

SITE = "resid_post.2"


def sae_of(x_ND: torch.Tensor, score: str, seed: int = 0) -> cosae.SAE:
    options: dict[str, Any] = {"d_sae": 40, "k": 5, "score": score, "seed": seed, "sample": x_ND}
    sae = cosae.SAE.build(d_in=x_ND.shape[1], **options)
    calibrate(sae, x_ND)
    return sae


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, SAEs of its site, texts to run it on, and labelled texts that a word gives away."""
    place = tmp_path_factory.mktemp("judge")
    model = make_model("llama")
    model.save_pretrained(place / "model")
    save_tokenizer(place / "model")
    x_ND = capture(model, make_sequences(8, 30, seed=3), SITE)[SITE].x_ND
    np.save(place / "x.npy", x_ND.numpy())
    for score in ("inner", "cosine_fixed"):
        for seed in (0, 1):
            cosae.save(sae_of(x_ND, score, seed), place / f"{score}_{seed}")
    rng = np.random.default_rng(0)
    other = [word for word in WORDS if word not in ("self", "class")]
    (place / "corpus").mkdir()
    for i in range(30):
        (place / "corpus" / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, 60)))
    rows = []
    for i in range(120):
        words = [*rng.choice(other, 12), *rng.choice(["self", "class"] if i % 2 else other, 6)]
        rows.append({"text": " ".join(rng.permutation(words)), "label": "self" if i % 2 else "none"})
    (place / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main(["eval", *arguments])
    said = capsys.readouterr()
    return int(done.value.code or 0), said.out, said.err


def pair(world: Path) -> list[str]:
    return [f"A={world / 'inner_0'},{world / 'inner_1'}", f"B={world / 'cosine_fixed_0'}"]


def model(world: Path) -> list[str]:
    return [
        "--model",
        str(world / "model"),
        "--site",
        SITE,
        "--corpus",
        str(world / "corpus"),
        "--tokens",
        "100",
        "--context",
        "32",
    ]


FILE_NUMBERS = {
    "reconstruction": lambda found: (found["saes"]["A"]["sinks_out"]["l0"], 4.0, 6.0),
    "norms": lambda found: (found["saes"]["B"]["norm_driven"]["sinks_out"]["share"], 0.0, 0.0),
    "sinks": lambda found: (found["saes"]["A"]["n_sinks"], 0, 8),
    "geometry": lambda found: (found["saes"]["A"]["decoder"]["mean_max_cosine"], 0.2, 1.0),
    "exponents": lambda found: (found["A"]["value"], 1.0, 1.0),
    "matching": lambda found: (found["correlation/mutual"]["pair"]["alive_a"], 5, 40),
    "gradients": lambda found: (sum(found["saes"]["A"]["sinks_in"]["selections"]["batch"]["share"]), 0.999, 1.001),
}
"""Of each measurement one number, and what it must lie between."""


@pytest.mark.parametrize("measurement", FILE_NUMBERS)
def test_on_a_file_of_vectors(
    measurement: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in world.glob("*/sae_weights.safetensors")}
    out = tmp_path / "found.json"
    arguments = [measurement, *pair(world), "--activations", str(world / "x.npy"), "--out", str(out), "--quiet"]
    status, printed, _ = run(arguments, capsys)
    assert status == 0
    assert "A" in printed
    result = json.loads(out.read_text())
    assert (result["format"], result["measurement"], list(result["saes"])) == ("cosae-eval", measurement, ["A", "B"])
    assert result["source"]["tokens"] == 240
    assert before == {path: path.read_bytes() for path in before}
    value, low, high = FILE_NUMBERS[measurement](result["found"])
    assert low <= value <= high
    if measurement == "matching":
        assert result["found"]["correlation/mutual"]["against_yardstick"]["paired"] is True
    if measurement == "norms":
        assert result["found"]["saes"]["A"]["norm_driven"]["sinks_out"]["share"] > 0


MODEL_NUMBERS = {
    "splice": lambda found: (found["saes"]["A"]["everywhere"]["sinks_in"]["kl"], 1e-6, 20.0),
    "causal": lambda found: (len(found["saes"]["A"]["ablation"]["edits"]), 8, 8),
    "patching": lambda found: (found["pairs"], 1, 200),
}


@pytest.mark.parametrize("measurement", MODEL_NUMBERS)
def test_on_the_model_itself(measurement: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    status, printed, said = run([measurement, *pair(world), *model(world), "--out", str(out)], capsys)
    assert status == 0, said
    value, low, high = MODEL_NUMBERS[measurement](json.loads(out.read_text())["found"])
    assert low <= value <= high
    said_of = {"splice": "loss increase", "causal": "relative size", "patching": "direction / norm"}
    assert said_of[measurement] in printed
    status, _, said = run([measurement, *pair(world), *model(world), "--inject", "log_normal:sigma=2"], capsys)
    assert (status, "drop --inject" in said) == (2, True)


def test_a_class_of_texts_is_probed_beside_its_floors(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    texts = ["--texts", str(world / "set.jsonl"), "--seeds", "2", "--out", str(out)]
    status, printed, said = run(["probing", *pair(world), *model(world), *texts], capsys)
    assert status == 0, said
    found = json.loads(out.read_text())["found"]
    assert found["arms"] == ["A", "B", "A, read without its norm", "untrained SAE"]  # B has no exponent to take out
    (one,) = found["sets"]
    assert set(one.pop("l0")) == set(found["arms"])
    assert one == {"name": "set", "texts": 120, "encoded": 120, "classes": ["self"]}
    means = found["summary"]["sinks_out"]
    assert means["bag_of_tokens"]["ceiling"]["accuracy"]["mean"] == 1
    assert means["A"]["full"]["auroc"]["mean"] > 0.65
    assert means["A"]["mean_difference/top_1"]["auroc"]["mean"] > 0.5
    for words in ("auroc", "mean difference", "standardised difference", "bag of tokens (ceiling)", "sinks in"):
        assert words in printed


def test_only_texts_that_are_drawn_are_encoded(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set of 3000 texts, sorted by class, 60 asked for: at most 2 × 60 go through the model; same ones each time."""
    rng = np.random.default_rng(1)
    others = [word for word in WORDS if word != "self"]
    rows = [[*rng.choice(others, 6), "self" if i < 900 else "class"] for i in range(3000)]
    lines = [json.dumps({"text": " ".join(row), "label": row[-1]}) for row in rows]
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    seen: list[int] = []
    monkeypatch.setattr(
        "cosae.run.dataset.model.capture", lambda *a, **k: (seen.append(len(a[1])), capture(*a, **k))[1]
    )
    out = tmp_path / "found.json"
    given = ["probing", *pair(world), *model(world), "--texts", str(tmp_path / "long.jsonl"), "--out", str(out)]
    status, printed, said = run([*given, "--max-texts", "60", "--seeds", "2", "--top", "3"], capsys)
    assert status == 0, said
    result = json.loads(out.read_text())["found"]
    held_out = 4  # passes of 32 tokens for the 100 tokens of the site
    assert 60 <= result["sets"][0]["encoded"] <= 120
    assert sum(seen) <= 120 + 64 + held_out  # and the first texts once more, for the median norm
    assert f"encoding texts of long (0 of {result['sets'][0]['encoded']} texts)" in said
    assert f"{result['sets'][0]['encoded']} of 3000 texts" in printed
    chosen = result["latents"]["sinks_out"]["A"]["auroc"]["long"]["self"]
    assert " ".join(map(str, chosen)) in printed
    for by in result["summary"]["sinks_out"].values():
        for metrics in by.values():
            assert all(0 <= one["low"] <= one["mean"] <= one["high"] <= 1 for one in metrics.values())
    run([*given, "--max-texts", "60", "--seeds", "2", "--top", "3"], capsys)
    assert json.loads(out.read_text())["found"] == result


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [(150, ["--max-texts", "40"], "max_texts must be at least 50"), (40, [], "no class with 20 train texts")],
)
def test_too_few_texts_are_refused_before_the_model_runs(
    rows: int,
    options: list[str],
    sentence: str,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = [json.dumps({"text": "self class", "label": i % 2}) for i in range(rows)]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr("cosae.run.dataset.model.capture", lambda *a, **k: pytest.fail("the model ran"))
    given = ["probing", *pair(world), *model(world), "--texts", str(tmp_path / "few.jsonl")]
    status, _, said = run([*given, *options], capsys)
    assert status == 2
    assert sentence in said


def test_a_set_of_sae_probes_is_probed(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, of a small folder in the package's layout."""
    rows = [json.loads(line) for line in (world / "set.jsonl").read_text().splitlines()]
    master = ["Dataset Tag,Dataset save name,Data type"]
    for name in ("7_self", "8_other"):
        master.append(f"{name},cleaned_data/{name}.csv,Binary Classification")
        written = io.StringIO()
        csv.writer(written).writerows([("prompt", "target"), *((row["text"], row["label"]) for row in rows)])
        _compress(tmp_path / f"cleaned_data/{name}.csv.zst", written.getvalue().splitlines())
    _compress(tmp_path / sae_probes.MASTER, master)
    monkeypatch.setattr(sae_probes, "data_folder", lambda path=None: tmp_path)
    out = tmp_path / "found.json"
    given = ["probing", *pair(world), *model(world), "--seeds", "2", "--out", str(out)]
    status, _, said = run([*given, "--texts", "sae-probes:7_self"], capsys)
    assert status == 0, said
    found = json.loads(out.read_text())["found"]
    assert [(one["name"], one["texts"]) for one in found["sets"]] == [("7_self", 120)]
    assert found["summary"]["sinks_out"]["bag_of_tokens"]["ceiling"]["accuracy"]["mean"] == 1
    status, _, said = run([*given, "--texts", "sae-probes:absent"], capsys)
    assert status == 2
    assert "data sets of sae-probes" in said


def _compress(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write("\n".join(lines).encode())


def test_a_saved_text_set_is_pooled_alike_whatever_the_chunk(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(model=str(world / "model"), site=SITE, corpus=str(world / "corpus"), batch_sequences=4)
    data = open_dataset(config)
    sae = cosae.load(world / "inner_0")
    texts = TextProbes(sets=[read_labelled(str(world / "set.jsonl"))], read_time=False, untrained=False)
    whole = encode_texts(texts, {"A": [sae]}, data, 10.0)[0]
    monkeypatch.setattr("cosae.run.dataset.model.TEXTS_AT_ONCE", 12)
    parts = encode_texts(texts, {"A": [sae]}, data, 10.0)[0]
    assert len(whole.class_S) == 120
    for sinks in ("sinks_in", "sinks_out"):
        a, b = (found.codes[sinks]["A"][0].to_scipy().toarray() for found in (whole, parts))
        assert a == pytest.approx(b, abs=1e-5)
        assert whole.dense[sinks]["x"] == pytest.approx(parts.dense[sinks]["x"], abs=1e-5)
    assert (whole.dense["sinks_in"]["length"] == whole.dense["sinks_out"]["length"] + 1).all()  # position 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["probation", "absent"], "a measurement must be one of"),
        (["norms", "absent"], "does not exist"),
        (["matching", "{inner_0}", "--activations", "{x.npy}"], "matching takes two arms"),
        (["discovery", "{inner_0}", "--activations", "{x.npy}"], "discovery takes two arms"),
        (["discovery", "{inner_0}", "{inner_1}", "--activations", "{x.npy}"], "needs token-level concepts"),
        (["splice", "{inner_0}", "--activations", "{x.npy}"], "runs the model itself"),
        (["norms", "a={inner_0}", "a={inner_1}", "--activations", "{x.npy}"], "two SAEs were given one name"),
        (["norms", "{inner_0}", "--activations", "{x.npy}", "--out", "/nowhere/at/all.json"], "cannot be written"),
        (["probing", "{inner_0}", "--activations", "{x.npy}", "--pooling", "max"], "pooling must be one of mean, last"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], sentence: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [text.replace("{", f"{world}/").replace("}", "") for text in arguments]
    status, _, said = run(given, capsys)
    assert status == 2
    assert sentence in said
    assert "Traceback" not in said
