"""Read-time norm removal against closed forms."""

from __future__ import annotations

import pytest
import torch

import cosae
from cosae.errors import CosaeError
from cosae.evaluate.norms import read_time
from cosae.evaluate.norms.counterfactual import Largest
from cosae.evaluate.norms.read_time import remove_norm
from cosae.sae.calibrate import calibrate
from cosae.types import Activations

D = 8


def activations(n: int = 500, seed: int = 0) -> Activations:
    generator = torch.Generator().manual_seed(seed)
    direction_ND = torch.nn.functional.normalize(torch.randn(n, D, generator=generator), dim=-1)
    return Activations.bare(direction_ND * torch.randn(n, generator=generator).exp()[:, None])


def build(score: str = "inner", selector: str = "batch_topk", frame: str = "raw", **more: object) -> cosae.SAE:
    x_ND = activations().x_ND
    sae = cosae.SAE.build(
        d_in=D, d_sae=20, score=score, selector=selector, k=3, seed=1, frame=frame, sample=x_ND, **more
    )
    calibrate(sae, x_ND)
    return sae


def test_a_standard_sae_s_codes_are_divided_by_r() -> None:
    sae, sample = build(), activations()
    reader = remove_norm(sae, sample)
    plain, changed = sae.encode(sample.x_ND), reader.encode(sample.x_ND)
    r_N = (sample.x_ND - sae.centre_D.detach()).norm(dim=-1)
    assert torch.equal(plain.feature_E, changed.feature_E)
    expected_E = plain.value_E * (reader.median_r / r_N)[plain.token_E]
    assert torch.allclose(changed.value_E, expected_E, rtol=1e-5)
    half = remove_norm(sae, sample, 0.5).encode(sample.x_ND)
    assert torch.allclose(half.value_E, plain.value_E * (reader.median_r / r_N)[plain.token_E].sqrt(), rtol=1e-5)


def test_what_is_decoded_is_the_sae_s_own_reconstruction() -> None:
    for score in ("inner", "cosine_per_feature"):
        sae, sample = build(score), activations()
        reader = remove_norm(sae, sample)
        assert torch.allclose(reader.decode(reader.encode(sample.x_ND)), sae(sample.x_ND), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("score", "more"),
    [
        ("cosine_per_feature", {}),
        ("cosine_two_exponents", {"a_owner": "feature", "value_exponent_owner": "feature"}),
    ],
)
def test_each_feature_loses_its_own_exponent(score: str, more: dict[str, str]) -> None:
    sae, sample = build(score, **more), activations()
    with torch.no_grad():
        sae.score.exponent.copy_(torch.linspace(0, 1, 20))
        if sae.value_exponent is not None:
            sae.score.value_exponent.copy_(torch.linspace(1, -1, 20))
    calibrate(sae, sample.x_ND)
    scaled = Activations.bare(2 * (sample.x_ND - sae.centre_D.detach()) + sae.centre_D.detach())
    reader = remove_norm(sae, sample, keep_firings=False)
    now, then = reader.encode(sample.x_ND).to_dense(), reader.encode(scaled.x_ND).to_dense()
    assert torch.allclose(now, then, rtol=1e-4, atol=1e-5)
    assert now.count_nonzero() > 100
    kept = remove_norm(sae, sample)
    assert torch.allclose(kept.decode(kept.encode(sample.x_ND)), sae(sample.x_ND), rtol=1e-3, atol=1e-4)
    codes, changed = sae.encode(sample.x_ND), kept.encode(sample.x_ND)
    longer_E = (sample.x_ND - sae.centre_D.detach()).norm(dim=-1)[codes.token_E] / kept.median_r
    expected_E = codes.value_E / longer_E ** sae.score.growth[codes.feature_E]
    assert torch.allclose(changed.value_E, expected_E, rtol=1e-4)


def test_the_same_l0_is_kept_with_a_threshold_of_its_own() -> None:
    sae, sample = build(), activations()
    reader = remove_norm(sae, sample, keep_firings=False)
    assert reader.encode(sample.x_ND).l0 == pytest.approx(sae.encode(sample.x_ND).l0, abs=0.01)
    assert not torch.equal(reader.encode(sample.x_ND).offset_B1, sae.encode(sample.x_ND).offset_B1)


@pytest.mark.parametrize(("score", "frame"), [("inner", "unit"), ("inner", "layer_norm"), ("cosine_fixed", "raw")])
def test_where_there_is_no_growth_nothing_changes(score: str, frame: str) -> None:
    sae, sample = build(score, frame=frame), activations()
    plain, changed = sae.encode(sample.x_ND), remove_norm(sae, sample).encode(sample.x_ND)
    assert torch.equal(plain.value_E, changed.value_E)


def test_zero_rows_encode_to_nothing_and_no_parameter_moves() -> None:
    sae, sample = build(), activations()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    x_ND = sample.x_ND.clone()
    x_ND[4] = 0
    for keep in (True, False):
        codes = remove_norm(sae, sample, keep_firings=keep).encode(x_ND)
        assert int(codes.count_B[4]) == 0
        assert bool(codes.value_E.isfinite().all())
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def test_what_cannot_be_read_so_is_refused() -> None:
    with pytest.raises(CosaeError, match="no single threshold"):
        remove_norm(build(selector="gated"), activations(), keep_firings=False)
    with pytest.raises(CosaeError, match="got none"):
        remove_norm(build(), activations()[:0])
    fresh = cosae.SAE.build(d_in=D, d_sae=20, score="inner", selector="batch_topk", k=3, seed=1)
    with pytest.raises(CosaeError, match="calibrate it first"):
        remove_norm(fresh, activations())


@pytest.mark.parametrize(("n", "rows"), [(0, 7), (5, 1), (40, 7), (10**6, 50)])
def test_the_largest_of_many_batches_are_those_of_one_and_few_are_kept(n: int, rows: int) -> None:
    """Ties included: they were rounded to a few values."""
    score_NF = (4 * torch.randn(60, 20, generator=torch.Generator().manual_seed(0))).round() / 4
    largest, kept = Largest(n), 0
    for first in range(0, 60, rows):
        largest.add(score_NF[first : first + rows], first)
        kept = max(kept, sum(value.numel() for value in vars(largest).values() if isinstance(value, torch.Tensor)))
    positive = score_NF[score_NF > 0].sort(descending=True).values
    floor = float(positive[n]) if n < len(positive) else 0.0
    assert largest.above() == floor
    assert largest.ids().sort().values.tolist() == (score_NF.reshape(-1) > floor).nonzero()[:, 0].tolist()
    assert kept <= 2 * 2 * (n + 1)


def test_thresholds_are_found_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, sample = build("cosine_per_feature"), activations()
    whole = remove_norm(sae, sample, keep_firings=False).threshold
    monkeypatch.setattr(read_time, "DENSE_ELEMENTS", 20 * 7)
    assert remove_norm(sae, sample, keep_firings=False).threshold == pytest.approx(whole, rel=1e-6)
