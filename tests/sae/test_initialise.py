"""What a fresh SAE starts from: medians, gains and thresholds against known answers."""

from __future__ import annotations

import math

import pytest
import torch

from cosae import SAE
from cosae.sae.calibrate import measure_l0
from cosae.sae.frame import FRAMES
from cosae.sae.initialise import geometric_median


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_geometric_median_of_known_points() -> None:
    root3 = math.sqrt(3)
    triangle = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, root3]])
    torch.testing.assert_close(geometric_median(triangle), torch.tensor([1.0, root3 / 3]), rtol=0, atol=1e-4)
    # of a convex quadrilateral it is where the diagonals cross: here (0,0)-(4,4) and (3,0)-(0,3)
    quadrilateral = torch.tensor([[0.0, 0.0], [3.0, 0.0], [4.0, 4.0], [0.0, 3.0]])
    torch.testing.assert_close(geometric_median(quadrilateral), torch.tensor([1.5, 1.5]), rtol=0, atol=1e-3)
    line = torch.tensor([[1.0], [2.0], [3.0], [50.0], [1000.0]])
    torch.testing.assert_close(geometric_median(line), torch.tensor([3.0]), rtol=0, atol=1e-2)


def test_geometric_median_is_where_unit_pulls_cancel() -> None:
    x_ND = normal(500, 6).double() * torch.exp(normal(500, 1).double()) + 3
    pull_ND = x_ND - geometric_median(x_ND)
    assert float((pull_ND / pull_ND.norm(dim=-1, keepdim=True)).mean(0).norm()) < 1e-4


def test_an_outlier_moves_the_mean_and_not_the_median() -> None:
    x_ND = normal(400, 8) + 2.0
    spoiled_ND = x_ND.clone()
    spoiled_ND[0] = 1e5
    for centre, limit in (("geometric_median", 0.05), ("mean", 1e9)):
        clean = SAE.build(8, 16, k=3, sample=x_ND, centre=centre).b_dec
        moved = float((SAE.build(8, 16, k=3, sample=spoiled_ND, centre=centre).b_dec - clean).norm().detach())
        assert moved < limit
        assert moved > 100 or centre == "geometric_median"
    assert not SAE.build(8, 16, k=3, sample=x_ND, centre="zero").b_dec.any()


def test_padding_in_the_sample_counts_for_nothing() -> None:
    x_ND = normal(300, 8) + 5.0
    padded_ND = torch.cat([torch.zeros(5000, 8), x_ND])
    for selector in ("batch_topk", "jumprelu", "gated"):
        one = SAE.build(8, 16, "cosine", selector, 3, sample=x_ND).state_dict()
        two = SAE.build(8, 16, "cosine", selector, 3, sample=padded_ND).state_dict()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, equal_nan=True)


