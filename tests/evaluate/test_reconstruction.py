"""Reconstruction numbers against float64 closed forms and planted answers."""

import json

import pytest
import torch

import cosae
from cosae.errors import CosaeError
from cosae.evaluate.encoded import encode_all
from cosae.evaluate.reconstruction import paired_fve_differences, per_document
from cosae.sae.calibrate import calibrate
from cosae.types import Activations, Codes
from tests.support.passes import encoded, measure, measure_both

D = 6


class Planted:
    """Codes x itself, coordinate by coordinate (signed), reconstructs gain * x + offset; two features dead."""

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


def closed_form_fve(x_ND, recon_ND):
    x, recon = x_ND.double(), recon_ND.double()
    return float(1 - (x - recon).square().sum() / (x - x.mean(0)).square().sum())


def test_matches_the_closed_form_on_the_tokens_kept():
    activations, sink_N = some_activations()
    numbers = measure(Planted(0.8), activations, keep_N=~sink_N, batch_tokens=37)
    x_ND = activations.x_ND[~sink_N].double()
    recon_ND = activations.x_ND[~sink_N] * 0.8
    token_N = 1 - (x_ND - recon_ND).square().sum(1) / (x_ND - x_ND.mean(0)).square().sum(1)
    assert numbers["tokens"] == 496
    assert numbers["fve"] == pytest.approx(closed_form_fve(x_ND, recon_ND), rel=1e-12)
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
    for keep_N in (None, ~sink_N):
        whole, pieces = (measure(Planted(), activations, keep_N, batch_tokens=b) for b in (4096, 7))
        same_but_for_batches(whole, pieces, 1e-9)


def same_but_for_batches(whole, pieces, tolerance):
    """Every number but those that are of batches by definition."""
    whole, pieces = (dict(found) for found in (whole, pieces))
    quartiles = zip(whole.pop("by_norm_quartile"), pieces.pop("by_norm_quartile"), strict=True)
    for one, other in ((whole, pieces), *quartiles):
        for name in one.keys() - {"fve_per_batch", "fve_per_batch_tokens", "l0_histogram", "dead_by_tokens"}:
            assert other[name] == pytest.approx(one[name], rel=tolerance), name
        assert other["l0_histogram"] == one["l0_histogram"]
    assert pieces["dead_by_tokens"] == whole["dead_by_tokens"]


@pytest.mark.parametrize("selector", ["batch_topk", "topk", "jumprelu", "gated"])
def test_a_trained_kind_of_sae_gives_the_same_numbers_at_any_batch_size_and_keeps_its_bytes(selector):
    activations, sink_N = some_activations()
    sae = cosae.SAE.build(D, 24, score="cosine", selector=selector, k=3, seed=0, sample=activations.x_ND)
    calibrate(sae, activations.x_ND[~sink_N])
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    whole, *others = (measure(sae, activations, ~sink_N, batch_tokens=b) for b in (4096, 1, 33))
    for other in others:
        same_but_for_batches(whole, other, 1e-6)
    after = sae.state_dict()
    assert before.keys() == after.keys()
    assert all(after[k].numpy().tobytes() == v.numpy().tobytes() for k, v in before.items())


@pytest.mark.parametrize(("gain", "expected"), [(0.5, 0.75), (1.25, 0.9375), (2.0, 0.0), (-1.0, -3.0)])
def test_a_known_fve_comes_back_to_nine_digits(gain, expected):
    """Tokens in opposite pairs have mean 0, so a gain g leaves exactly 1 - (1 - g)² explained."""
    half_ND = torch.randint(-999, 1000, (300, D), generator=torch.Generator().manual_seed(1)).float()  # fp32 is exact
    activations = Activations.bare(torch.cat([half_ND, -half_ND]))
    numbers = measure(Planted(gain), activations, batch_tokens=101)
    assert numbers["fve"] == pytest.approx(expected, abs=1e-9)
    assert [q["fve_global"] for q in numbers["by_norm_quartile"]] == pytest.approx([expected] * 4, abs=1e-9)


