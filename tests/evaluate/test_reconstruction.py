"""Reconstruction numbers against float64 closed forms and planted answers."""

import json

import pytest
import torch

from cosae.evaluate.reconstruction import (
    measure,
    measure_with_and_without_sinks,
    paired_fve_differences,
    per_document,
    rebuild_with_sinks,
)
from cosae.types import Activations, Codes, CosaeError

D = 6


class Planted:
    """Codes x itself, coordinate by coordinate (signed), rebuilds gain * x + offset; two features dead."""

    d_in, d_sae = D, D + 2

    def __init__(self, gain=0.8, offset=0.0, spoil=1.0, spoil_above=1e9):
        self.gain, self.offset, self.spoil, self.spoil_above = gain, offset, spoil, spoil_above

    def encode(self, x_BD):
        return Codes.from_dense(torch.cat([x_BD, torch.zeros(len(x_BD), 2)], dim=1))

    def decode(self, codes):
        x_BD = codes.to_dense()[:, :D]
        big_B = x_BD.norm(dim=-1, keepdim=True) > self.spoil_above
        return x_BD * torch.where(big_B, self.spoil, self.gain) + self.offset


def some_activations(n=500, n_docs=10, n_sinks=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(n, D, generator=generator) + 3.0
    x_ND[:n_sinks] *= 100.0
    activations = Activations.bare(x_ND)
    doc_N = (torch.arange(n) % n_docs).int()
    sink_N = torch.arange(n) < n_sinks
    return Activations(**{**vars(activations), "doc_N": doc_N}), sink_N


def closed_form_fve(x_ND, rebuilt_ND):
    x, rebuilt = x_ND.double(), rebuilt_ND.double()
    return float(1 - (x - rebuilt).square().sum() / (x - x.mean(0)).square().sum())


def test_matches_the_closed_form_on_the_tokens_kept():
    activations, sink_N = some_activations()
    numbers = measure(Planted(0.8), activations, keep_N=~sink_N, batch_tokens=37)
    x_ND = activations.x_ND[~sink_N].double()
    rebuilt_ND = activations.x_ND[~sink_N] * 0.8
    token_N = 1 - (x_ND - rebuilt_ND).square().sum(1) / (x_ND - x_ND.mean(0)).square().sum(1)
    assert numbers["tokens"] == 496
    assert numbers["fve"] == pytest.approx(closed_form_fve(x_ND, rebuilt_ND), rel=1e-12)
    assert numbers["median_token_fve"] == pytest.approx(float(token_N.quantile(0.5)), rel=1e-9)
    assert numbers["fve_per_batch"] == pytest.approx(1 - 0.2**2, rel=1e-6)
    assert numbers["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert numbers["norm_ratio"] == pytest.approx(0.8, abs=1e-6)
    assert numbers["l0"] == D
    assert numbers["l0_quantiles"] == [D] * 7
    assert numbers["dead_frac"] == pytest.approx(2 / 8)
    assert numbers["rare_frac"] == pytest.approx(2 / 8)


def test_a_constant_offset_costs_the_global_fve_but_not_the_batch_one():
    activations, sink_N = some_activations()
    numbers = measure(Planted(1.0, offset=0.5), activations, keep_N=~sink_N, batch_tokens=100)
    assert numbers["fve_per_batch"] == pytest.approx(1.0, abs=1e-9)
    assert numbers["fve_per_batch_tokens"] == 100
    x_ND = activations.x_ND[~sink_N]
    assert numbers["fve"] == pytest.approx(closed_form_fve(x_ND, x_ND + 0.5), rel=1e-6)
    assert numbers["fve"] < 0.8


def test_numbers_do_not_depend_on_the_batch_size():
    activations, sink_N = some_activations()
    batch_dependent = {"fve_per_batch", "fve_per_batch_tokens"}
    for keep_N in (None, ~sink_N):
        whole, pieces = (measure(Planted(), activations, keep_N, batch_tokens=b) for b in (4096, 7))
        for name in whole.keys() - batch_dependent - {"by_norm_quartile"}:
            assert pieces[name] == pytest.approx(whole[name], rel=1e-9), name
        for a, b in zip(whole["by_norm_quartile"], pieces["by_norm_quartile"], strict=True):
            assert b == pytest.approx(a, rel=1e-9)


def test_sinks_in_and_out_come_from_one_pass_and_equal_two():
    activations, sink_N = some_activations()
    sae = Planted(0.8, spoil=14.0, spoil_above=100.0)
    both = measure_with_and_without_sinks(sae, activations, sink_N, batch_tokens=64)
    assert both["sinks_in"] == measure(sae, activations, batch_tokens=64)
    assert both["sinks_out"] == measure(sae, activations, ~sink_N, batch_tokens=64)
    assert both["n_sinks"] == 4
    assert both["sinks_in"]["fve"] < 0 < both["sinks_out"]["fve"]
    assert both["on_sinks"]["norm_ratio"] == pytest.approx(14.0, rel=1e-5)


def test_quartiles_hold_a_quarter_each_and_find_the_planted_failure():
    activations, sink_N = some_activations(n=400)
    ceiling = float(activations.norm_N[~sink_N].quantile(0.75))
    numbers = measure(Planted(1.0, spoil=-1.0, spoil_above=ceiling), activations, ~sink_N)
    quartiles = numbers["by_norm_quartile"]
    assert [q["tokens"] for q in quartiles] == [99, 99, 99, 99]
    assert [q["cosine"] for q in quartiles] == pytest.approx([1, 1, 1, -1], abs=1e-6)
    rows_N = ~sink_N & (activations.norm_N > ceiling)
    x_ND = activations.x_ND[rows_N]
    assert quartiles[3]["fve"] == pytest.approx(closed_form_fve(x_ND, -x_ND), rel=1e-6)
    mean_D = activations.x_ND[~sink_N].double().mean(0)
    about_all = 1 - (2 * x_ND.double()).square().sum() / (x_ND.double() - mean_D).square().sum()
    assert quartiles[3]["fve_global"] == pytest.approx(float(about_all), rel=1e-6)
    assert quartiles[0]["norm_high"] == quartiles[1]["norm_low"]


def test_what_has_no_meaning_is_none_and_json_holds_it():
    numbers = measure(Planted(), Activations.bare(torch.ones(5, D)))
    assert numbers["fve"] is None
    assert numbers["median_token_fve"] is None
    json.dumps(numbers, allow_nan=False)


def test_measuring_changes_no_state():
    torch.manual_seed(0)
    sae = Planted()
    before = dict(vars(sae))
    random_state = torch.random.get_rng_state()
    measure(sae, some_activations()[0])
    assert vars(sae) == before
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_paired_difference_is_exact_for_a_uniform_gain_and_zero_for_a_twin():
    activations, sink_N = some_activations()
    arms = {"standard": Planted(0.8), "twin": Planted(0.8), "better": Planted(0.9)}
    sums = {
        name: per_document(rebuild_with_sinks(sae, activations, sink_N), activations, "out")
        for name, sae in arms.items()
    }
    twin, better = paired_fve_differences(sums, "standard", seed=5, n_resamples=300)
    assert (twin["difference"], twin["low"], twin["high"]) == (0, 0, 0)
    fves = [measure(arms[name], activations, ~sink_N)["fve"] for name in ("better", "standard")]
    assert better["difference"] == pytest.approx(fves[0] - fves[1], rel=1e-9)
    assert 0 < better["low"] < better["difference"] < better["high"]
    assert 0 < better["median_token_low"] <= better["median_token_difference"] <= better["median_token_high"]
    assert (better["unit"], better["units"], better["seed"], better["resamples"]) == ("documents", 10, 5, 300)
    assert paired_fve_differences(sums, "standard", seed=5, n_resamples=300)[1] == better


def test_rows_are_resampled_in_blocks_where_there_are_no_documents():
    activations = Activations.bare(some_activations()[0].x_ND)
    sums = per_document(
        rebuild_with_sinks(Planted(), activations, torch.zeros(500, dtype=torch.bool)), activations, "in"
    )
    assert sums.unit == "blocks of 2 rows"
    assert len(sums.total_U) == 250


def test_mistakes_are_named():
    activations, sink_N = some_activations()
    with pytest.raises(CosaeError, match="at least one token"):
        measure(Planted(), activations, torch.zeros(500, dtype=torch.bool))
    with pytest.raises(CosaeError, match=r"shape \(500,\)"):
        measure(Planted(), activations, sink_N[:3])
    with pytest.raises(CosaeError, match="batch_tokens"):
        measure(Planted(), activations, batch_tokens=0)
    sums = per_document(rebuild_with_sinks(Planted(), activations, sink_N), activations, "in")
    with pytest.raises(CosaeError, match="baseline"):
        paired_fve_differences({"a": sums}, "b")
