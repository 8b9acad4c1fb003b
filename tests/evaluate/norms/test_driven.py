"""The counterfactual test and firing norms, against planted features and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cosae
from cosae.errors import CosaeError
from cosae.sae.calibrate import calibrate
from cosae.sae.fold import fold_decoder_norm
from cosae.types import Activations, Codes
from tests.support.passes import firing_norms, norm_driven, paired_norm_differences

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
@pytest.mark.parametrize("score", ["inner", "inner_unit", "cosine", "cosine_per_feature", "cosine_two_exponents"])
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


@pytest.mark.parametrize("selector", ["batch_topk", "gated"])
def test_values_grow_by_the_value_exponent_too(selector: str) -> None:
    """With a = 0 the same features fire at every length, and each code is (m / r)^δ times as large there."""
    sae = build("cosine_two_exponents", selector, value_exponent_init=0.7, value_exponent_owner="feature")
    activations = log_normal(seed=3)
    found = norm_driven(sae, activations)
    codes = sae.encode(activations.x_ND)
    r_N = (activations.x_ND - sae.centre_D.detach()).norm(dim=-1)
    change_E = ((found["median_r"] / r_N)[codes.token_E] ** 0.7 - 1).abs()
    numbers = found["sinks_out"]
    assert found["invariant"]
    assert numbers["share"] == 0.0
    assert numbers["value_change"] == pytest.approx(float(change_E.mean()), rel=1e-4)
    assert numbers["value_norm_frac"] > 0.1


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
    assert numbers["value_norm_frac"] == 0.0
    assert numbers["share_interval"] == [0.0, 0.0]
    share_F = numbers["per_feature"]["share"]
    assert set(share_F[~np.isnan(share_F)]) == {0.0}


@pytest.mark.parametrize("frame", ["raw", "unit", "layer_norm"])
@pytest.mark.parametrize("selector", ["batch_topk", "topk", "abs_topk", "jumprelu", "gated"])
def test_the_reading_as_it_is_is_what_encode_says(selector: str, frame: str) -> None:
    sae, activations = build("cosine_per_feature", selector, frame), log_normal(seed=3)
    with torch.no_grad():
        sae.score.exponent.uniform_(0, 1, generator=torch.Generator().manual_seed(2))
    codes = sae.encode(activations.x_ND)
    fired_F = np.bincount(codes.feature_E.numpy(), minlength=24)
    found = norm_driven(sae, activations, batch_tokens=50)["sinks_in"]
    assert found["per_feature"]["firings"].tolist() == fired_F.tolist()
    assert found["l0"] == pytest.approx(codes.l0)


@pytest.mark.parametrize("selector", ["batch_topk", "topk", "abs_topk", "jumprelu", "gated"])
def test_a_fold_of_decoder_norms_changes_no_answer(selector: str) -> None:
    """A fold rescales scores, thresholds and what top-k compares; what fires stays, in both readings."""
    sae, activations = build("cosine_per_feature", selector), log_normal(seed=3)
    with torch.no_grad():
        sae.score.exponent.fill_(0.7)
        sae.decoder.rows_FD.mul_(torch.linspace(0.5, 2.0, 24)[:, None])
    plain, folded = (norm_driven(one, activations)["sinks_in"] for one in (sae, fold_decoder_norm(sae)))
    for name in ("firings", "firings_at_median", "firings_in_both"):
        assert folded["per_feature"][name].tolist() == plain["per_feature"][name].tolist()
    folded_F, plain_F = (found["per_feature"]["value_norm_frac"] for found in (folded, plain))
    np.testing.assert_allclose(folded_F, plain_F, atol=1e-4, equal_nan=True)


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


def one_feature(exponent: float, threshold: float) -> cosae.SAE:
    """A single feature along e0 that fires where r^a · cos > threshold."""
    sae = cosae.SAE.build(d_in=2, d_sae=1, score="cosine_per_feature", selector="batch_topk", k=1, seed=0)
    with torch.no_grad():
        sae.centre_D.zero_()
        sae.score.rows_FD.copy_(torch.tensor([[1.0, 0.0]]))
        sae.score.exponent.fill_(exponent)
        sae.score.log_gain.zero_()
        sae.selector.threshold = torch.tensor(threshold)
    return sae


def cosines_by_lengths(lengths: tuple[float, ...], n: int = 1000) -> tuple[Activations, np.ndarray, np.ndarray]:
    """Every length with the same cosines to e0, evenly spaced in (0, 1); and cosines and lengths by token."""
    cosine_N = np.tile((np.arange(n) + 0.5) / n, len(lengths))
    length_N = np.repeat(lengths, n)
    x_ND = np.stack([cosine_N, np.sqrt(1 - cosine_N**2)], 1) * length_N[:, None]
    return Activations.bare(torch.from_numpy(x_ND).float()), cosine_N, length_N


def test_lengths_and_directions_apart_have_a_closed_form() -> None:
    """cos uniform on (0, 1), lengths ½, 1, 2, inner product, threshold ¼. The feature fires where cos > ¼ / r:
    on ½, ¾ and 7/8 of the tokens of each length; at the median length, 1, on ¾ of each."""
    activations, cosine_N, length_N = cosines_by_lengths((0.5, 1.0, 2.0))
    found = norm_driven(one_feature(1.0, 0.25), activations)
    assert found["median_r"] == pytest.approx(1.0)
    numbers = found["sinks_in"]
    now, then, both = 1 / 2 + 3 / 4 + 7 / 8, 3 * 3 / 4, 1 / 2 + 3 / 4 + 3 / 4
    assert numbers["share"] == pytest.approx(1 - both / (now + then - both), abs=1e-9)
    assert numbers["vanished_frac"] == pytest.approx((now - both) / now, abs=1e-9)
    assert numbers["appeared_frac"] == pytest.approx((then - both) / then, abs=1e-9)
    assert (numbers["l0"], numbers["l0_at_median"]) == pytest.approx((now / 3, then / 3))
    # at the median a value doubles where r = 1/2, stays where r = 1, and halves where r = 2
    assert numbers["value_change"] == pytest.approx((1 / 2 * 1 + 3 / 4 * 0 + 3 / 4 * 0.5) / both, abs=1e-6)
    on_N = (cosine_N > 0.25) & (cosine_N * length_N > 0.25)
    correlation = np.corrcoef(cosine_N[on_N], (cosine_N * length_N)[on_N])[0, 1]
    assert numbers["value_norm_frac"] == pytest.approx(1 - correlation**2, abs=1e-6)
    assert numbers["per_feature"]["value_norm_frac"][0] == pytest.approx(1 - correlation**2, abs=1e-6)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_the_share_grows_with_the_exponent_as_it_must(exponent: float) -> None:
    """One length, 4, sent to 1: of cos > ¼ / 4^a only cos > ¼ is left."""
    activations, _, _ = cosines_by_lengths((4.0,), n=3200)
    found = norm_driven(one_feature(exponent, 0.25), activations, median_r=1.0)["sinks_in"]
    before = 1 - 0.25 / 4**exponent
    assert found["share"] == pytest.approx(1 - 0.75 / before, abs=1e-3)
    assert found["appeared_frac"] == 0.0
    assert found["vanished_frac"] == found["share"]


def test_a_value_that_is_all_norm_and_one_that_is_all_direction() -> None:
    """One direction, many lengths: the inner product's value is nothing but norm. One length: nothing but direction."""
    along = torch.zeros(200, 2)
    along[:, 0] = torch.linspace(1, 3, 200)
    sae = one_feature(1.0, 0.1)
    assert norm_driven(sae, Activations.bare(along))["sinks_in"]["value_norm_frac"] == pytest.approx(1.0, abs=1e-9)
    around = cosines_by_lengths((2.0,))[0]
    assert norm_driven(sae, around)["sinks_in"]["value_norm_frac"] == pytest.approx(0.0, abs=1e-6)
    same = Activations.bare(torch.tensor([[1.0, 0.0]]).repeat(50, 1))
    found = norm_driven(sae, same)["sinks_in"]
    assert found["value_norm_frac"] is None  # a value that never varies
    assert np.isnan(found["per_feature"]["value_norm_frac"][0])


