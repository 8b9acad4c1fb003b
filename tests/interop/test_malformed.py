"""Every reader against damaged and hostile files: an SAE, or one sentence; nothing else, and nothing large."""

from __future__ import annotations

import json
import pickle
import random
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cosae
from cosae.errors import CosaeError
from cosae.interop.read import read_sae
from tests.interop.test_read import ONE_OF_EACH, WEIGHT_FILES, _load, _store, refused
from tests.support.foreign_files import write

CONFIGS = {"dictionary_learning": "config.json", "saelens": "cfg.json", "sparsify": "cfg.json"}
ODD: tuple[Any, ...] = (None, True, -1, 0, 3.5, 10**30, 1e308, "", "x" * 50, [], [1], {}, {"k": []}, [[0]])
KINDS = [*ONE_OF_EACH, ("dictionary_learning", "MatryoshkaBatchTopKSAE"), ("dictionary_learning", "GatedAutoEncoder"),
         ("saelens", "matryoshka_batchtopk_rescaled"), ("gemma_scope", "safetensors")]  # fmt: skip


def one_sentence_or_an_sae(folder: Path) -> None:
    try:
        sae = read_sae(folder)
    except CosaeError as error:
        said = str(error)
    else:
        x = torch.randn(3, sae.d_in, generator=torch.Generator().manual_seed(0))
        assert bool(sae.decode(sae.encode(x)).isfinite().all())
        return
    assert "\n" not in said
    assert len(said) < 2000


def weight_file(folder: Path, format_: str) -> Path:
    file = folder / WEIGHT_FILES[format_]
    return file if file.exists() else folder / "params.safetensors"


@settings(max_examples=60)
@given(case=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1))
def test_bytes_tensors_and_settings_changed_at_random(case: tuple[str, str], seed: int) -> None:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = write(*case, Path(scratch) / "sae").folder
        file = weight_file(folder, case[0])
        what = draw.choice(["bytes", "tensor", "setting"])
        if what == "bytes":
            whole = bytearray(file.read_bytes())
            for _ in range(draw.randint(1, 8)):
                whole[draw.randrange(len(whole))] = draw.randrange(256)
            file.write_bytes(bytes(whole[: draw.choice([len(whole), draw.randrange(len(whole))])]))
        elif what == "tensor":
            state = _load(file)
            name = draw.choice(list(state))
            changes = [
                torch.zeros(0),
                torch.zeros(3, 2, 2),
                torch.tensor(float("nan")),
                torch.zeros(5, dtype=torch.int8),
            ]
            changes += [torch.full_like(state[name], -1), torch.ones(1, 1), state[name].to(torch.complex64)]
            changed = draw.choice(changes)
            if file.suffix == ".safetensors" and changed.is_complex():
                changed = torch.zeros(2)
            _store(file, {**state, name: changed})
        else:
            place = folder / CONFIGS.get(case[0], "config.json")
            config = json.loads(place.read_text()) if place.exists() else {}
            inside = config.get("trainer", config)
            inside[draw.choice([*inside, "type", "normalize_activations", "k", "target_l0"])] = draw.choice(ODD)
            place.write_text(json.dumps(config))
        one_sentence_or_an_sae(folder)


@pytest.mark.parametrize("case", [("saelens", "topk"), ("sparsify", "topk"), ("gemma_scope", "safetensors")])
@pytest.mark.parametrize("length", [2**62, 2**27, 10**9])
def test_a_header_that_claims_to_be_huge_is_not_read(case: tuple[str, str], length: int, tmp_path: Path) -> None:
    folder = write(*case, tmp_path / "sae").folder
    weight_file(folder, case[0]).write_bytes(struct.pack("<Q", length) + b"{}" * 100)
    assert "claims a header" in refused(folder)


def test_an_array_that_claims_more_than_the_archive_holds(tmp_path: Path) -> None:
    folder = write("gemma_scope", "npz", tmp_path / "sae").folder
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 7), }"
    header += b" " * (118 - len(header)) + b"\n"
    with zipfile.ZipFile(folder / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    assert "more than there is" in refused(folder)


def test_a_tensor_spread_over_one_number_is_not_filled_out(tmp_path: Path) -> None:
    """Strides of 0: four bytes on disk, terabytes when computed with."""
    folder = write("dictionary_learning", "BatchTopKSAE", tmp_path / "sae").folder
    state = torch.load(folder / "ae.pt", weights_only=True)
    torch.save({**state, "encoder.weight": torch.zeros(()).expand(10**6, 10**6)}, folder / "ae.pt")
    assert "more than the file holds" in refused(folder)


@pytest.mark.parametrize("odd", ["meta", "sparse", "float8", "nested dictionary", "deep pickle"])
def test_tensors_that_are_no_plain_numbers(odd: str, tmp_path: Path) -> None:
    folder = write("dictionary_learning", "BatchTopKSAE", tmp_path / "sae").folder
    state: Any = torch.load(folder / "ae.pt", weights_only=True)
    name = "decoder.weight"
    if odd == "meta":
        state[name] = torch.zeros(7, 20, device="meta")
    elif odd == "sparse":
        state[name] = state[name].to_sparse()
    elif odd == "float8":
        state[name] = state[name].to(torch.float8_e4m3fn)
    elif odd == "nested dictionary":
        state = {name: state}
    if odd == "deep pickle":
        (folder / "ae.pt").write_bytes(b"(" * 200_000 + b"t" * 200_000 + b".")
    else:
        torch.save(state, folder / "ae.pt")
    refused(folder)


def test_paths_that_are_tricks(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 5000))
    refused(tmp_path / "nul\0")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    refused(loop)
    folder = write("sparsify", "topk", tmp_path / "sae").folder
    (folder / "sae.safetensors").unlink()
    (folder / "sae.safetensors").mkdir()
    assert "does not exist" in refused(folder, format="sparsify")
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("../../outside.npy", pickle.dumps(0))
    refused(tmp_path / "params.npz")
    assert not (tmp_path.parents[1] / "outside.npy").exists()


def test_links_as_the_hub_s_cache_has_them_are_followed(tmp_path: Path) -> None:
    folder = write("gemma_scope", "npz", tmp_path / "blobs").folder
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "params.npz").symlink_to(folder / "params.npz")
    assert read_sae(tmp_path / "snapshot").d_in == 7


def test_cosae_s_own_folder_damaged(tmp_path: Path) -> None:
    sae = cosae.SAE.build(d_in=7, d_sae=20, k=3, selector="topk", seed=0)
    for number, damage in enumerate((b"", struct.pack("<Q", 2**62), b"\0" * 64)):
        folder = cosae.save(sae, tmp_path / str(number))
        (folder / "sae_weights.safetensors").write_bytes(damage)
        refused(folder)
    assert np.isfinite(float(sae.W_dec.detach().abs().max()))
