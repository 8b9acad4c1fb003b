"""Dashboards: every number against the dense definition, the format key by key, limits, and nothing half-written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cosae.errors import CosaeError
from cosae.interop import cached_codes
from cosae.interop.neuronpedia import correlations
from cosae.interop.neuronpedia import dashboards as neuronpedia
from cosae.interop.neuronpedia import upload as neuronpedia_upload
from cosae.interop.neuronpedia.dashboards import batches, write_dashboards
from cosae.interop.neuronpedia.settings import Dashboard
from cosae.interop.neuronpedia.windows import histogram
from cosae.models.sites import resolve_site
from cosae.models.unembed import OUT_OF_RANGE, head_shares, residual_directions, spellings
from tests.support.small_exports import Words, dense, make_model, make_sae, make_sequences, whole_sequences

SITE = "resid_post.2"
KEYS = [
    *("feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    *("neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero"),
    *("freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
    *("n_prompts_total", "n_tokens_in_prompt", "dataset", "decoder_weights_dist", "activations", "vector"),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


@pytest.fixture(scope="module", params=["cosine", "signed"])
def sae(request: pytest.FixtureRequest, model: Any) -> Any:
    return make_sae(model) if request.param == "cosine" else make_sae(model, selector="abs_topk")


def settings(**changed: Any) -> Dashboard:
    return Dashboard(**{"model_id": "tiny", "set_name": "cosae-res-48", "layer": 2, "dataset": "words", **changed})


def export(model: Any, sae: Any, out: Path, sequences: Any = None, site: str = SITE, **changed: Any) -> list[Any]:
    sequences = whole_sequences() if sequences is None else sequences
    write_dashboards(model, Words(), resolve_site(model, site), sae, sequences, out, settings(**changed))
    names = sorted(out.glob("batch-*.json"), key=lambda p: int(p.stem[6:]))
    return [json.loads(path.read_text("utf-8")) for path in names]


@pytest.fixture(scope="module")
def written(model: Any, sae: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    patch = pytest.MonkeyPatch()
    patch.setattr(cached_codes, "CHUNK_TOKENS", 100)  # several chunks, blocks and panels
    patch.setattr(neuronpedia, "BLOCK_ENTRIES", 200)
    patch.setattr(correlations, "PANEL_CELLS", 48 * 20)
    out = tmp_path_factory.mktemp("np") / "out"
    found = export(model, sae, out, features_per_batch=20)
    patch.undo()
    return out, found, *dense(model, sae, whole_sequences(), SITE)


def test_files_and_keys_are_saedashboards(written: Any) -> None:
    out, found, *_ = written
    assert sorted(p.name for p in out.iterdir()) == [
        "batch-0.json", "batch-1.json", "batch-2.json", "cosae_export.json", "run_settings.json", "skipped_indexes.json"
    ]  # fmt: skip
    assert [len(batch["features"]) for batch in found] == [16, 16, 16]
    for batch in found:
        assert list(batch) == ["model_id", "layer", "sae_set", "sae_id_suffix", "features"]
        assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("tiny", 2, "cosae-res-48")
        for feature in batch["features"]:
            assert list(feature) == KEYS
            for one in feature["activations"]:
                assert list(one) == ["bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"]
    assert [f["feature_index"] for batch in found for f in batch["features"]] == list(range(48))
    skipped = json.loads((out / "skipped_indexes.json").read_text())
    assert skipped["layer"] == "2"
    assert skipped["skipped_indexes"] == []


def test_windows_hold_the_codes_of_their_sequence_and_the_top_group_the_largest(written: Any) -> None:
    _, found, codes_STF, _ = written
    ids = whole_sequences().ids_ST
    spelled = spellings(Words(), 97)
    for feature in (f for batch in found for f in batch["features"]):
        dense_ST = codes_STF[..., feature["feature_index"]].astype(np.float64)[:, 1:]
        rows = {tuple(spelled[i] for i in row[1:].tolist()): number for number, row in enumerate(ids)}
        for one in feature["activations"]:
            row = rows[tuple(one["tokens"])]
            assert one["values"] == pytest.approx(dense_ST[row], abs=5.1e-4)
            size = abs(dense_ST[row, one["qualifying_token_index"]])
            if one["bin_contains"] >= 0:
                assert one["bin_min"] - 1e-3 <= size <= one["bin_max"] + 1e-3
                share = ((abs(codes_STF[..., feature["feature_index"]]) >= one["bin_min"] - 5e-4) &
                         (abs(codes_STF[..., feature["feature_index"]]) <= one["bin_max"] + 5e-4)).mean()  # fmt: skip
                assert one["bin_contains"] == pytest.approx(share, abs=5e-3)
        top = [one for one in feature["activations"] if one["bin_contains"] == -1]
        if not feature["activations"]:
            assert not dense_ST.any()
            continue
        assert top[0]["bin_min"] == -1
        assert top[0]["bin_max"] == pytest.approx(abs(dense_ST).max(), abs=5.1e-4)
        best = sorted(abs(dense_ST).max(1)[abs(dense_ST).max(1) > 0], reverse=True)[:20]
        assert [abs(w["values"][w["qualifying_token_index"]]) for w in top] == pytest.approx(best, abs=5.1e-4)
        for low in {one["bin_min"] for one in feature["activations"]}:
            group = [tuple(one["tokens"]) for one in feature["activations"] if one["bin_min"] == low]
            assert len(set(group)) == len(group) <= 20


def test_densities_histograms_and_partners_are_the_dense_ones(written: Any, model: Any, sae: Any) -> None:
    _, found, codes_STF, x_STD = written
    read = ~whole_sequences().special_ST.numpy()
    flat, x = codes_STF[read].astype(np.float64), x_STD[read].astype(np.float64)
    centred = flat - flat.mean(0)
    length = np.linalg.norm(centred, axis=0)
    with np.errstate(all="ignore"):
        between = np.nan_to_num(centred.T @ centred / np.outer(length, length))
        neurons = np.nan_to_num(centred.T @ (x - x.mean(0)) / np.outer(length, np.linalg.norm(x - x.mean(0), axis=0)))
    np.fill_diagonal(between, -np.inf)
    for feature in (f for batch in found for f in batch["features"]):
        i = feature["feature_index"]
        value = flat[:, i][flat[:, i] != 0]
        assert feature["frac_nonzero"] == len(value) / codes_STF[..., 0].size
        assert sum(feature["freq_hist_data_bar_heights"]) == len(value)
        assert len(feature["freq_hist_data_bar_values"]) in (0, 50)
        assert feature["correlated_features_pearson"] == pytest.approx(np.sort(between[i])[::-1][:3], abs=1.1e-3)
        assert between[i][feature["correlated_features_indices"]] == pytest.approx(
            np.sort(between[i])[::-1][:3], abs=1e-5
        )
        assert feature["correlated_neurons_pearson"] == pytest.approx(np.sort(neurons[i])[::-1][:3], abs=1.1e-3)
        row = sae.W_dec[i].detach().double()
        assert feature["neuron_alignment_values"] == pytest.approx(row.topk(3).values.numpy(), abs=5.1e-4)
        share = row.topk(3).values.abs() / row.abs().sum()
        assert feature["neuron_alignment_l1"] == pytest.approx(share.numpy(), abs=5.1e-4)
        logits = (model.lm_head.weight.detach() @ sae.W_dec[i].detach()).double()
        assert feature["pos_values"] == pytest.approx(logits.topk(10).values.numpy(), abs=5.1e-4)
        assert feature["neg_values"] == pytest.approx((-logits).topk(10).values.neg().numpy(), abs=5.1e-4)
        assert feature["pos_str"][0] == spellings(Words(), 97)[int(logits.argmax())]
        assert sum(feature["logits_hist_data_bar_heights"]) == 97


def test_the_same_seed_gives_the_same_bytes_and_another_other_windows(model: Any, tmp_path: Path) -> None:
    sae = make_sae(model)
    first, again, other = (export(model, sae, tmp_path / n, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert first == again
    assert first != other


def test_high_norm_tokens_can_be_left_out(model: Any, tmp_path: Path) -> None:
    sae = make_sae(model)
    all_of_them = export(model, sae, tmp_path / "all")
    few = export(model, sae, tmp_path / "few", ignore_norm_above=1.05)
    assert sum(f["frac_nonzero"] for b in few for f in b["features"]) < 0.9 * sum(
        f["frac_nonzero"] for b in all_of_them for f in b["features"]
    )


def test_directions_come_through_the_layer_that_writes_to_the_stream(model: Any) -> None:
    rows_FD = torch.randn(5, 32)
    site = resolve_site(model, "model.layers.1.self_attn.o_proj:input")
    weight = model.model.layers[1].self_attn.o_proj.weight
    assert torch.allclose(residual_directions(model, site, rows_FD), rows_FD @ weight.T)
    shares = head_shares(model, site, rows_FD)
    assert shares.shape == (5, 4)
    assert torch.allclose(shares.sum(1), torch.ones(5))
    assert shares[0, 1] / shares[0, 0] == pytest.approx(
        float(rows_FD[0, 8:16].norm() / rows_FD[0, :8].norm()), rel=1e-5
    )
    assert residual_directions(model, resolve_site(model, "model.layers.1.self_attn.q_proj"), rows_FD) is None
    assert head_shares(model, resolve_site(model, SITE), rows_FD) is None
    gpt2 = make_model("gpt2")
    site = resolve_site(gpt2, "transformer.h.1.attn.c_proj:input")
    assert torch.allclose(residual_directions(gpt2, site, rows_FD), rows_FD @ gpt2.transformer.h[1].attn.c_proj.weight)


def test_a_site_off_the_stream_has_no_logits_and_head_shares_where_heads_are(model: Any, tmp_path: Path) -> None:
    sae = make_sae(model, "model.layers.1.self_attn.q_proj")
    (batch,) = export(model, sae, tmp_path / "q", site="model.layers.1.self_attn.q_proj")
    assert batch["features"][0]["pos_str"] == []
    assert batch["features"][0]["decoder_weights_dist"] == []
    sae = make_sae(model, SITE)
    (batch,) = export(model, sae, tmp_path / "o", site="model.layers.1.self_attn.o_proj:input")
    assert len(batch["features"][0]["decoder_weights_dist"]) == 4
    assert len(batch["features"][0]["pos_str"]) == 10


def test_dead_features_and_features_that_fire_at_the_first_token_only(model: Any, tmp_path: Path) -> None:
    sae = make_sae(model)
    with torch.no_grad():
        sae.selector.threshold = torch.full((48,), float(sae.threshold))
        sae.selector.threshold[3] = 1e9
    (batch,) = export(model, sae, tmp_path / "out")
    dead = batch["features"][3]
    assert dead["activations"] == []
    assert dead["frac_nonzero"] == 0
    assert dead["freq_hist_data_bar_heights"] == []
    plan = neuronpedia_upload.plan(tmp_path / "out")
    assert plan.dead >= 1
    assert plan.features + plan.dead == 48
    assert plan.source == "2-cosae-res-48"
    assert "1 dead feature left out: nothing to show" in str(plan)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model_id": "a b"}, "model_id must be a name"),
        ({"set_name": ""}, "set_name must be a name"),
        ({"top": 0}, "top must be at least 1"),
        ({"features_per_batch": 129}, "between 1 and 128"),
        ({"ignore_norm_above": 1.0}, "must be above 1"),
    ],
)
def test_settings_that_make_no_sense(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CosaeError, match=sentence):
        settings(**changed)


def test_what_cannot_be_exported_is_told_and_leaves_nothing(model: Any, tmp_path: Path) -> None:
    sae, out = make_sae(model), tmp_path / "out"
    with pytest.raises(CosaeError, match="without padding"):
        export(model, sae, out, make_sequences(n_positions=10, lengths=[10, 6, 8]))
    with pytest.raises(CosaeError, match="3 to 1025 tokens"):
        export(model, sae, out, whole_sequences(context=2))
    with pytest.raises(CosaeError, match=r"width 64.* d_in = 32"):
        export(model, sae, out, site="model.layers.1.mlp.up_proj")
    sae.selector.threshold = torch.tensor(math.nan)
    with pytest.raises(CosaeError, match="no inference threshold"):
        export(model, sae, out)
    assert list(tmp_path.iterdir()) == []
    (out / "thesis").mkdir(parents=True)
    with pytest.raises(CosaeError, match="holds no earlier result"):
        export(model, make_sae(model), out)
    assert (out / "thesis").is_dir()


def test_an_interruption_keeps_what_was_there(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, out = make_sae(model), tmp_path / "out"
    export(model, sae, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(neuronpedia, "windows", stop)
    with pytest.raises(KeyboardInterrupt):
        export(model, sae, out, top=3)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(neuronpedia, "windows", full)
    with pytest.raises(CosaeError, match="No space left on device"):
        export(model, sae, out, top=3)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]


def test_spellings_keep_spaces_and_pieces() -> None:
    found = spellings(Words(), 99)
    assert found[4:8] == ["w4", "Ã", " six", "w7"]
    assert found[97:] == [OUT_OF_RANGE] * 2


def test_batches_and_histograms() -> None:
    assert batches(48, 20) == [(0, 16), (16, 32), (32, 48)]
    assert batches(5, 128) == [(0, 5)]
    assert histogram(np.zeros(0)) == ([], pytest.approx(np.zeros(0)))
    heights, centres = histogram(np.array([2.0, 2.0]))
    assert sum(heights) == 2
    assert centres.min() < 2 < centres.max()


# ---------------------------------------------------------------- the upload's own checks


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: f.update(frac_nonzero=1.5), "density must lie between 0 and 1"),
        (lambda f: f.update(pos_str=["a"] * 21, pos_values=[0.0] * 21), "up to 20 logits"),
        (lambda f: f["activations"][0]["values"].pop(), "as many values"),
        (lambda f: f["activations"][0].update(tokens=["a"] * 1025, values=[0.0] * 1025), "1 to 1024 tokens"),
        (lambda f: f["activations"][0]["values"].__setitem__(0, float("nan")), "not a finite number"),
    ],
)
def test_the_servers_limits_are_kept_before_anything_is_sent(
    model: Any, tmp_path: Path, change: Any, sentence: str
) -> None:
    out = tmp_path / "out"
    (batch,) = export(model, make_sae(model), out)
    change(next(f for f in batch["features"] if f["activations"]))
    (out / "batch-0.json").write_text(json.dumps(batch))
    with pytest.raises(CosaeError, match=sentence):
        neuronpedia_upload.plan(out)


def test_an_upload_says_what_it_lacks(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    with pytest.raises(CosaeError, match=r"pip install neuronpedia|NEURONPEDIA_API_KEY"):
        neuronpedia_upload.check_ready()
    monkeypatch.setattr(neuronpedia_upload, "_client", lambda: None)
    with pytest.raises(CosaeError, match="environment variable NEURONPEDIA_API_KEY"):
        neuronpedia_upload.check_ready()
    (tmp_path / "cosae_export.json").write_text("{}")
    with pytest.raises(CosaeError, match="holds no export for Neuronpedia"):
        neuronpedia_upload.plan(tmp_path)
