"""Special members of the score family, against formulas written in numpy float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cosae import SAE
from cosae.sae.score import SCORES

D, F, B = 10, 21, 40


def make_x() -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(B, D, generator=draw) * torch.exp(torch.randn(B, 1, generator=draw))


@torch.no_grad()
def make_sae(score: str, kernel: str = "auto", **named: object) -> SAE:
    sae = SAE.build(D, F, score, "topk", 5, 3, kernel=kernel, **named)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(6)
    sae.centre_D.copy_(torch.randn(D, generator=draw))
    sae.score.rows_FD.copy_(torch.randn(F, D, generator=draw) * torch.exp(torch.randn(F, 1, generator=draw)))
    if sae.score.bias_F is not None:
        sae.score.bias_F.copy_(torch.randn(F, generator=draw))
    return sae


def parts(sae: SAE, x_BD: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """⟨w, z⟩ (B, F), r (B, 1), |w| (F,) and β (F,) in float64."""
    z = x_BD.double().numpy() - sae.b_dec.detach().double().numpy()
    w = sae.W_enc.detach().double().numpy().T
    bias = np.zeros(F) if sae.b_enc is None else sae.b_enc.detach().double().numpy()
    return z @ w.T, np.sqrt((z**2).sum(1, keepdims=True)), np.sqrt((w**2).sum(1)), bias


def check(sae: SAE, wanted: np.ndarray, x_BD: Tensor) -> None:
    np.testing.assert_allclose(sae.scores(x_BD).detach().numpy(), wanted, rtol=2e-5, atol=2e-5)
    codes = sae.encode(x_BD)
    found = codes.value_E.detach().numpy()
    np.testing.assert_allclose(found, wanted[codes.token_E, codes.feature_E], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_inner_is_the_standard_encoder(bias: bool) -> None:
    sae, x_BD = make_sae("inner", bias=bias), make_x()
    dot, _, _, beta = parts(sae, x_BD)
    assert (sae.b_enc is not None) == bias
    check(sae, dot + beta, x_BD)


def test_inner_unit_divides_by_the_row() -> None:
    sae, x_BD = make_sae("inner_unit"), make_x()
    dot, _, length, beta = parts(sae, x_BD)
    check(sae, dot / length + beta, x_BD)


@pytest.mark.parametrize("score", ["cosine", "cosine_per_feature", "cosine_base_delta", "cosine_grouped"])
def test_a_1_b_0_is_inner_unit(score: str) -> None:
    sae, x_BD = make_sae(score, a_init=1.0, b_init=0.0), make_x()
    dot, _, length, beta = parts(sae, x_BD)
    check(sae, dot / length + beta, x_BD)
    other = make_sae("inner_unit")
    assert torch.equal(sae.encode(x_BD).feature_E, other.encode(x_BD).feature_E)


@pytest.mark.parametrize("score", ["cosine_per_feature", "cosine_base_delta"])
def test_per_feature_contains_the_standard_score(score: str) -> None:
    """a_i = 1, b_i = ln |w_i|."""
    sae, x_BD = make_sae(score, a_init=1.0), make_x()
    with torch.no_grad():
        sae.score.log_gain.copy_(sae.score.rows_FD.norm(dim=-1).log())
    dot, _, _, beta = parts(sae, x_BD)
    check(sae, dot + beta, x_BD)
    assert torch.equal(sae.encode(x_BD).feature_E, make_sae("inner").encode(x_BD).feature_E)


@pytest.mark.parametrize(
    "score", ["cosine_fixed", "cosine", "cosine_per_feature", "cosine_base_delta", "cosine_grouped"]
)
def test_a_0_is_the_scaled_cosine(score: str) -> None:
    sae, x_BD = make_sae(score, b_init=0.7), make_x()
    dot, r, length, beta = parts(sae, x_BD)
    check(sae, math.exp(0.7) * dot / (r * length) + beta, x_BD)


def test_default_start_is_half_log_d() -> None:
    for score, family in SCORES.items():
        sae = SAE.build(D, F, score, k=3, value_exponent_init=0.0)
        learned = family.gain_owner != "fixed"
        assert bool((sae.scale_b == torch.tensor(0.5 * math.log(D) if learned else 0.0)).all())
        assert bool((sae.scale_a == (1.0 if score.startswith("inner") else 0.0)).all())


def test_groups_are_contiguous_and_the_last_takes_the_remainder() -> None:
    sae = SAE.build(D, 11, "cosine_grouped", k=2, n_groups=4)
    with torch.no_grad():
        sae.score.exponent.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    a = sae.scale_a.tolist()
    assert a == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4])


def test_who_owns_the_exponent() -> None:
    shapes = {name: tuple(SAE.build(D, F, name, k=3).scale_a.shape) for name in SCORES}
    assert shapes == {
        "inner": (), "inner_unit": (), "cosine_fixed": (), "cosine": (), "cosine_per_feature": (F,),
        "cosine_base_delta": (F,), "cosine_grouped": (F,), "cosine_two_exponents": (),
    }  # fmt: skip
    learned = {
        name: sorted(
            n for n, _ in SAE.build(D, F, name, k=3).score.named_parameters() if n not in ("rows_FD", "bias_F")
        )
        for name in SCORES
    }
    assert learned == {
        "inner": [], "inner_unit": [], "cosine_fixed": ["log_gain"], "cosine": ["exponent", "log_gain"],
        "cosine_per_feature": ["exponent", "log_gain"], "cosine_grouped": ["exponent", "log_gain"],
        "cosine_base_delta": ["exponent_base", "exponent_delta_F", "log_gain"],
        "cosine_two_exponents": ["exponent", "log_gain", "value_exponent"],
    }  # fmt: skip


@pytest.mark.parametrize("score", [s for s in SCORES if s != "inner"])
def test_row_length_is_part_of_the_formula(score: str) -> None:
    """Rows times a power of two: the same scores to the bit, and a gradient without a radial part."""
    x_BD = make_x()
    sae = make_sae(score, kernel="reference")
    once = sae.scores(x_BD)
    once.square().sum().backward()
    grad_FD, rows_FD = sae.score.rows_FD.grad, sae.score.rows_FD.detach()
    assert grad_FD is not None
    assert float(((grad_FD * rows_FD).sum(-1) / (grad_FD.norm(dim=-1) * rows_FD.norm(dim=-1))).abs().max()) < 1e-4
    with torch.no_grad():
        sae.score.rows_FD.mul_(4.0)
    assert torch.equal(sae.scores(x_BD), once)


def test_tiny_and_zero_lengths_stay_finite() -> None:
    """x = c, a zero row, lengths below the clamps: no NaN anywhere, forward or backward."""
    for score in SCORES:
        sae = make_sae(score)
        with torch.no_grad():
            sae.score.rows_FD[0] = 0.0
            sae.score.rows_FD[1] *= 1e-20
        x_BD = make_x()
        x_BD[0] = sae.centre_D.detach()
        x_BD[1] = sae.centre_D.detach() * (1 + 1e-7)
        assert bool(sae.scores(x_BD).isfinite().all())
        output = sae.train_forward(x_BD)
        output.recon[0].square().sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in sae.parameters() if p.grad is not None)
