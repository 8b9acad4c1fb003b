"""The counterfactual test and firing norms, against planted features and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cosae
from cosae.evaluate.norm_driven import firing_norms, norm_driven
from cosae.sae.calibrate import calibrate
from cosae.types import Activations, Codes, CosaeError

D = 8


def log_normal(n: int = 600, sigma: float = 0.7, seed: int = 0, d: int = D) -> Activations:
    generator = torch.Generator().manual_seed(seed)
    direction_ND = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=-1)
    length_N = (sigma * torch.randn(n, generator=generator)).exp()
    return Activations.bare(direction_ND * length_N[:, None])


def build(score: str = "inner", selector: str = "batch_topk", frame: str = "raw", **more: object) -> cosae.SAE:
    x_ND = log_normal().x_ND
    sae = cosae.SAE.build(
        d_in=D, d_sae=24, score=score, selector=selector, k=3, seed=1, frame=frame, sample=x_ND, **more
    )
    calibrate(sae, x_ND)
    return sae


def by_hand(
    sae: cosae.SAE, activations: Activations, middle: float
) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Firings as it is, and with x rescaled about the centre: through encode alone."""

    def firings(x_ND: torch.Tensor) -> set[tuple[int, int]]:
        codes = sae.encode(x_ND)
        return set(zip(codes.token_E.tolist(), codes.feature_E.tolist(), strict=True))

    centred_ND = activations.x_ND - sae.centre_D.detach()
    rescaled_ND = sae.centre_D.detach() + centred_ND * (middle / centred_ND.norm(dim=-1, keepdim=True))
    return firings(activations.x_ND), firings(rescaled_ND)


@pytest.mark.parametrize("selector", ["batch_topk", "topk", "abs_topk", "jumprelu", "gated"])
@pytest.mark.parametrize("score", ["inner", "inner_unit", "cosine", "cosine_per_feature"])
def test_it_counts_what_encoding_the_rescaled_tokens_gives(score: str, selector: str) -> None:
    sae, activations = build(score, selector), log_normal(seed=3)
    with torch.no_grad():
        sae.score.set_exponent(0.6)
        sae.score.bias_F.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(2))
        calibrate(sae, activations.x_ND)
    found = norm_driven(sae, activations)
    now, then = by_hand(sae, activations, found["median_r"])
    assert now != then
    numbers = found["sinks_out"]
    # rescaling x itself rounds: an entry on the very edge may fall to the other side
    assert numbers["share"] == pytest.approx(len(now ^ then) / len(now | then), abs=0.004)
    assert numbers["vanished_frac"] == pytest.approx(len(now - then) / len(now), abs=0.004)
    assert numbers["l0_at_median"] == pytest.approx(len(then) / len(activations), abs=0.01)


@pytest.mark.parametrize("selector", ["batch_topk", "topk", "abs_topk", "jumprelu", "gated"])
@pytest.mark.parametrize(
    ("score", "frame"), [("cosine_fixed", "raw"), ("inner", "unit"), ("cosine", "unit"), ("inner", "layer_norm")]
)
def test_without_an_exponent_it_is_exactly_zero(score: str, frame: str, selector: str) -> None:
    found = norm_driven(build(score, selector, frame), log_normal(sigma=2.0))
    numbers = found["sinks_in"]
    assert found["invariant"]
    assert numbers["l0"] > 0
    assert (numbers["share"], numbers["vanished_frac"], numbers["appeared_frac"]) == (0.0, 0.0, 0.0)
    assert numbers["value_change"] == 0.0


def detector(threshold: float = 1.0) -> cosae.SAE:
    """Two features in two dimensions: feature 0 reads the length along e0, feature 1 the sign of the direction only."""
    sae = cosae.SAE.build(d_in=2, d_sae=2, score="cosine_per_feature", selector="batch_topk", k=1, seed=0)
    with torch.no_grad():
        sae.centre_D.zero_()
        sae.score.rows_FD.copy_(torch.eye(2))
        sae.decoder.rows_FD.copy_(torch.eye(2))
        sae.score.exponent.copy_(torch.tensor([1.0, 0.0]))
        sae.score.log_gain.zero_()
        sae.score.bias_F.copy_(torch.tensor([0.0, 0.5]))
        sae.selector.threshold = torch.tensor(threshold)
    return sae


