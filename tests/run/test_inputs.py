"""Runs and captures on every kind of input: encoders' texts, conversations, token ids, images and sound."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cosae.activations.store.reader import open_store
from cosae.errors import CosaeError
from cosae.models.capture import capture
from cosae.recipe import DataConfig
from cosae.run.capture.request import Capture
from cosae.run.capture.stores import capture_stores
from cosae.run.dataset.base import DataUse
from cosae.run.dataset.open import open_dataset
from cosae.run.execute import execute
from tests.support.tiny_families import make_family
from tests.support.tiny_model_runs import WORDS, recipe, save_tokenizer, write_texts
from tests.support.tiny_models import make_model
from tests.support.tiny_runs import QUIET

transformers = pytest.importorskip("transformers")
CHAT = "{{ bos_token }}{% for m in messages %} {{ m.role }} : {{ m.content }} <eos>{% endfor %}"


def dataset(folder: Path, corpus: Any, **settings: Any) -> Any:
    settings = {"context": 16, "held_out_frac": 0.3, "site": "resid_post.1", "chunk_sequences": 8, **settings}
    use = DataUse(train_tokens=200, held_out_tokens=60, calibration_tokens=20)
    return open_dataset(DataConfig(model=str(folder), corpus=str(corpus), **settings), use)


def first_chunk(data: Any) -> Any:
    """Whole sequences of the training side."""
    return next(data.source.chunks())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer that puts [CLS] and [SEP] around a text."""
    from tokenizers import processors

    folder = tmp_path_factory.mktemp("encoder")
    make_family("bert").save_pretrained(folder)
    save_tokenizer(folder)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, bos_token=None, eos_token=None)
    tokenizer.add_special_tokens({"cls_token": "<bos>", "sep_token": "<eos>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def test_an_encoder_reads_each_text_alone_with_its_own_tokens_around_it(encoder: Path, texts: Path) -> None:
    with pytest.raises(CosaeError, match=r"one text at a time.*data\.packing=document"):
        dataset(encoder, texts).sample("held_out", 60)
    data = dataset(encoder, texts, packing="document")
    found = first_chunk(data)
    assert (found.token_N[found.position_N == 0] == 1).all()
    assert (found.token_N[found.position_N == 15] == 2).all()
    assert found.special_N.sum() == 2 * (found.position_N == 0).sum()
    sequences = data.sequences("held_out", 60)
    with torch.no_grad():
        own = data.model(sequences.ids_ST, output_hidden_states=True).hidden_states[2]
    rows = capture(data.model, sequences, "resid_post.1")["resid_post.1"].x_ND
    torch.testing.assert_close(rows, own.reshape(-1, own.shape[-1]), rtol=1e-5, atol=1e-5)
    pooled = dataset(encoder, texts, packing="document", positions="mean")
    pooled = first_chunk(pooled)
    assert (pooled.position_N == -1).all()
    torch.testing.assert_close(pooled.x_ND, found.x_ND.reshape(len(pooled), 16, -1).mean(1), rtol=1e-5, atol=1e-5)
    with pytest.raises(CosaeError, match=r"positions=all"):
        dataset(encoder, texts, packing="document", positions="cls").sequences("held_out", 60)


@pytest.mark.parametrize(
    ("positions", "kept"),
    [("cls", [0]), ("tokens", [*range(1, 15)]), ("-2:", [14, 15]), ("last", [15]), ("1:3", [1, 2])],
)
def test_positions_of_a_text(encoder: Path, texts: Path, positions: str, kept: list[int]) -> None:
    found = first_chunk(dataset(encoder, texts, packing="document", positions=positions))
    assert sorted({*found.position_N.tolist()}) == kept


def test_conversations_go_through_the_models_template(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path)
    rows = []
    for i in range(60):
        said = " ".join(WORDS[(i + j) % 20] for j in range(4))
        rows.append({"messages": [{"role": "user", "content": said}, {"role": "x", "content": f"{said} return"}]})
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dataset(tmp_path, tmp_path / "chat.jsonl", inputs="chat", packing="document", context=32)
    found = first_chunk(data)
    one = found[found.doc_N == found.doc_N[0]]
    spelled = [data.spell(token) for token in one.token_N.tolist()]
    assert spelled.count("<bos>") == 1
    ordinary = [word for word, special in zip(spelled, one.special_N.tolist(), strict=True) if not special]
    assert len(ordinary) == 9
    assert ordinary[-1] == "return"
    assert ordinary[:4] == ordinary[4:8]
    (tmp_path / "bad.jsonl").write_text('{"messages": "hello"}\n')
    with pytest.raises(CosaeError, match="list of messages"):
        dataset(tmp_path, tmp_path / "bad.jsonl", inputs="chat").sample("held_out", 60)


@pytest.mark.parametrize("kind", ["npy", "parquet", "flat"])
def test_token_ids_need_no_tokenizer(tmp_path: Path, kind: str) -> None:
    make_model("llama").save_pretrained(tmp_path)  # no tokenizer there
    ids = np.random.default_rng(0).integers(3, 97, (40, 20))
    path = tmp_path / ("ids.parquet" if kind == "parquet" else "ids.npy")
    if kind == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table({"input_ids": list(ids)}), path)
    else:
        np.save(path, ids if kind == "npy" else ids.ravel())
    data = dataset(tmp_path, path, inputs="ids")
    found = first_chunk(data)
    assert bool(data.warnings) == (kind != "flat")
    assert all("longer than 16" in warning for warning in data.warnings)
    first = found[found.position_N == 0]
    assert {*first.token_N.tolist()} <= {*(ids if kind != "flat" else ids.reshape(-1, 16))[:, 0].tolist()}
    assert found.position_N.max() == 15
    np.save(path.with_suffix(".npy"), ids.astype(np.float32))
    with pytest.raises(CosaeError, match="list of token ids"):
        dataset(tmp_path, path.with_suffix(".npy"), inputs="ids").sample("held_out", 60)


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    make_family("vit").save_pretrained(folder)
    record = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(record))
    return folder


