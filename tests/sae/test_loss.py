"""Loss terms against closed forms, and aux-k where it counts: it brings dead features back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cosae import SAE, CosaeError
from cosae.sae import loss as losses
from cosae.sae.frame import FRAMES
from cosae.sae.loss import LossConfig
from cosae.train.arm import Arm
from cosae.train.step import ArmState, OptimizerConfig, train_step

D, F, K, B = 9, 24, 4, 50


def make_x(seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=draw) * torch.exp(0.5 * torch.randn(B, 1, generator=draw)) * 4


@torch.no_grad()
def make_sae(selector: str = "batch_topk", **named: object) -> SAE:
    sae = SAE.build(D, F, "cosine", selector, K, 0, sample=make_x(1) + 1, **named)  # type: ignore[arg-type]
    sae.decoder.rows_FD.mul_(torch.rand(F, 1, generator=torch.Generator().manual_seed(2)) + 0.5)
    return sae


def term(sae: SAE, x_BD: Tensor, name: str = "reconstruction", **named: object) -> float:
    config = LossConfig(**named)  # type: ignore[arg-type]
    terms = losses.terms_of(sae, sae.train_forward(x_BD), config, variance=1.0, sparsity_weight=1.0)
    return float(terms[name].detach())


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("selector", ["batch_topk", "topk", "abs_topk"])
def test_reconstruction_is_one_minus_fve(frame: str, selector: str) -> None:
    """With the batch's own variance: the share of |x − mean x|² that x̂ misses, in float64 from x and x̂ alone."""
    sae, x_BD = make_sae(selector, frame=frame), make_x()
    x, x_hat = x_BD.double().numpy(), sae(x_BD).detach().double().numpy()
    variance = float(((x - x.mean(0)) ** 2).sum(1).mean())
    fve = 1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    output = sae.train_forward(x_BD)
    found = float(losses.reconstruction(output, LossConfig(), variance).detach())
    assert found == pytest.approx(1 - fve, rel=1e-4)


def test_space_is_the_frames_or_raw() -> None:
    x_BD = make_x()
    for frame in FRAMES:
        sae = make_sae("topk", frame=frame)
        output = sae.train_forward(x_BD)
        scale_B = {
            "raw": torch.ones(B),
            "unit": (x_BD - sae.b_dec).norm(dim=-1).detach(),
            "layer_norm": x_BD.std(-1, correction=0),
        }[frame]
        error_B = (x_BD - sae(x_BD)).square().sum(-1).detach()
        assert term(sae, x_BD, space="raw") == pytest.approx(float(error_B.mean()), rel=1e-4)
        assert term(sae, x_BD, space="frame") == pytest.approx(float((error_B / scale_B**2).mean()), rel=1e-4)
        assert len(output.recon) == 1


def test_prefixes_are_averaged() -> None:
    sae, x_BD = make_sae("topk", prefixes=(6, 15)), make_x()
    output = sae.train_forward(x_BD)
    each = [float((output.framed.z_BD - r).square().sum(-1).mean().detach()) for r in output.recon]
    assert len(set(each)) == 3
    assert term(sae, x_BD) == pytest.approx(sum(each) / 3, rel=1e-5)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_weights_have_mean_one_and_fall_with_the_norm(frame: str, power: float) -> None:
    sae, x_BD = make_sae(frame=frame), make_x()
    x_BD[[3, 8]] = 0
    output = sae.train_forward(x_BD)
    weight_B = losses.token_weights(output, power)
    live_B = (x_BD != 0).any(-1)
    assert not weight_B.requires_grad
    assert not weight_B[~live_B].any()
    assert float(weight_B[live_B].mean()) == pytest.approx(1.0, rel=1e-5)
    c_D = sae.b_dec.detach()
    centred_BD = x_BD - c_D
    if frame == "layer_norm":
        centred_BD = x_BD - x_BD.mean(-1, keepdim=True) - x_BD.std(-1, correction=0, keepdim=True) * c_D
    r_B = centred_BD.norm(dim=-1)[live_B]
    product_B = weight_B[live_B] * r_B**power
    torch.testing.assert_close(product_B, product_B[:1].expand_as(product_B), rtol=1e-4, atol=0)
    error_B = (x_BD - sae(x_BD)).square().sum(-1).detach() if frame == "raw" else None
    if error_B is not None:
        wanted = (
            float((weight_B * losses.squared_error(output, output.error[0], output.recon[0], "raw")).sum().detach())
            / 48
        )
        assert term(sae, x_BD, reweight=power) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("aux_k", [1, 3, 100])