def test_the_layer_norm_centre_is_of_the_normed_activations() -> None:
    x_ND = normal(300, 8) * torch.exp(normal(300, 1, seed=1)) * 40 + 100
    normed_ND = (x_ND - x_ND.mean(-1, keepdim=True)) / x_ND.std(-1, correction=0, keepdim=True)
    sae = SAE.build(8, 16, k=3, frame="layer_norm", sample=x_ND, centre="mean")
    torch.testing.assert_close(sae.b_dec.detach(), normed_ND.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frame", FRAMES)
def test_log_gain_rules(frame: str) -> None:
    """auto takes ln mean|z| only where it is more than a factor 2 from √d, on either side."""
    d = 16
    direction_ND = normal(200, d)
    direction_ND = direction_ND / direction_ND.norm(dim=-1, keepdim=True)

    def gain(length: float, rule: str | float) -> float:
        sae = SAE.build(d, 20, "cosine", k=3, frame=frame, b_init=rule, centre="zero", sample=length * direction_ND)
        return float(sae.scale_b.detach())

    half_log_d = 0.5 * math.log(d)
    for length in (1.7, 2.2, 7.8, 8.4, 100.0):
        z = {"raw": length, "unit": 1.0, "layer_norm": 4.0}[frame]
        far = z < 2 or z > 8
        assert gain(length, "norm") == pytest.approx(math.log(z), abs=0.05)
        assert gain(length, "sqrt_d") == pytest.approx(half_log_d)
        assert gain(length, "auto") == pytest.approx(math.log(z) if far else half_log_d, abs=0.05)
        assert gain(length, 0.25) == 0.25
    assert float(SAE.build(d, 20, "cosine", k=3).scale_b.detach()) == pytest.approx(half_log_d)


@pytest.mark.parametrize("selector", ["jumprelu", "gated"])
@pytest.mark.parametrize("score", ["inner", "inner_unit", "cosine", "cosine_base_delta"])
@pytest.mark.parametrize("frame", FRAMES)
def test_thresholds_start_at_the_wanted_l0(frame: str, score: str, selector: str) -> None:
    """Over all scores, not the positive ones, which would start at half of it (paper §9 #9)."""
    x_ND = normal(1000, 12) * 7 + normal(12, seed=3)
    for k in (4, 12):
        sae = SAE.build(12, 48, score, selector, k, 1, frame, sample=x_ND)
        output = sae.train_forward(x_ND)
        on = output.selection.score_E > (
            sae.threshold[output.selection.entries.feature_E] if selector == "jumprelu" else 0
        )
        assert int(on.sum()) / 1000 == pytest.approx(k, rel=2e-3)
        if selector == "jumprelu":
            assert measure_l0(sae, x_ND) == pytest.approx(k, rel=2e-3)


@pytest.mark.parametrize("selector", ["jumprelu", "gated"])
@pytest.mark.parametrize("score", ["inner", "cosine"])
def test_without_a_sample_thresholds_fit_normal_inputs(score: str, selector: str) -> None:
    sae = SAE.build(64, 256, score, selector, 16, 1)
    assert measure_l0(sae, normal(500, 64)) == pytest.approx(16, rel=0.15)


def test_weights_come_from_the_seed_alone() -> None:
    one, two, other = (SAE.build(8, 16, "cosine", k=3, seed=s) for s in (5, 5, 6))
    assert torch.equal(one.W_dec, two.W_dec)
    assert not torch.equal(one.W_dec, other.W_dec)
    assert torch.equal(one.W_enc.T, one.W_dec)
    assert torch.equal(one.W_dec, SAE.build(8, 16, "inner", "topk", 4, 5, "unit").W_dec), "arms start alike"
    torch.testing.assert_close(one.W_dec.norm(dim=-1), torch.ones(16))
    assert not one.score.bias_F.any()
    before = torch.get_rng_state()
    SAE.build(8, 16, k=3, sample=normal(10, 8))
    assert torch.equal(before, torch.get_rng_state())


def test_the_exponent_starts_where_it_is_told() -> None:
    for score in ("cosine", "cosine_per_feature", "cosine_base_delta", "cosine_grouped"):
        assert bool((SAE.build(8, 16, score, k=3, a_init=0.6).scale_a == 0.6).all())
    assert float(SAE.build(8, 16, "cosine_fixed", k=3, a_init=0.6).scale_a) == 0.0
    assert float(SAE.build(8, 16, "inner", k=3, a_init=0.6).scale_a) == 1.0


def test_a_start_at_1_is_the_unit_row_inner_product() -> None:
    """auto: b = (1 − a) · …, so that scores start at their natural size whatever a starts from."""
    x = torch.randn(64, 16) * 9
    one = SAE.build(d_in=16, d_sae=32, score="cosine", k=4, a_init=1.0, sample=x)
    unit = SAE.build(d_in=16, d_sae=32, score="inner_unit", k=4, sample=x)
    assert torch.allclose(one.scores(x), unit.scores(x), atol=1e-4)
    half = SAE.build(d_in=16, d_sae=32, score="cosine", k=4, a_init=0.5)
    assert float(half.scale_b.detach()) == pytest.approx(0.25 * math.log(16))
    asked = SAE.build(d_in=16, d_sae=32, score="cosine", k=4, a_init=1.0, b_init="sqrt_d")
    assert float(asked.scale_b.detach()) == pytest.approx(0.5 * math.log(16))
