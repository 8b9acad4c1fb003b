"""A GGUF file is a model wherever one is named: dequantised once, to the values that the format says."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf")

import gguf as peer

from cosae.activations.store.reader import Store
from cosae.cli import main
from cosae.errors import CosaeError, CosaeWarning
from cosae.models import gguf
from cosae.models.capture import capture
from cosae.models.load import load_model
from cosae.models.sources import ModelSource
from cosae.text import Document, sequences, tokenize_documents
from tests.support.tiny_gguf import write_gguf


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_gguf(tmp_path / "tiny.gguf")


def test_activations_of_the_file_are_those_of_the_dequantised_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(CosaeWarning, match=r"tiny\.gguf is dequantised to float32, once"):
        model, tokenizer = load_model(file)
    weights = {t.name: torch.tensor(peer.dequantize(t.data, t.tensor_type)) for t in peer.GGUFReader(file).tensors}
    for block in range(2):
        assert torch.equal(model.model.layers[block].mlp.up_proj.weight, weights[f"blk.{block}.ffn_up.weight"])
    assert torch.equal(model.lm_head.weight, weights["token_embd.weight"])

    (folder,) = (tmp_path / "cache" / "cosae" / "gguf").iterdir()
    shutil.copytree(folder, tmp_path / "folder")
    other, _ = load_model(tmp_path / "folder")
    tokens = list(tokenize_documents([Document("a", "than the other, 1 + 2\n" * 9)], tokenizer, add_bos=True))
    packed = sequences(tokens, 32, pad_id=1)
    assert tokenizer.decode(packed.ids_ST[0, 1:8].tolist()).startswith("than the")
    found, same = (capture(m, packed, "resid_post.1")["resid_post.1"] for m in (model, other))
    assert torch.equal(found.x_ND, same.x_ND)

    monkeypatch.setattr(gguf, "_convert", None)  # nothing is converted twice, not even what was moved
    moved = file.rename(tmp_path / "moved.gguf")
    again, _ = load_model(str(moved), dtype="bfloat16")
    assert again.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16())

    said = ModelSource(again, packed, "resid_post.1").describe()
    assert said["model"] == str(moved)
    assert said["quantization"]["tensors"] == {"Q8_0": 15, "F32": 5}


@pytest.mark.filterwarnings("default::cosae.errors.CosaeWarning")
def test_a_capture_takes_the_file_and_records_how_it_was_quantised(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"row {i} of many " * 9}) + "\n" for i in range(60)))
    arguments = ["--model", str(file), "--corpus", str(tmp_path / "t.jsonl"), "--site", "resid_post.0", "--quiet"]
    with pytest.raises(SystemExit) as done:
        main(["capture", *arguments, "--tokens", "300", "--context", "32", "--out", str(tmp_path / "s")])
    assert done.value.code == 0
    assert capsys.readouterr().err.count("dequantised") == 1
    request = Store(tmp_path / "s").record["request"]
    assert request["quantization"]["tensors"]["Q8_0"] == 15
    assert request["model_sha256"] is not None


def test_what_cannot_be_read_is_one_sentence(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:600])
    with pytest.raises(CosaeError, match=r"cut\.gguf', which is a GGUF file .* cannot be read"):
        load_model(cut)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CosaeError, match=r"needs gguf: pip install 'cosae\[lm,gguf\]'"):
        load_model(file)
    assert not list((tmp_path / "cache" / "cosae" / "gguf").glob("[!.]*"))
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(file, folder)
    with pytest.raises(CosaeError, match="name one of its files"):
        load_model(folder)


def test_saebench_gets_the_dequantised_folder(file: Path) -> None:
    from cosae.interop.saebench.run import _with_places
    from cosae.interop.saebench.settings import Settings

    with pytest.warns(CosaeWarning, match="dequantised"):
        by_name = _with_places({}, Settings(model_name=str(file)))
    by_path = _with_places({}, Settings(model_name="mine", model_path=file))
    assert by_name.model_path is not None
    assert (by_name.model_path / "model.safetensors").is_file()
    assert (by_path.model_path, by_path.model_name) == (by_name.model_path, "mine")
    assert str(file) not in str(by_name.model_name)
