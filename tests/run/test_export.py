"""`cosae export` on the embedded model: what the SAE's file does not say is asked for, and nothing is made twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import cosae
from cosae.cli import main
from cosae.errors import CosaeError
from cosae.interop.neuronpedia.settings import Options
from cosae.run import export
from cosae.run.export import export_neuronpedia, read_sequences
from cosae.run.requests import Reading
from tests.support.feature_stores import write_store

pytest.importorskip("transformers")
TEXT = "The quick brown fox jumps over the lazy dog, again and again, until line {} ends here.\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export")
    sae = cosae.SAE.build(d_in=192, d_sae=24, score="cosine", selector="topk", k=3, seed=0)
    sae.metadata = {"model": "embedded", "site": "resid_post.1"}
    cosae.save(sae, place / "sae")
    sae.metadata = {}
    cosae.save(sae, place / "silent")
    (place / "text").mkdir()
    for i in range(3):
        (place / "text" / f"{i}.txt").write_text("".join(TEXT.format(i * 40 + j) for j in range(40)))
    (place / "text" / "copy.txt").write_text((place / "text" / "0.txt").read_text())
    return place


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(one) for one in arguments])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_neuronpedia_from_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "np"
    common = ("export", "neuronpedia", place / "sae", "--out", out, "--corpus", place / "text")
    options = ("--prompts", 6, "--context", 16, "--set-name", "mine", "--model-id", "little")
    status, said, progress = run(capsys, *common, *options)
    assert status == 0
    assert f"{out}: " in said
    assert "in 1 batch for source 1-mine of model little" in said
    assert said.strip().endswith("Nothing was sent; --upload sends it.")
    assert "wrote 1 of 1 batches" in progress
    batch = json.loads((out / "batch-0.json").read_text())
    feature = next(f for f in batch["features"] if f["activations"])
    assert (feature["n_prompts_total"], feature["n_tokens_in_prompt"]) == (6, 16)
    assert len(feature["activations"][0]["tokens"]) == 15

    mark = json.loads((out / "cosae_export.json").read_text())
    assert (mark["model"], mark["site"], mark["prompts"]) == ("embedded", "resid_post.1", 6)
    before = (out / "batch-0.json").stat().st_mtime_ns
    status, said, _ = run(capsys, *common, *options, "--quiet")
    assert "holds this export already: not made again" in said
    assert (out / "batch-0.json").stat().st_mtime_ns == before
    status, said, _ = run(capsys, *common, *options, "--quiet", "--top", 2)
    assert status == 0
    assert "not made again" not in said


def test_explanations_of_a_store_lie_beside_the_dashboards(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, digest = tmp_path / "np", export.digest_sae(cosae.load(place / "sae"))
    store = write_store(tmp_path / "store", 24, ["mine"], sha256=digest)
    given = ("export", "neuronpedia", place / "sae", "--out", out, "--corpus", place / "text", "--prompts", 6)
    options = ("--context", 16, "--set-name", "mine", "--model-id", "little", "--quiet")
    status, said, _ = run(capsys, *given, *options, "--explanations", store)
    assert (status, "4 explanations in" in said) == (0, True)
    lines = [json.loads(line) for line in (out / "explanations.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == ["1", "2", "3", "4"]
    assert {(line["modelId"], line["layer"]) for line in lines} == {("little", "1-mine")}
    assert lines[0]["description"] == "<img src=x onerror=alert(1)>"
    assert lines[1]["explanationModelName"] == "stand-in/judge"
    assert lines[1]["scores"] == [{"name": "detection", "value": pytest.approx(0.6)}]
    status, said, _ = run(capsys, *given, *options, "--explanations", store, "--dry-run")
    assert "words that begin with 2" in said
    other = write_store(tmp_path / "other", 24, ["mine"])
    status, _, error = run(capsys, *given, *options, "--explanations", other)
    assert (status, "holds no such SAE" in error) == (2, True)
    run(capsys, *given, *options)
    assert not (out / "explanations.jsonl").exists()


def test_delphi_from_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cache"
    options = ("--corpus", place / "text", "--prompts", 6, "--context", 16, "--n-splits", 2, "--quiet")
    status, said, _ = run(capsys, "export", "delphi", place / "sae", "--out", out, *options)
    assert status == 0
    assert "of module model.layers.1" in said
    assert sorted(p.name for p in (out / "model.layers.1").glob("*.safetensors")) == [
        "0_11.safetensors",
        "12_23.safetensors",
    ]
    config = json.loads((out / "model.layers.1" / "config.json").read_text())
    assert (config["model_name"], config["dataset_repo"]) == ("embedded", "local corpus")


@pytest.mark.parametrize(
    ("sae", "options", "sentence"),
    [
        ("silent", [], "does not say on which: name its language model with --model"),
        ("nothing", [], "does not exist"),
        ("sae", ["--prompts", "0"], "prompts must be at least 1"),
        ("sae", ["--context", "2"], "context must be at least 3"),
        ("sae", ["--context", "999"], "context must be at most 256"),
        ("sae", ["--corpus", "nowhere"], "must be 'pylib', .*an existing folder"),
        ("sae", ["--site", "resid_post.9"], "out of range"),
        ("sae", ["--set-name", "a b"], "set_name must be a name"),
        ("sae", ["--upload"], "pip install neuronpedia|NEURONPEDIA_API_KEY"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    sae: str,
    options: list[str],
    sentence: str,
) -> None:
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    options = [*options] if "--corpus" in options else [*options, "--corpus", str(place / "text")]
    if "--context" not in options:
        options += ["--context", "16"]
    status, said, told = run(
        capsys, "export", "neuronpedia", place / sae, "--out", tmp_path / "out", "--quiet", *options
    )
    assert status == 2
    assert said == ""
    assert told.startswith("cosae: ")
    assert told.count("\n") == 1
    assert re.search(sentence, told), told
    assert list(tmp_path.iterdir()) == []


def test_equal_sequences_are_read_once_in_a_seeded_order(place: Path) -> None:
    from cosae.recipe import DataConfig

    data = DataConfig(corpus=str(place / "text"), context=16)
    _, tokenizer = export.open_model(data, "cpu")
    first, again, other = (read_sequences(data, tokenizer, Reading(prompts=500, context=16, seed=s)) for s in (0, 0, 1))
    assert torch.equal(first.ids_ST, again.ids_ST)
    assert not torch.equal(first.ids_ST[:20], other.ids_ST[:20])
    assert len(torch.unique(first.ids_ST, dim=0)) == len(first)
    assert bool(first.mask_ST.all())
    assert len(read_sequences(data, tokenizer, Reading(prompts=5, context=16))) == 5


def test_an_upload_is_checked_for_before_anything_is_read(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("read")

    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    monkeypatch.setattr(export, "open_reading", never)
    with pytest.raises(CosaeError, match=r"pip install neuronpedia|NEURONPEDIA_API_KEY"):
        export_neuronpedia(place / "sae", tmp_path / "out", Reading(), Options(), upload=True)