def pictures(n: int = 24) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 255, (n, 12, 10, 3)).astype(np.uint8)


def test_arrays_of_pixels_need_no_processor_and_positions_are_those_of_patches(vision: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).normal(size=(24, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "pixels.npy", pixels)
    data = dataset(vision, tmp_path / "pixels.npy", inputs="images")
    found = first_chunk(data)
    assert sorted({*found.position_N.tolist()}) == [0, 1, 2, 3, 4]
    assert torch.equal(found.special_N, found.position_N == 0)
    number = int(data.source.document_name(0).split()[-1])
    with torch.no_grad():
        own = data.model(torch.from_numpy(pixels[number : number + 1]), output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(found[found.doc_N == 0].x_ND, own[0], rtol=1e-5, atol=1e-5)
    described = data.describe()["layout"]
    assert (described["grid"], described["n_special"]) == ([2, 2], 1)
    for positions, kept in (("cls", [0]), ("patches", [1, 2, 3, 4]), ("1:3", [1, 2])):
        chosen = dataset(vision, tmp_path / "pixels.npy", inputs="images", positions=positions)
        assert sorted({*chosen.sample("held_out", 60).activations.position_N.tolist()}) == kept
        assert sorted({*next(chosen.source.chunks()).position_N.tolist()}) == kept
    with pytest.raises(CosaeError, match="runs a language model"):
        data.sequences("held_out", 60)
    with pytest.raises(CosaeError, match="reads no text: give --inputs images"):
        dataset(vision, "pylib").sample("held_out", 60)


@pytest.mark.parametrize("place", ["folder", "parquet", "saved"])
def test_images_in_files_go_through_the_models_processor(vision: Path, tmp_path: Path, place: str) -> None:
    image = pytest.importorskip("PIL.Image")
    encoded = []
    for picture in pictures():
        buffer = io.BytesIO()
        image.fromarray(picture).save(buffer, "png")
        encoded.append(buffer.getvalue())
    if place == "folder":
        corpus = tmp_path / "images"
        corpus.mkdir()
        for i, content in enumerate(encoded):
            (corpus / f"{i:02d}.png").write_bytes(content)
    elif place == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        corpus = tmp_path / "images.parquet"
        parquet.write_table(pa.table({"image": [{"bytes": content, "path": None} for content in encoded]}), corpus)
    else:
        datasets = pytest.importorskip("datasets")
        corpus = tmp_path / "saved"
        rows = {"image": [{"bytes": content, "path": None} for content in encoded]}
        datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()})).save_to_disk(corpus)
    data = dataset(vision, corpus, inputs="images", positions="patches")
    found = first_chunk(data)
    processor = transformers.ViTImageProcessorPil(size={"height": 8, "width": 8})
    with torch.no_grad():
        pixels = processor([image.fromarray(p) for p in pictures()], return_tensors="pt")["pixel_values"]
        own = data.model(pixels, output_hidden_states=True).hidden_states[2][:, 1:]
    rows = found.x_ND.reshape(-1, 4, own.shape[-1])
    for row in rows:
        assert (row - own).abs().amax((1, 2)).min() < 1e-5
    broken = tmp_path / "broken"
    broken.mkdir()
    for i in range(9):
        (broken / f"{i}.png").write_bytes(bytes([i]) * 9)
    with pytest.raises(CosaeError, match=r"\.png must be an image"):
        dataset(vision, broken, inputs="images").sample("held_out", 60)