def test_a_far_mean_does_not_cost_digits():
    half_ND = torch.randint(-8, 8, (300, D), generator=torch.Generator().manual_seed(1)).float()
    activations = Activations.bare(torch.cat([half_ND, -half_ND]) + 4096.0)

    class Shrinks(Planted):
        def decode(self, codes):
            return (codes.to_dense()[:, :D] - 4096.0) * 0.5 + 4096.0

    assert measure(Shrinks(), activations)["fve"] == pytest.approx(0.75, abs=1e-9)


def test_sinks_in_and_out_come_from_one_pass_and_equal_two():
    activations, sink_N = some_activations()
    sae = Planted(0.8, spoil=14.0, spoil_above=100.0)
    both = measure_both(sae, activations, sink_N, batch_tokens=64)
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


class Counted(Planted):
    """Reconstructs x; token t fires the features counts_NF says, whatever it is; tokens differ by their first entry."""

    def __init__(self, fired_NF):
        super().__init__(1.0)
        self.fired_NF, self.d_sae = fired_NF.float(), fired_NF.shape[1]

    def encode(self, x_BD):
        self.x_BD = x_BD
        return Codes.from_dense(self.fired_NF[x_BD[:, 0].long() - 1])

    def decode(self, codes):
        return self.x_BD


def counted(fired_NF):
    x_ND = torch.zeros(len(fired_NF), 2)
    x_ND[:, 0] = torch.arange(1, len(fired_NF) + 1)
    return Counted(fired_NF), Activations.bare(x_ND)