@pytest.mark.parametrize("frame", FRAMES)
def test_aux_k_by_hand(frame: str, aux_k: int) -> None:
    """|e − Σ ReLU(top dead s_i) d_i|² / |e − mean e|² in numpy float64; who learns from it."""
    sae, x_BD = make_sae(frame=frame), make_x()
    x_BD[7] = 0
    with torch.no_grad():
        sae.score.bias_F.sub_(0.5)  # scores of both signs
    output = sae.train_forward(x_BD)
    dead = np.array([2, 3, 11, 17, 20])
    dead_F = torch.zeros(F, dtype=torch.bool)
    dead_F[torch.as_tensor(dead)] = True
    live = np.array([b for b in range(B) if b != 7])
    score = sae.scores(x_BD).detach().double().numpy()[live][:, dead]
    if aux_k < len(dead):
        cut = np.sort(score, axis=1)[:, -aux_k][:, None]
        score = np.where(score >= cut, score, 0.0)
    assert (score < 0).any() or aux_k == 1
    score = np.maximum(score, 0.0)
    residual = (output.framed.z_BD - output.recon[-1]).detach().double().numpy()[live]
    missed = residual - score @ sae.W_dec.detach().double().numpy()[dead]
    wanted = (missed**2).sum() / ((residual - residual.mean(0)) ** 2).sum()
    found = losses.aux_k(sae, output, dead_F, LossConfig(aux_k=aux_k))
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-4)
    weighed = losses.terms_of(sae, output, LossConfig(aux_k=aux_k, aux_coefficient=0.5), variance=3.0, dead_F=dead_F)
    assert float(weighed["aux_k"].detach()) == pytest.approx(0.5 * wanted, rel=1e-4)
    found.backward()
    for parameter in (sae.score.rows_FD, sae.score.bias_F, sae.decoder.rows_FD):
        assert parameter.grad is not None
        assert not parameter.grad[~dead_F].any(), "the living take no part"
        assert bool(parameter.grad[dead_F].reshape(5, -1).any(-1).all()) or aux_k == 1
    assert sae.centre_D.grad is None or not sae.centre_D.grad.any(), "what all features share stays with the living"
    assert sae.score.exponent.grad is None
    assert sae.score.log_gain.grad is None


def test_aux_k_reaches_scores_below_zero() -> None:
    """Far below 0 the value is 0 (all of the residual is missed), the gradient still pulls along the residual."""
    sae, x_BD = make_sae("topk"), make_x()
    with torch.no_grad():
        sae.score.bias_F[5] = -100.0
    output = sae.train_forward(x_BD)
    dead_F = torch.arange(F) == 5
    residual_BD = (output.framed.z_BD - output.recon[-1]).detach()
    spread = (residual_BD - residual_BD.mean(0)).square().sum()
    found = losses.aux_k(sae, output, dead_F, LossConfig())
    torch.testing.assert_close(found.detach(), residual_BD.square().sum() / spread)
    (grad_F,) = torch.autograd.grad(found, sae.score.bias_F)
    wanted = -2 * (residual_BD @ sae.W_dec[5].detach()).sum() / spread
    torch.testing.assert_close(grad_F[5], wanted, rtol=1e-4, atol=1e-6)


def test_aux_k_is_absent_where_nothing_is_dead_or_it_is_off() -> None:
    sae = make_sae()
    output = sae.train_forward(make_x())
    dead_F = torch.ones(F, dtype=torch.bool)
    assert "aux_k" not in losses.terms_of(sae, output, LossConfig(), variance=1.0)
    assert "aux_k" not in losses.terms_of(sae, output, LossConfig(aux_coefficient=0.0), variance=1.0, dead_F=dead_F)
    assert "aux_k" in losses.terms_of(sae, output, LossConfig(), variance=1.0, dead_F=dead_F)


def test_sparsity_of_jumprelu_is_l0_over_k_and_its_gradient_the_kernel_estimate() -> None:
    sae, x_BD = make_sae("jumprelu"), make_x()
    score_BF = sae.scores(x_BD).detach()
    theta_F = sae.threshold.detach()
    output = sae.train_forward(x_BD)
    found = losses.sparsity(sae, output)
    assert float(found.detach()) == pytest.approx(float((score_BF > theta_F).sum()) / B / K)
    (grad_F,) = torch.autograd.grad(found, sae.selector.log_threshold_F, retain_graph=True)
    width = sae.cfg.bandwidth
    window_BF = (score_BF - theta_F).abs() < 0.5 * width * theta_F
    torch.testing.assert_close(grad_F, -window_BF.sum(0) / width / B / K)
    assert bool(grad_F.any())
    assert torch.autograd.grad(found, sae.score.rows_FD, retain_graph=True, allow_unused=True)[0] is None
    # ∂f/∂φ = −θ/width in the window, ∂f/∂s = 1 above θ
    value = output.selection.value_E.sum()
    (grad_F,) = torch.autograd.grad(value, sae.selector.log_threshold_F, retain_graph=True)
    torch.testing.assert_close(grad_F, -window_BF.sum(0) * theta_F / width)
    (grad_F,) = torch.autograd.grad(value, sae.score.bias_F)
    torch.testing.assert_close(grad_F, (score_BF > theta_F).sum(0).float())