def write_sound(folder: Path, rate: int = 8000) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(12):
        samples = (generator.normal(size=2000 + 400 * (i % 3)) * 3000).astype("<i2")
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(samples.tobytes())
    return folder


def test_sound_is_read_in_windows_and_frames_know_their_time(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_family("wav2vec2").save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=16000).save_pretrained(folder)
    data = dataset(folder, write_sound(tmp_path / "sound"), inputs="audio")
    found = first_chunk(data)
    assert found.position_N.max() > 300
    assert data.describe()["layout"]["seconds"] == pytest.approx(10 / 16000, rel=0.02)
    assert data.media.layout.place(160) == "0.10 s"


def test_whispers_frames_beyond_the_sound_are_no_rows(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_family("whisper").save_pretrained(folder)
    extractor = {"feature_size": 6, "sampling_rate": 8000, "chunk_length": 1, "n_fft": 400, "hop_length": 444}
    transformers.WhisperFeatureExtractor(**extractor).save_pretrained(folder)
    corpus = write_sound(tmp_path / "sound")
    data = dataset(folder, corpus, inputs="audio", site="encoder.resid_post.1")
    assert {*data.sample("held_out", 20).activations.position_N.tolist()} == {0, 1, 2}


def test_a_store_and_a_run_on_the_embedded_vision_case(tmp_path: Path) -> None:
    data = DataConfig(model="embedded-vision", corpus="digits", inputs="images", site="resid_post.2")
    request = Capture(data, ("resid_post.2",), 3000, 1000)
    store = open_store(capture_stores(request, tmp_path / "store")[0])
    assert store.record["request"]["layout"]["grid"] == [4, 4]
    assert store.concepts is not None
    assert len(store.concepts) == 29
    rows = store.take("train", torch.arange(34))
    assert rows.index_N.tolist() == [*range(17)] * 2
    settings = {"data.inputs": "images", "data.add_bos": None, "data.context": 256, "training.steps": 30}
    made = recipe(Path("embedded-vision"), "digits", **settings)
    execute(made, tmp_path / "run", logs=QUIET)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    scores = found["probing"]["sinks_in"]
    assert len(scores["concepts"]) > 20