def test_pooled_shares_weigh_features_by_firing_and_the_mean_does_not() -> None:
    """The detector's two features: shares ½ over 100 entries and 0 over 60."""
    along, across = torch.zeros(100, 2), torch.zeros(60, 2)
    along[:, 0] = torch.tensor([0.5, 2.0]).repeat(50)
    across[:, 1] = torch.linspace(0.5, 2.0, 60)
    found = norm_driven(detector(), Activations.bare(torch.cat([along, across])), median_r=1.5)["sinks_in"]
    assert found["share"] == pytest.approx(50 / 160)
    assert found["mean_feature_share"] == pytest.approx(0.25)
    assert found["median_feature_share"] == pytest.approx(0.25)
    assert found["features_counted"] == 2


def test_differences_between_saes_are_paired_over_documents() -> None:
    activations = log_normal(900, seed=7)
    activations = Activations(**{**vars(activations), "doc_N": (torch.arange(900) // 30).int()})
    saes = {"standard": build("inner"), "twin": build("inner"), "cosine": build("cosine_fixed")}
    rows = paired_norm_differences(saes, activations, baseline="standard", seed=3)
    assert [(row["arm"], row["sinks"]) for row in rows] == [
        ("twin", "sinks_out"),
        ("cosine", "sinks_out"),
        ("twin", "sinks_in"),
        ("cosine", "sinks_in"),
    ]
    twin, cosine = rows[2:]
    assert (twin["difference"], twin["low"], twin["high"]) == (0.0, 0.0, 0.0)
    share = norm_driven(saes["standard"], activations)["sinks_in"]
    assert cosine["difference"] == pytest.approx(-share["share"])
    assert cosine["low"] < cosine["difference"] < cosine["high"] < 0
    # against exactly 0 the difference's interval is the share's own
    own = norm_driven(saes["standard"], activations, seed=3)["sinks_in"]["share_interval"]
    assert [-cosine["high"], -cosine["low"]] == pytest.approx(own)
    assert (cosine["unit"], cosine["units"], cosine["seed"]) == ("documents", 30, 3)
    with pytest.raises(CosaeError, match="baseline"):
        paired_norm_differences(saes, activations, baseline="nobody")


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
    for measure in (norm_driven, firing_norms):
        with pytest.raises(CosaeError, match="no inference threshold"):
            measure(sae, log_normal())


def test_mistakes_are_named() -> None:
    sae, activations = build(), log_normal(20)
    for measure in (norm_driven, firing_norms):
        with pytest.raises(CosaeError, match="each of 20"):
            measure(sae, activations, torch.zeros(3, dtype=torch.bool))
        for nothing in (activations[:0], Activations.bare(torch.zeros(5, D))):
            with pytest.raises(CosaeError, match="at least one token"):
                measure(sae, nothing)
    with pytest.raises(CosaeError, match="length above 0"):
        norm_driven(sae, activations, median_r=-1.0)


def test_firing_norms_tell_a_detector_from_a_direction() -> None:
    """Norms independent of content: feature 0 fires on the longest tenth, feature 1 on any tenth."""
    generator = torch.Generator().manual_seed(3)
    activations = log_normal(4000)
    fired = torch.rand(4000, 2, generator=generator) < 0.1
    fired[:, 0] = activations.norm_N > activations.norm_N.quantile(0.9)
    found = firing_norms(build(), activations, codes=Codes.from_dense(fired.float()))["sinks_in"]
    each = found["per_feature"]
    assert each["z"][0] > 20
    assert abs(each["z"][1]) < 3
    assert found["features_above"] == 1
    assert each["quartile_share"][0].tolist() == [0, 0, 0, 1]
    assert each["quartile_share"][1] == pytest.approx([0.25] * 4, abs=0.07)


def test_firing_norms_leave_padding_out_and_need_no_batch_size() -> None:
    sae, activations = build(), log_normal(300)
    padded = Activations.cat([activations, Activations.bare(torch.zeros(40, D))])
    sink_N = padded.norm_N > 3
    whole = firing_norms(sae, activations, sink_N[:300])
    for found in (firing_norms(sae, padded, sink_N), firing_norms(sae, padded, sink_N, batch_tokens=7)):
        for which in ("sinks_in", "sinks_out"):
            assert found[which]["tokens"] == whole[which]["tokens"]
            assert found[which]["quartile_share"] == pytest.approx(whole[which]["quartile_share"])
            assert found[which]["mean_firing_norm"] == pytest.approx(whole[which]["mean_firing_norm"])
    assert whole["sinks_out"]["tokens"] == 300 - int(sink_N.sum())


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