def test_gated_terms() -> None:
    """Sparsity: open gates over k in value, scale-free in gradient. Gate: reconstructed from π, decoder left alone."""
    sae, x_BD = make_sae("gated"), make_x()
    output = sae.train_forward(x_BD)
    gate_BF = sae.scores(x_BD).relu()
    assert float(losses.sparsity(sae, output).detach()) == pytest.approx(float((gate_BF > 0).sum()) / B / K, rel=1e-5)
    terms = losses.terms_of(sae, output, LossConfig(), variance=2.0, sparsity_weight=0.7)
    wanted = (x_BD - sae.b_dec - gate_BF @ sae.W_dec).square().sum(-1).mean() / 2
    assert float(terms["gate"].detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert float(terms["sparsity"].detach()) == pytest.approx(0.7 * float((gate_BF > 0).sum()) / B / K, rel=1e-5)
    terms["gate"].backward()
    assert sae.decoder.rows_FD.grad is None
    assert sae.selector.b_mag_F.grad is None
    assert bool(sae.score.bias_F.grad.any())


def train_with_dead(score: str, selector: str, aux_coefficient: float) -> tuple[int, float]:
    """300 steps on a planted dictionary, half the features pushed far below every token's scores at the start.

    Returns how many of those fire at the end, and the mean reconstruction loss of the last 20 steps.
    """
    draw = torch.Generator().manual_seed(3)
    dictionary_FD = torch.randn(32, 16, generator=draw)
    dictionary_FD = dictionary_FD / dictionary_FD.norm(dim=-1, keepdim=True)

    def batch() -> Tensor:
        on_BF = torch.rand(128, 32, generator=draw) < 3 / 32
        return (on_BF * (1 + torch.rand(128, 32, generator=draw))) @ dictionary_FD + 0.01

    sample_ND = batch()
    arm = Arm.of("arm", score, selector, d_sae=32, k=4, seed=0, loss=LossConfig(aux_coefficient=aux_coefficient))
    sae = arm.build(16, sample_ND)
    with torch.no_grad():
        sae.score.bias_F[16:] -= 2.5
    assert not (sae.encode(sample_ND).feature_E >= 16).any()
    variance = float((sample_ND - sample_ND.mean(0)).square().sum(-1).mean())
    state = ArmState.start(arm, sae, variance, OptimizerConfig(lr=1e-2, warmup_steps=0))
    seen = [float(train_step(state, batch(), step, 1.0, 1024)["loss_reconstruction"]) for step in range(300)]
    fired_F = torch.zeros(32, dtype=torch.bool)
    fired_F[sae.encode(batch()).feature_E] = True
    return int(fired_F[16:].sum()), sum(seen[-20:]) / 20


@pytest.mark.parametrize(
    ("score", "selector"),
    [("inner", "batch_topk"), ("cosine", "batch_topk"), ("inner", "topk"), ("cosine", "jumprelu"), ("inner", "gated")],
)
def test_aux_k_revives_dead_features(score: str, selector: str) -> None:
    """With aux-k they fire again and the reconstruction gains; without, they stay where they are, or nearly all."""
    revived, error = train_with_dead(score, selector, 1 / 32)
    left, error_without = train_with_dead(score, selector, 0.0)
    assert left <= 2
    assert revived >= left + 4
    assert error < error_without


def test_values_that_are_not_allowed() -> None:
    for named, message in (
        ({"space": "unit"}, "space .*raw, frame.*Got 'unit'"),
        ({"normalise": "d"}, "variance, none. Got 'd'"),
        ({"aux_coefficient": -1.0}, "at least 0"),
        ({"aux_k": 0}, "aux_k must be at least 1"),
        ({"reweight": math.nan}, "reweight"),
        ({"aux_coefficient": math.nan}, "aux_coefficient"),
    ):
        with pytest.raises(CosaeError, match=message):
            LossConfig(**named)
