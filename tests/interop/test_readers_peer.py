"""Exports and plain hooks against the real packages, each in an environment of its own (peers/environments.py)."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cosae
from cosae.interop.hub.transfer import push
from cosae.sae.calibrate import calibrate
from tests.interop.peers.environments import find_python, run
from tests.interop.test_delphi import MODULE
from tests.interop.test_delphi import write as write_cache
from tests.interop.test_neuronpedia import SITE, export
from tests.support.hub_stand_in import WRITER, running
from tests.support.small_exports import dense, make_model, make_sae, whole_sequences

HERE = Path(__file__).parent
WITH_EXAMPLES = ("nnsight", "transformer_lens", "saelens", "dictionary_learning", "sparsify", "saebench")
"""Libraries that a block in docs/interop needs; the block begins with ```python NAME."""
ROOT = HERE.parents[1]


def needs(name: str) -> Any:
    reason = f"build it with tests/interop/peers/environments.py {name}"
    return pytest.mark.skipif(find_python(name) is None, reason=reason)


def answer(name: str, *arguments: object, peer: str | None = None, **more: str) -> Any:
    """What a check prints, run by its peer's Python with this cosae lent to it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **more}
    command = [find_python(peer or name), HERE / "peers" / f"{name}_checks.py", *arguments]
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@needs("neuronpedia")
def test_neuronpedias_client_sends_and_saedashboards_classes_read_an_export(tmp_path: Path) -> None:
    model = make_model("llama")
    sae = make_sae(model)
    with torch.no_grad():
        sae.selector.threshold = torch.full((48,), float(sae.threshold))
        sae.selector.threshold[3] = 1e9
    found = export(model, sae, tmp_path / "out", features_per_batch=20)
    living = [f["feature_index"] for batch in found for f in batch["features"] if f["activations"]]
    got = answer("neuronpedia", tmp_path / "out")
    assert got["read"] == 48
    assert got["sent"] == living  # once each, in order, though the second batch failed the first time
    assert 3 not in living
    assert got["source"] == ["2-cosae-res-48"]
    assert got["top"]["quantileFraction"] is None
    said = got["said"]
    assert "NEURONPEDIA_API_KEY" in said["without a key"]
    assert "the key is not accepted" in said["wrong key"]
    assert "1 of 3 batches arrived: run the same command again" in said["server error"]
    assert said["again"].startswith("sent ")
    assert said["once more"] == "sent 0 features to source 2-cosae-res-48 of model tiny"
    assert said["unreachable"].startswith(
        "refused: Neuronpedia did not take the upload (the server could not be reached)"
    )
    assert all("\n" not in one for one in said.values())


@pytest.mark.slow
@needs("delphi")
@pytest.mark.parametrize("n_splits", [None, 48])
def test_delphis_loader_reads_every_activation(tmp_path: Path, n_splits: int | None) -> None:
    model = make_model("llama")
    sae = make_sae(model)
    with torch.no_grad():
        sae.selector.threshold = torch.full((48,), float(sae.threshold))
        sae.selector.threshold[5] = 1e9  # a dead latent: with 48 splits, an empty file
    write_cache(model, sae, tmp_path / "out", n_splits=n_splits)
    got = answer("delphi", tmp_path / "out", MODULE)
    truth = dense(model, sae, whole_sequences(), SITE)[0]
    assert got["modules"] == [MODULE]
    assert got["tokens"] == whole_sequences().ids_ST.tolist()
    assert len(got["activations"]) == (truth != 0).sum() > 1000
    for place, value in got["activations"].items():
        row, position, latent = (int(part) for part in place.split(","))
        assert value == pytest.approx(float(truth[row, position, latent]), rel=1e-3)
    assert sorted(got["records"]) == got["chosen"]
    largest = {latent: truth[..., latent].max() for latent in got["records"]}
    assert got["largest"] == pytest.approx([largest[latent] for latent in got["records"]], rel=1e-3)
    assert min(got["examples"]) > 0


@pytest.mark.slow
@needs("nnsight")
def test_the_plain_hook_in_nnsight_is_the_splice() -> None:
    got = answer("nnsight")
    assert got["reconstructed"] == got["edited"] == got["afterwards"] == 0
    assert got["moved"] > 1
    assert got["generated"] == got["wanted"]


@pytest.mark.slow
@needs("transformer_lens")
def test_the_plain_hook_in_a_transformer_bridge_is_the_splice() -> None:
    got = answer("transformer_lens")
    limit = 1e-4  # the bridge's own logits differ from the model's by 1e-5
    assert got["own"] < limit
    assert got["afterwards"] < limit
    assert len(got["sites"]) == 4
    assert got["hooks"] < limit
    for site, (difference, moved) in got["sites"].items():
        assert difference < limit < 1 < moved, site
    assert got["edited"] < limit
    assert got["padded"] < limit


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=needs(n)) for n in WITH_EXAMPLES])
def test_the_pages_example(name: str, tmp_path: Path) -> None:
    pages = "".join(page.read_text("utf-8") for page in (ROOT / "docs" / "interop").glob("*.md"))
    (block,) = re.findall(rf"^```python {name}\n(.*?)^```", pages, re.MULTILINE | re.DOTALL)
    (tmp_path / "example.py").write_text(block, "utf-8")
    python = find_python(name)
    assert python is not None
    run(python, tmp_path / "example.py")


@pytest.mark.slow
@needs("saelens")
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
@pytest.mark.parametrize("score", ["inner", "cosine", "cosine_per_feature"])
def test_saelens_loads_what_was_pushed(score: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(1)) * 3
    sae = cosae.SAE.build(d_in=16, d_sae=48, score=score, selector="batch_topk", k=4, sample=x)
    calibrate(sae, x)
    with running() as hub:
        push(sae, "me/saes:layer_5/one", token=WRITER, endpoint=hub.url)
        place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        got = answer("hub", "me/saes", "layer_5/one", 16, peer="saelens", **place)
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(3)) * 3
    with torch.no_grad():
        codes, recon = sae.encode(x).to_dense(), sae(x)
    assert torch.allclose(torch.tensor(got["codes"]), codes, rtol=1e-5, atol=1e-5)
    assert torch.allclose(torch.tensor(got["reconstructed"]), recon, rtol=1e-5, atol=1e-5)
    assert int((codes != 0).sum()) > 20


@pytest.mark.slow
@needs("neuronpedia")
def test_the_numbers_of_a_dashboard_are_saedashboards_own(tmp_path: Path) -> None:
    model, sequences = make_model("llama"), whole_sequences(300, 24)
    sae = make_sae(model)
    found = [f for batch in export(model, sae, tmp_path / "out", sequences) for f in batch["features"]]
    codes, x = dense(model, sae, sequences, SITE)
    np.savez(
        tmp_path / "numbers.npz",
        codes=codes,
        x=x,
        read=~sequences.special_ST.numpy(),
        decoder=sae.W_dec.detach().numpy(),
        unembedding=model.lm_head.weight.detach().numpy(),
    )
    theirs = answer("dashboard", tmp_path / "numbers.npz", peer="neuronpedia")
    for ours, want in zip(found, theirs, strict=True):
        bins = list(dict.fromkeys((a["bin_min"], a["bin_max"], a["bin_contains"]) for a in ours["activations"]))
        assert bins[0] == pytest.approx(want["bins"][0], abs=1.1e-3)
        # an interval without a token has no window, here as there
        filled = [one for one in want["bins"][1:] if one[2] > 0]
        assert np.allclose(np.array(bins[1:]), np.array(filled), atol=1.1e-3)
        for name, mine in (("freq", "freq_hist_data_bar"), ("logits", "logits_hist_data_bar")):
            heights, values = want[name]
            assert np.abs(np.subtract(ours[f"{mine}_heights"], heights)).max() <= 1  # a value on an edge
            assert ours[f"{mine}_values"] == pytest.approx(values, abs=1.1e-3)
        for name, mine in (("pos", "pos_values"), ("neg", "neg_values")):
            assert ours[mine] == pytest.approx(want[name], abs=1.1e-3)
        for name in ("neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_pearson"):
            assert ours[name] == pytest.approx(want[name], abs=1.1e-3)
        assert ours["correlated_features_pearson"] == pytest.approx(want["correlated_features_pearson"], abs=1.1e-3)
        assert ours["correlated_neurons_l1"] == pytest.approx(want["correlated_neurons_cossim"], abs=2e-3)
        assert ours["correlated_features_l1"] == pytest.approx(want["correlated_features_cossim"], abs=2e-3)
        assert ours["neuron_alignment_indices"] == want["neuron_alignment_indices"]
