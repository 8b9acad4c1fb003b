"""delphi's cache: entries against the dense codes, dtypes, splits, refusals; what delphi's loader makes of it is in
test_readers_peer."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from cosae.errors import CosaeError
from cosae.interop import cached_codes, delphi
from cosae.interop.delphi import write_cache
from cosae.models.sites import resolve_site
from tests.support.small_exports import dense, make_model, make_sae, whole_sequences

SITE, MODULE = "resid_post.2", "model.layers.2"


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


def write(model: Any, sae: Any, out: Path, site: str = SITE, **options: Any) -> Any:
    options = {"model_name": "tiny", "dataset": "words", **options}
    return write_cache(model, resolve_site(model, site), sae, whole_sequences(), out, **options)


@pytest.mark.parametrize("chunk", [8192, 100])
@pytest.mark.parametrize("n_splits", [None, 1, 7, 48])
def test_entries_are_the_dense_codes(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_splits: int | None, chunk: int
) -> None:
    monkeypatch.setattr(cached_codes, "CHUNK_TOKENS", chunk)
    sae = make_sae(model, selector="abs_topk") if n_splits == 7 else make_sae(model)
    written = write(model, sae, tmp_path / "out", n_splits=n_splits)
    folder = tmp_path / "out" / written.module
    assert written.module == MODULE
    got = np.zeros((40, 12, 48), np.float32)
    edges = []
    for path in folder.glob("*.safetensors"):
        first, last = (int(part) for part in path.stem.split("_"))
        edges.append((first, last))
        split = load_file(path)
        assert split["locations"].dtype == np.uint16
        assert split["activations"].dtype == np.float16
        assert np.array_equal(split["tokens"], whole_sequences().ids_ST.numpy())
        assert split["locations"][:, 2].max(initial=0) <= last - first
        row, position, latent = split["locations"].astype(int).T
        assert len(set(zip(row, position, latent, strict=True))) == len(row)
        got[row, position, latent + first] = split["activations"]
    edges.sort()
    assert edges[0][0] == 0
    assert edges[-1][1] == 47
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(edges))
    assert len(edges) == (n_splits or 5)
    truth = dense(model, sae, whole_sequences(), SITE)[0]
    assert np.abs(got - truth).max() <= 1e-3 * np.abs(truth).max()
    assert written.entries == (got != 0).sum() == (truth != 0).sum() - written.dropped
    config = json.loads((folder / "config.json").read_text())
    assert config["model_name"] == "tiny"
    assert config["cache_ctx_len"] == 12
    assert config["n_tokens"] == 480
    assert list((tmp_path / "out").iterdir()) == [folder]  # delphi takes every name here for a module


class Many:
    """Codes of 70,000 sequences: one feature, firing once in the last."""

    ids_ST = torch.zeros(70_000, 3, dtype=torch.int64)

    def entries(self, first: int, stop: int) -> Any:
        return np.array([0, 1]), np.array([70_000 * 3 - 1]), np.array([2.0], np.float32)


def test_more_than_65536_sequences_take_wide_integers(tmp_path: Path) -> None:
    assert delphi._write_split(Many(), 5, 6, tmp_path / "5_5.safetensors") == 1  # type: ignore[arg-type]
    found = load_file(tmp_path / "5_5.safetensors")["locations"]
    assert found.dtype == np.uint32
    assert found.tolist() == [[69_999, 2, 0]]


def test_the_input_of_a_module_has_a_folder_of_its_own(model: Any, tmp_path: Path) -> None:
    written = write(model, make_sae(model), tmp_path / "out", site="model.layers.1.self_attn.o_proj:input")
    assert written.module == "model.layers.1.self_attn.o_proj_input"


def test_what_float16_cannot_hold_is_refused(model: Any, tmp_path: Path) -> None:
    sae = make_sae(model)
    with torch.no_grad():
        sae.score._replace("log_gain", sae.scale_b + 20)
    with pytest.raises(CosaeError, match=r"float16, up to 65504. Got .* at feature \d+"):
        write(model, sae, tmp_path / "out")
    with pytest.raises(CosaeError, match=r"n_splits .*48"):
        write(model, sae, tmp_path / "out", n_splits=49)
    assert list(tmp_path.iterdir()) == []


def test_tiny_activations_are_dropped_as_delphi_drops_them(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = make_sae(model)
    truth = np.abs(dense(model, sae, whole_sequences(), SITE)[0])
    least = float(np.median(truth[truth > 0]))
    monkeypatch.setattr(delphi, "LEAST", least)
    written = write(model, sae, tmp_path / "some")
    assert written.entries == (truth > np.float32(least)).sum() > 0
    assert written.entries + written.dropped == (truth > 0).sum()
    monkeypatch.setattr(delphi, "LEAST", 1e9)
    assert write(model, sae, tmp_path / "none").entries == 0
    assert all(len(load_file(p)["activations"]) == 0 for p in (tmp_path / "none").rglob("*.safetensors"))