def test_l0_has_a_distribution_over_all_tokens_and_in_every_quartile():
    fired_NF = torch.arange(1, 9)[None, :] <= (torch.arange(100) // 25)[:, None] * 2  # quartile q fires 2q features
    numbers = measure(*counted(fired_NF), batch_tokens=13)
    assert numbers["l0"] == 3.0
    assert numbers["l0_histogram"] == {"edges": list(range(8)), "counts": [25, 0, 25, 0, 25, 0, 25]}
    assert numbers["l0_quantiles"] == [0, 0, 1.5, 3, 4.5, 6, 6]
    assert [q["l0"] for q in numbers["by_norm_quartile"]] == [0, 2, 4, 6]
    assert [q["l0_quantiles"][0] for q in numbers["by_norm_quartile"]] == [0, 2, 4, 6]
    assert [sum(q["l0_histogram"]["counts"]) for q in numbers["by_norm_quartile"]] == [25] * 4
    assert [q["dead_frac"] for q in numbers["by_norm_quartile"]] == [1, 6 / 8, 4 / 8, 2 / 8]
    assert numbers["dead_frac"] == 2 / 8


def test_a_long_tailed_l0_keeps_every_token_in_its_histogram():
    fired_NF = torch.arange(3000)[None, :] < torch.tensor([0, 1, 2, 80, 80, 3000])[:, None]
    histogram = measure(*counted(fired_NF))["l0_histogram"]
    edges, counts = histogram["edges"], histogram["counts"]
    assert (sum(counts), len(edges)) == (6, len(counts) + 1)
    assert edges == sorted(set(edges))
    assert len(edges) <= 130
    assert [counts[0], counts[1], counts[2], counts[-1]] == [1, 1, 1, 1]
    assert (edges[0], edges[-1]) == (0, 3001)


def test_dead_and_rare_are_over_the_stated_tokens():
    n = 20_000
    fired_NF = torch.zeros(n, 5, dtype=torch.bool)
    fired_NF[:, 0] = True
    fired_NF[5000, 1] = True  # once in 20 000: rare
    fired_NF[[0, 19_999], 2] = True  # twice: exactly 1 in 10 000 is not rare
    fired_NF[1999, 3] = True  # rare, and known by token 2000
    numbers = measure(*counted(fired_NF), batch_tokens=999)
    assert (numbers["tokens"], numbers["dead_frac"], numbers["rare_frac"]) == (n, 1 / 5, 3 / 5)
    assert numbers["rare_firings"] == pytest.approx(2.0)
    assert numbers["dead_by_tokens"] == [
        [1000, 3 / 5],
        [2000, 2 / 5],
        [4000, 2 / 5],
        [8000, 1 / 5],
        [16000, 1 / 5],
        [n, 1 / 5],
    ]
    assert [q["rare_frac"] for q in numbers["by_norm_quartile"]] == [2 / 5, 3 / 5, 4 / 5, 3 / 5]


def test_the_batch_variant_by_quartile_is_about_the_quartiles_own_mean_in_the_batch():
    activations, sink_N = some_activations(n=400)
    numbers = measure(Planted(0.5, offset=3.0), activations, ~sink_N, batch_tokens=400)
    assert [q["fve_per_batch"] for q in numbers["by_norm_quartile"]] == pytest.approx([0.75] * 4, abs=1e-6)
    assert all(q["fve"] < 0.7 for q in numbers["by_norm_quartile"])


def test_padding_enters_nothing():
    activations, sink_N = some_activations()
    padded = Activations.cat([activations, Activations.bare(torch.zeros(50, D))])
    more_N = torch.cat([sink_N, torch.zeros(50, dtype=torch.bool)])
    plain = measure_both(Planted(), activations, sink_N)
    found = measure_both(Planted(), padded, more_N)
    assert (found["n_sinks"], found["sink_frac"]) == (4, 4 / 500)
    for which in ("sinks_in", "sinks_out"):
        assert found[which] == plain[which]
    with pytest.raises(CosaeError, match="at least one token"):
        measure(Planted(), padded[500:])


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
    sums = {name: per_document(encoded(sae, activations, sink_N), "sinks_out") for name, sae in arms.items()}
    twin, better = paired_fve_differences(sums, "standard", seed=5, n_resamples=300)
    assert (twin["difference"], twin["low"], twin["high"]) == (0, 0, 0)
    fves = [measure(arms[name], activations, ~sink_N)["fve"] for name in ("better", "standard")]
    assert better["difference"] == pytest.approx(fves[0] - fves[1], rel=1e-9)
    assert 0 < better["low"] < better["difference"] < better["high"]
    assert 0 < better["median_token_low"] <= better["median_token_difference"] <= better["median_token_high"]
    assert (better["unit"], better["units"], better["seed"], better["resamples"]) == ("documents", 10, 5, 300)
    assert paired_fve_differences(sums, "standard", seed=5, n_resamples=300)[1] == better


def test_a_pass_holds_the_codes():
    activations, sink_N = some_activations()
    sae = Planted()
    kept = encoded(sae, activations, sink_N, batch_tokens=64).codes
    expected = encode_all(sae, activations)
    assert kept.shape == expected.shape == (500,)
    for name in ("offset_B1", "feature_E", "value_E"):
        assert torch.equal(getattr(kept, name), getattr(expected, name))


def test_rows_are_resampled_in_blocks_where_there_are_no_documents():
    activations = Activations.bare(some_activations()[0].x_ND)
    sums = per_document(encoded(Planted(), activations), "sinks_in")
    assert sums.unit == "blocks of 2 rows"
    assert len(sums.total_U) == 250


def test_mistakes_are_named():
    activations, sink_N = some_activations()
    with pytest.raises(CosaeError, match="at least one token"):
        measure(Planted(), activations, torch.zeros(500, dtype=torch.bool))
    with pytest.raises(CosaeError, match="one entry for each of 500"):
        measure(Planted(), activations, sink_N[:3])
    with pytest.raises(CosaeError, match="batch_tokens"):
        measure(Planted(), activations, batch_tokens=0)
    sums = per_document(encoded(Planted(), activations, sink_N), "sinks_in")
    with pytest.raises(CosaeError, match="baseline"):
        paired_fve_differences({"a": sums}, "b")
