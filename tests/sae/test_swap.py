"""Swapped scores: exact where a closed form exists, at the wanted L0 and best size where refitted, plain where not."""

from __future__ import annotations

import math

import pytest
import torch

import cosae
from cosae.errors import CosaeError
from cosae.sae.calibrate import calibrate, measure_l0
from cosae.sae.score import SCORES
from cosae.sae.swap import swap_score
from cosae.types import Activations
from tests.support.passes import measure

D, F = 12, 30


def sample(n: int = 800, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    feature_FD = torch.randn(20, D, generator=generator)
    code_NF = (torch.rand(n, 20, generator=generator) < 0.15) * torch.rand(n, 20, generator=generator)
    return (code_NF @ feature_FD + 0.1 * torch.randn(n, D, generator=generator)) * (
        0.5 * torch.randn(n, generator=generator)
    ).exp()[:, None]


def build(score: str = "inner", selector: str = "batch_topk", frame: str = "raw", **more: object) -> cosae.SAE:
    x_ND = sample()
    sae = cosae.SAE.build(
        d_in=D, d_sae=F, score=score, selector=selector, k=4, seed=0, frame=frame, sample=x_ND, n_groups=3, **more
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        sae.score.rows_FD.mul_(torch.rand(F, 1, generator=generator) + 0.5)
        sae.score.bias_F.uniform_(-0.05, 0.05, generator=generator)
    calibrate(sae, x_ND)
    return sae


@pytest.mark.parametrize("selector", ["batch_topk", "topk", "abs_topk", "jumprelu", "gated"])
def test_an_inner_product_is_a_per_feature_cosine_with_exponent_one(selector: str) -> None:
    sae = build("inner", selector)
    x_ND = sample(seed=3)
    swapped = swap_score(sae, "cosine_per_feature", sample=sample(), a_init=1.0)
    again = swap_score(swapped, "inner", sample=sample())
    # the common size is refitted as well: codes agree up to that one factor
    with torch.no_grad():
        mine, theirs = sae.encode(x_ND).to_dense(), swapped.encode(x_ND).to_dense()
        back = again.encode(x_ND).to_dense()
    factor = float((mine * theirs).sum() / mine.square().sum())
    assert torch.allclose(factor * mine, theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))
    assert torch.allclose(back, theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("selector", ["batch_topk", "topk", "abs_topk", "jumprelu", "gated"])
@pytest.mark.parametrize("target", list(SCORES))
@pytest.mark.parametrize("source", ["inner", "cosine_per_feature"])
def test_a_refitted_swap_keeps_the_l0_and_reconstructs_best(source: str, target: str, selector: str) -> None:
    sae = build(source, selector)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    swapped = swap_score(sae, target, sample=sample(), refit=True)
    x_ND = sample()
    assert swapped.cfg.score == target
    assert measure_l0(swapped, x_ND) == pytest.approx(measure_l0(sae, x_ND), rel=0.02)
    with torch.no_grad():
        codes = swapped.encode(x_ND)
        centre = swapped.centre_D
        recon = swapped.decode(codes) - centre
        best = float((recon * (x_ND - centre)).sum() / recon.square().sum())
    assert best == pytest.approx(1.0, abs=1e-3)
    for name, value in sae.state_dict().items():
        assert torch.equal(value.nan_to_num(-1), before[name].nan_to_num(-1)), name


def test_refitting_brings_back_the_l0_that_the_paper_s_swap_loses() -> None:
    run = cosae.fit(sample(4000), ["standard"], d_sae=F, k=4, steps=200, batch_tokens=128, lr=1e-2)
    sae, x = run.saes["standard"], Activations.bare(sample())
    plain, fitted = swap_score(sae, "cosine", refit=False), swap_score(sae, "cosine", sample=sample())
    assert measure(fitted, x)["l0"] == pytest.approx(measure(sae, x)["l0"], rel=0.1)
    assert abs(measure(plain, x)["l0"] / measure(sae, x)["l0"] - 1) > 0.3


def test_without_refitting_only_the_score_changes() -> None:
    sae = build()
    swapped = swap_score(sae, "cosine", refit=False)
    assert float(swapped.scale_a.detach()) == 0.0
    assert float(swapped.scale_b.detach()) == pytest.approx(0.5 * math.log(D))
    assert torch.equal(swapped.threshold, sae.threshold)
    assert torch.equal(swapped.W_enc, sae.W_enc)
    assert torch.equal(swapped.b_enc, sae.b_enc)
    x_ND = sample()
    z_ND = x_ND - sae.centre_D
    cosine = torch.nn.functional.cosine_similarity(z_ND[:, None], sae.W_enc.T[None], dim=-1)
    assert torch.allclose(swapped.scores(x_ND), math.sqrt(D) * cosine + sae.b_enc, atol=1e-5)


def test_a_saved_swap_loads(tmp_path) -> None:
    swapped = swap_score(build(), "cosine_per_feature", sample=sample())
    cosae.save(swapped, tmp_path / "sae", probes=sample()[:4])
    assert torch.equal(cosae.load(tmp_path / "sae")(sample()), swapped(sample()))


def test_what_cannot_be_swapped_is_refused() -> None:
    with pytest.raises(CosaeError, match="score must be one of"):
        swap_score(build(), "euclid", sample=sample())
    with pytest.raises(CosaeError, match="needs a sample"):
        swap_score(build(), "cosine")
    with pytest.raises(CosaeError, match="not all 0"):
        swap_score(build(), "cosine", sample=torch.zeros(3, D))
    fresh = cosae.SAE.build(d_in=D, d_sae=F, score="inner", selector="batch_topk", k=4, seed=0)
    with pytest.raises(CosaeError, match="calibrate this"):
        swap_score(fresh, "cosine", sample=sample())
