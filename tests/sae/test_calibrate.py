"""Calibration: the count is exact, chunks do not matter, padding does not count, refusals change nothing."""

from __future__ import annotations

import math

import pytest
import torch

from cosae import SAE, CosaeError
from cosae.sae import calibrate as module
from cosae.sae.calibrate import calibrate, measure_l0
from cosae.sae.selector import CALIBRATED_SELECTORS

D, F, K = 10, 40, 5


def make_x(n: int, seed: int = 0, spread: float = 0.4) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=draw) * torch.exp(spread * torch.randn(n, 1, generator=draw)) * 3


@torch.no_grad()
def make_sae(selector: str, score: str = "cosine") -> SAE:
    sae = SAE.build(D, F, score, selector, K, 0, a_init=0.5, sample=make_x(500, 9))
    draw = torch.Generator().manual_seed(1)
    sae.score.bias_F.add_(0.1 * torch.randn(F, generator=draw))
    if selector == "gated":
        sae.selector.b_mag_F.copy_(torch.randn(F, generator=draw))
    return sae


def state(sae: SAE) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in sae.state_dict().items()}


@pytest.mark.parametrize("score", ["inner", "cosine", "cosine_per_feature"])
@pytest.mark.parametrize("selector", CALIBRATED_SELECTORS)
def test_l0_on_held_out_activations(selector: str, score: str) -> None:
    """Within 2 % of the target on tokens that calibration never saw."""
    sae = make_sae(selector, score)
    found = calibrate(sae, make_x(6000, 2, 0.1))
    assert found.target == K
    assert found.l0 == K
    assert measure_l0(sae, make_x(6000, 3, 0.1)) == pytest.approx(K, rel=0.02)


@pytest.mark.parametrize("selector", CALIBRATED_SELECTORS)
def test_chunks_do_not_matter(selector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the order: all large scores in one chunk is the case that needs a second look."""
    x_ND = make_x(1000, 4)
    whole = make_sae(selector)
    calibrate(whole, x_ND, 3.0)
    sae = make_sae(selector)
    strength_N = sae.encode(x_ND).count_B if selector != "batch_topk" else sae.scores(x_ND).detach().amax(-1)
    sorted_ND = x_ND[strength_N.argsort(descending=True)]
    monkeypatch.setattr(module, "CHUNK_ENTRIES", 64 * F)
    for rows_ND in (x_ND, sorted_ND, sorted_ND.flip(0)):
        part = make_sae(selector)
        assert calibrate(part, rows_ND, 3.0).l0 == 3.0
        torch.testing.assert_close(part.threshold, whole.threshold, rtol=1e-5, atol=1e-6)


def test_a_few_tokens_may_hold_all_large_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of 1 and 1000 under the inner product: the loud chunk fires everything, the quiet ones nothing."""
    x_ND = make_x(640, 5)
    x_ND[:64] *= 1000
    sae = SAE.build(D, F, "inner", "batch_topk", 1, 0)
    monkeypatch.setattr(module, "CHUNK_ENTRIES", 64 * F)
    found = calibrate(sae, x_ND)
    count_B = sae.encode(x_ND).count_B
    assert found.l0 == 1.0
    assert int(count_B[:64].sum()) == 640


def test_padding_is_no_token() -> None:
    x_ND = make_x(300, 6)
    padded_ND = torch.cat([torch.zeros(200, D), x_ND, torch.zeros(50, D)])
    for selector in CALIBRATED_SELECTORS:
        one, two = make_sae(selector), make_sae(selector)
        assert calibrate(one, x_ND).l0 == calibrate(two, padded_ND).l0 == K
        torch.testing.assert_close(one.threshold, two.threshold, rtol=1e-6, atol=1e-6)


def test_a_closed_gate_magnitude_is_no_firing() -> None:
    """Half the features cannot fire at all: the others make up the count."""
    sae = make_sae("gated")
    with torch.no_grad():
        sae.selector.b_mag_F[::2] = -1e4
    x_ND = make_x(400, 7)
    assert calibrate(sae, x_ND).l0 == K
    assert not (sae.encode(x_ND).feature_E % 2 == 0).any()


def test_ties_never_overshoot() -> None:
    """Equal tokens have equal scores: as many as fit below the target, since `>` keeps all or none of a tie."""
    sae = make_sae("batch_topk")
    x_ND = make_x(1, 8).expand(50, D)
    assert calibrate(sae, x_ND, 2.5).l0 == 2.0


def test_topk_is_measured_and_left() -> None:
    for selector in ("topk", "abs_topk"):
        sae = make_sae(selector)
        before = state(sae)
        assert calibrate(sae, make_x(100)).l0 == K
        assert state(sae) == before


@pytest.mark.parametrize("selector", CALIBRATED_SELECTORS)
def test_refusals_change_nothing(selector: str) -> None:
    sae, x_ND = make_sae(selector), make_x(100)
    calibrate(sae, x_ND)
    before = state(sae)
    spoiled_ND = x_ND.clone()
    spoiled_ND[70, 3] = math.nan
    for rows_ND, target, message in (
        (spoiled_ND, None, r"Got nan at position \[70, 3\]"),
        (x_ND[:0], None, "at least one activation"),
        (torch.zeros(5, D), None, "at least one activation"),
        (x_ND[:, :4], None, "shape"),
        (x_ND, 0.0, "target_l0 must lie above 0"),
        (x_ND, -2.0, "target_l0 must lie above 0"),
        (x_ND, F + 1.0, f"at most d_sae = {F}"),
        (x_ND, math.nan, "target_l0 must lie above 0"),
    ):
        with pytest.raises(CosaeError, match=message):
            calibrate(sae, rows_ND, target)
        assert state(sae) == before


@pytest.mark.parametrize("selector", CALIBRATED_SELECTORS)
def test_more_than_can_fire(selector: str) -> None:
    """A target that no threshold reaches: everything that can fire does, and thresholds stay finite."""
    sae, x_ND = make_sae(selector), make_x(100)
    found = calibrate(sae, x_ND, F)
    assert 0.3 * F < found.l0 < F
    assert calibrate(sae, x_ND, F).l0 == found.l0, "again and again"
    assert bool(sae.threshold.isfinite().all())
    assert calibrate(sae, x_ND, 2.0).l0 == 2.0


def test_calibrating_ends_the_dependence_on_the_batch() -> None:
    x_ND = make_x(64)
    sae = make_sae("batch_topk")
    assert not sae.calibrated
    alone = torch.cat([sae.encode(row[None]).count_B for row in x_ND])
    assert alone.tolist() == [K] * 64
    assert sae.encode(x_ND).count_B.tolist() != [K] * 64
    calibrate(sae, make_x(500, 1))
    assert sae.calibrated
    alone = torch.cat([sae.encode(row[None]).count_B for row in x_ND])
    assert torch.equal(alone, sae.encode(x_ND).count_B)
