"""Folds on arbitrary SAEs: other parameters, the same function. The cosine traps by name."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosae import SAE, CosaeError
from cosae.sae.config import SAEConfig
from cosae.sae.fold import fold_decoder_norm, fold_input_scale
from cosae.sae.frame import FRAMES
from cosae.sae.score import OWNERS, SCORES, TWO_EXPONENTS
from cosae.sae.selector import SELECTORS


@st.composite
def saes(draw: st.DrawFn) -> SAE:
    """float64, so that only a wrong formula and no rounding can change what is chosen."""
    d_sae = draw(st.integers(2, 16))
    score = draw(st.sampled_from(sorted(SCORES)))
    owner = st.sampled_from((None, *OWNERS)) if score == TWO_EXPONENTS else st.none()
    cfg = SAEConfig(
        d_in=draw(st.integers(3, 8)),  # layer-normed pairs are all ±(1, −1): every score a tie
        d_sae=d_sae,
        score=score,
        a_owner=draw(owner),
        value_exponent_owner=draw(owner),
        selector=draw(st.sampled_from(SELECTORS)),
        k=draw(st.integers(1, d_sae)),
        frame=draw(st.sampled_from(FRAMES)),
        norm_restoring=draw(st.booleans()),
        n_groups=draw(st.integers(1, d_sae)),
    )
    sae = SAE(cfg).double()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    if draw(st.booleans()) and cfg.selector in ("batch_topk", "gated"):
        sae.selector.threshold.fill_(0.3)
    return sae


def batch(sae: SAE) -> Tensor:
    return 2 * torch.randn(9, sae.d_in, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


@settings(max_examples=120)
@given(saes())
def test_decoder_norms(sae: SAE) -> None:
    x_BD, length_F = batch(sae), sae.W_dec.detach().norm(dim=-1)
    folded = fold_decoder_norm(sae)
    near(folded.W_dec.detach().norm(dim=-1), torch.ones_like(length_F))
    near(folded(x_BD), sae(x_BD))
    factor_F = torch.ones_like(length_F) if sae.cfg.norm_restoring else length_F
    near(folded.encode(x_BD).to_dense(), sae.encode(x_BD).to_dense() * factor_F)
    near(folded.train_forward(x_BD).recon[0], sae.train_forward(x_BD).recon[0])
    near(fold_decoder_norm(folded)(x_BD), sae(x_BD))


@settings(max_examples=120)
@given(saes(), st.floats(1e-3, 1e3))
def test_input_scale(sae: SAE, s: float) -> None:
    x_BD = batch(sae)
    folded = fold_input_scale(sae, s)
    near(folded(x_BD / s) * s, sae(x_BD))
    near(folded.encode(x_BD / s).to_dense(), sae.encode(x_BD).to_dense())
    back = fold_input_scale(folded, 1 / s)
    near(back(x_BD), sae(x_BD))


@settings(max_examples=40)
@given(saes(), st.floats(0.1, 10))
def test_folds_follow_one_another(sae: SAE, s: float) -> None:
    x_BD = batch(sae)
    one = fold_decoder_norm(fold_input_scale(sae, s))
    two = fold_input_scale(fold_decoder_norm(sae), s)
    near(one(x_BD / s), two(x_BD / s))
    near(one(x_BD / s) * s, sae(x_BD))


def test_the_peers_fold_would_change_a_cosine_score() -> None:
    """Scaling encoder rows, which is what peers do, leaves a cosine's codes; ours moves b and the bias."""
    sae = SAE.build(6, 12, "cosine", "topk", 3, 0)
    with torch.no_grad():
        sae.decoder.rows_FD.mul_(torch.linspace(0.5, 2, 12)[:, None])
        sae.score.bias_F.fill_(0.3)
    length_F = sae.W_dec.detach().norm(dim=-1)
    folded = fold_decoder_norm(sae)
    torch.testing.assert_close(folded.scale_b, sae.scale_b + length_F.log())
    torch.testing.assert_close(folded.score.bias_F.detach(), 0.3 * length_F)
    assert torch.equal(folded.score.rows_FD, sae.score.rows_FD)
    inner = SAE.build(6, 12, "inner", "topk", 3, 0)
    with torch.no_grad():
        inner.decoder.rows_FD.mul_(2)
    torch.testing.assert_close(fold_decoder_norm(inner).score.rows_FD, inner.score.rows_FD * 2)


def test_input_scale_moves_b_by_a_ln_s() -> None:
    sae = SAE.build(6, 12, "cosine_per_feature", "topk", 3, 0)
    with torch.no_grad():
        sae.score.exponent.copy_(torch.linspace(-1, 2, 12))
    folded = fold_input_scale(sae, 3.0)
    torch.testing.assert_close(folded.scale_b, sae.scale_b + math.log(3.0) * sae.scale_a)
    for frame in ("unit", "layer_norm"):
        other = SAE.build(6, 12, "cosine", k=3, frame=frame)
        assert torch.equal(fold_input_scale(other, 3.0).scale_b, other.scale_b)


def test_refusals() -> None:
    sae = SAE.build(6, 12, k=3)
    for s in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(CosaeError, match="input scale must be a positive number"):
            fold_input_scale(sae, s)
    with torch.no_grad():
        sae.decoder.rows_FD[7] = 0
    with pytest.raises(CosaeError, match="Row 7 is"):
        fold_decoder_norm(sae)