def test_a_planted_norm_detector_is_found_and_a_direction_is_not() -> None:
    """Feature 0 fires where r·cos > 1; half of the tokens along e0 have length 1/2, half 2."""
    length_N = torch.tensor([0.5, 2.0]).repeat(50)
    along = torch.zeros(100, 2)
    along[:, 0] = length_N
    across = torch.zeros(60, 2)
    across[:, 1] = torch.linspace(0.5, 2.0, 60)
    activations = Activations.bare(torch.cat([along, across]))
    found = norm_driven(detector(), activations, median_r=1.5)["sinks_out"]
    share_F = found["per_feature"]["share"]
    # at 1.5 all 100 tokens along e0 fire instead of 50: 50 of 100 appeared; feature 1 reads cos + 0.5 = 1.5 > 1 always
    assert share_F.tolist() == [0.5, 0.0]
    assert found["per_feature"]["firings"].tolist() == [50, 60]
    assert (found["appeared_frac"], found["vanished_frac"]) == (50 / 160, 0.0)
    norms = firing_norms(detector(), activations)["sinks_out"]
    assert norms["per_feature"]["z"][0] > 3
    assert norms["per_feature"]["mean_norm"][0] == 2.0


def test_sinks_are_apart_and_do_not_set_the_median() -> None:
    activations = log_normal()
    x_ND = activations.x_ND.clone()
    sink_N = torch.arange(len(x_ND)) % 3 == 0
    x_ND[sink_N] *= 1000
    sae = build()
    with_sinks = Activations.bare(x_ND)
    found = norm_driven(sae, with_sinks, sink_N)
    alone = norm_driven(sae, with_sinks[~sink_N])
    assert found["median_r"] == alone["median_r"]
    assert found["sinks_out"]["share"] == alone["sinks_in"]["share"]
    assert found["sinks_in"]["share"] > found["sinks_out"]["share"]
    assert found["sinks_in"]["tokens"] == len(x_ND)


def test_any_batch_size_gives_the_same_numbers_and_no_parameter_moves() -> None:
    sae, activations = build("cosine"), log_normal()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    numbers = [norm_driven(sae, activations, batch_tokens=b)["sinks_out"] for b in (1, 37, 4096)]
    for other in numbers[1:]:
        assert other["share"] == pytest.approx(numbers[0]["share"], abs=1e-6)
        assert other["value_change"] == pytest.approx(numbers[0]["value_change"], rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def test_zero_rows_and_a_token_at_the_centre_are_no_firings_that_change() -> None:
    sae = build()
    x_ND = log_normal(50).x_ND.clone()
    x_ND[3] = 0
    x_ND[4] = sae.centre_D.detach()
    found = norm_driven(sae, Activations.bare(x_ND))["sinks_in"]
    assert found["tokens"] == 49
    assert np.isfinite(found["share"])


def test_an_uncalibrated_batch_topk_is_refused() -> None:
    sae = cosae.SAE.build(d_in=D, d_sae=24, score="inner", selector="batch_topk", k=3, seed=1)
    with pytest.raises(CosaeError, match="no inference threshold"):
        norm_driven(sae, log_normal())


def test_the_null_of_firing_norms_is_the_permutation_of_norms() -> None:
    """Quartile shares, their standard deviation and a feature's z against permutations drawn one by one."""
    generator = torch.Generator().manual_seed(5)
    activations = log_normal(200)
    fired = torch.rand(200, 6, generator=generator) < torch.tensor([0.02, 0.1, 0.3, 0.5, 0.9, 0.2])
    fired[:, 5] = activations.norm_N > activations.norm_N.quantile(0.8)
    codes = Codes.from_dense(fired.float())
    sae = build()
    found = firing_norms(sae, activations, codes=codes)["sinks_in"]
    rng = np.random.default_rng(0)
    norm_N, fired_NF = activations.norm_N.double().numpy(), fired.numpy().astype(float)
    quartile_N = np.searchsorted(np.quantile(norm_N, [0.25, 0.5, 0.75]), norm_N)
    shares, means = [], []
    for _ in range(4000):
        order = rng.permutation(200)
        per_token = fired_NF.sum(1)
        shares.append(np.bincount(quartile_N[order], weights=per_token, minlength=4) / per_token.sum())
        means.append((norm_N[order] @ fired_NF) / fired_NF.sum(0))
    share_4 = np.bincount(quartile_N, weights=fired_NF.sum(1), minlength=4) / fired_NF.sum()
    assert found["quartile_share"] == pytest.approx(share_4.tolist(), abs=1e-12)
    assert found["quartile_null"] == pytest.approx(np.mean(shares, 0).tolist(), abs=0.005)
    assert found["quartile_z"] == pytest.approx(((share_4 - 0.25) / np.std(shares, 0)).tolist(), rel=0.06)
    mean_F = (norm_N @ fired_NF) / fired_NF.sum(0)
    expected_z = (mean_F - norm_N.mean()) / np.std(means, 0)
    assert found["per_feature"]["z"] == pytest.approx(expected_z, rel=0.08)
    assert found["per_feature"]["z"][5] > 6
