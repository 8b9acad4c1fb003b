"""What a path is, where something else was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cosae.activations.array_files import open_array
from cosae.activations.store.reader import open_store
from cosae.errors import CosaeError
from cosae.interop.read import read_sae
from cosae.io.kind import kind_of
from cosae.models.load import load_model
from cosae.text.documents import read_documents


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.gguf", b"GGUF....", "GGUF"),
        ("a.safetensors", b"........", "safetensors"),
        ("a.pt", b"PK......", "PyTorch"),
        ("a", b"\x80\x04....", "pickle"),
        ("a.pkl", b"........", "pickle"),
        ("a.npz", b"PK......", "NumPy"),
        ("adapter_config.json", b"{}", "LoRA"),
        ("cfg.json", b"{}", "SAE"),
        ("index.json", b"{}", "store of activations"),
        ("recipe.json", b"{}", "cosae run"),
    ],
)
def test_readers_of_other_things_say_what_they_got(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    place = tmp_path if name.endswith("json") else tmp_path / name
    assert words in (kind_of(place) or "")
    readers = [load_model]
    readers += [open_array] if name != "a.safetensors" else []
    readers += [open_store] if name != "index.json" else []
    readers += [read_sae] if name not in ("cfg.json", "a.npz", "a.pt") else []
    readers += [read_documents] if place.is_file() else []
    for read in readers:
        with pytest.raises(CosaeError, match=f"which is .*{words}"):
            read(place if read is not read_documents else str(place))


def test_what_is_not_known_is_not_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    assert kind_of(tmp_path / "a.npy") == "a NumPy array"
    assert kind_of(tmp_path / "nothing") is None
    (tmp_path / "odd").write_bytes(b"12345678")
    assert kind_of(tmp_path / "odd") is None
    (tmp_path / "folder").mkdir()
    assert kind_of(tmp_path / "folder") == "an empty folder"
