"""Gradient shares against dense autograd, token by token, and against worlds whose shares are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cosae
from cosae.errors import CosaeError
from cosae.evaluate import gradients
from cosae.evaluate.encoded import norm_quartiles
from cosae.evaluate.gradients import SELECTIONS, measure_gradients

D, F, K = 8, 24, 3


def tokens(n: int = 64, seed: int = 0, sigma: float = 0.6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    direction_ND = torch.nn.functional.normalize(torch.randn(n, D, generator=generator), dim=-1)
    return direction_ND * (sigma * torch.randn(n, 1, generator=generator)).exp()


def build(score: str = "inner", selector: str = "batch_topk", **options: Any) -> cosae.SAE:
    sae = cosae.SAE.build(
        d_in=D, d_sae=F, score=score, selector=selector, k=K, seed=1, sample=tokens(400, 9), **options
    )
    with torch.no_grad():
        if sae.score.family.exponent_owner != "fixed":
            sae.score.set_exponent(0.4)
        sae.score.rows_FD.mul_(torch.rand(F, 1, generator=torch.Generator().manual_seed(4)) + 0.5)
    return sae


def dense_loss(sae: cosae.SAE, x_BD: torch.Tensor, rows_FD: torch.Tensor, per_token: bool) -> torch.Tensor:
    """(B,) squared errors from the dense definition, written out."""
    z_BD = x_BD - sae.centre_D.detach()
    r_B1 = z_BD.norm(dim=-1, keepdim=True)
    if sae.cfg.score == "inner":
        score_BF = z_BD @ rows_FD.T
    else:
        kappa_BF = (z_BD / r_B1) @ (rows_FD / rows_FD.norm(dim=-1, keepdim=True)).T
        score_BF = sae.scale_b.detach().exp() * r_B1 ** sae.scale_a.detach() * kappa_BF
    score_BF = score_BF + sae.score.bias_F.detach()
    kept = score_BF.detach().relu()
    cut = kept.topk(K, dim=-1).values[:, -1:] if per_token else kept.flatten().topk(K * len(x_BD)).values[-1]
    code_BF = score_BF * ((kept >= cut) & (kept > 0))
    return (z_BD - code_BF @ sae.decoder.rows_FD.detach()).square().sum(-1)


@pytest.mark.parametrize("score", ["inner", "cosine", "cosine_per_feature", "inner_unit"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_shares_are_those_of_dense_autograd(score: str, selection: str) -> None:
    sae, x_BD = build(score), tokens()
    found = measure_gradients(sae, x_BD, batch_tokens=64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    x_BD = x_BD[order]
    quartile_B = norm_quartiles(x_BD.double().norm(dim=-1), torch.ones(64, dtype=torch.bool))[0]
    rows_FD = sae.score.rows_FD.detach().clone().requires_grad_()

    def losses(inside_B: torch.Tensor) -> torch.Tensor:
        if selection == "quartile_alone":
            return dense_loss(sae, x_BD[inside_B], rows_FD, False)
        return dense_loss(sae, x_BD, rows_FD, selection == "per_token")[inside_B]

    whole, each, rows = [], [], []
    for q in range(4):
        inside_B = quartile_B == q
        (gradient_FD,) = torch.autograd.grad(losses(inside_B).sum() / 64, rows_FD)
        whole.append(float(gradient_FD.norm()))
        rows.append(gradient_FD.norm(dim=-1))
        per_token = [
            float(torch.autograd.grad(losses(inside_B)[t], rows_FD)[0].norm()) for t in range(int(inside_B.sum()))
        ]
        each.append(sum(per_token))
    got = found["selections"][selection]
    assert got["share"] == pytest.approx([n / sum(whole) for n in whole], rel=1e-4)
    assert got["token_share"] == pytest.approx([n / sum(each) for n in each], rel=1e-4)
    active = torch.maximum(rows[0], rows[3]) > 1e-10
    assert got["features"] == int(active.sum())
    ratio = rows[3][active] / rows[0][active]
    middle = float(ratio.median())
    assert got["feature_ratio"] == (None if middle == float("inf") else pytest.approx(middle, rel=1e-3))


def test_the_parts_add_up_to_the_whole_gradient_only_with_the_competition_kept() -> None:
    sae, x_BD = build("inner"), tokens()
    output = sae.train_forward(x_BD)
    quartile_B = norm_quartiles(x_BD.double().norm(dim=-1), torch.ones(64, dtype=torch.bool))[0]
    loss_B = (output.framed.z_BD - output.recon[0]).square().sum(-1)
    (whole,) = torch.autograd.grad(loss_B.sum(), sae.score.rows_FD)
    alone = torch.zeros_like(whole)
    for q in range(4):
        part = sae.train_forward(x_BD[quartile_B == q])
        error = (part.framed.z_BD - part.recon[0]).square().sum()
        alone += torch.autograd.grad(error, sae.score.rows_FD)[0]
    assert (alone - whole).norm() > 0.1 * whole.norm()
    found = measure_gradients(sae, x_BD, batch_tokens=64)["selections"]
    assert found["batch"]["l0"] != pytest.approx([K] * 4, abs=0.2)
    assert found["batch"]["l0"][3] > 2 * found["batch"]["l0"][0]  # long tokens take the short ones' entries
    assert found["quartile_alone"]["l0"] == pytest.approx([K] * 4)
    assert max(found["per_token"]["l0"]) <= K


def test_an_inner_product_without_competition_teaches_with_the_square_of_the_norm() -> None:
    """Tokens of one direction set at two lengths: scores, errors and gradients all scale with the length."""
    direction_ND = torch.nn.functional.normalize(
        torch.randn(128, D, generator=torch.Generator().manual_seed(2)), dim=-1
    )
    length_41 = torch.tensor([1.0, 1.28, 1.6, 2.0])
    x_ND = (length_41[:, None, None] * direction_ND).reshape(-1, D)
    sae = cosae.SAE.build(d_in=D, d_sae=F, score="inner", selector="topk", k=K, seed=1, bias=False)
    with torch.no_grad():
        sae.centre_D.zero_()
    found = measure_gradients(sae, x_ND, batch_tokens=512)
    assert found["quartile_norms"] == pytest.approx(length_41.tolist(), rel=1e-5)
    assert found["norm_ratio_squared"] == pytest.approx(4.0, rel=1e-5)
    square = length_41.square() / length_41.square().sum()
    for name in SELECTIONS:
        assert found["selections"][name]["share"] == pytest.approx(square.tolist(), rel=1e-4)
        assert found["selections"][name]["token_share"] == pytest.approx(square.tolist(), rel=1e-4)
        assert found["selections"][name]["feature_ratio"] == pytest.approx(4.0, rel=1e-4)


@pytest.mark.parametrize("selector", ["topk", "abs_topk", "jumprelu"])
@pytest.mark.parametrize("frame", ["raw", "unit", "layer_norm"])
def test_every_selector_and_frame_but_the_gated(selector: str, frame: str) -> None:
    sae = build("cosine", selector, frame=frame)
    found = measure_gradients(sae, tokens(200), batch_tokens=50)
    assert found["batches"] == 4
    for numbers in found["selections"].values():
        assert sum(numbers["share"]) == pytest.approx(1)
        assert sum(numbers["loss_share"]) == pytest.approx(1)


def test_it_changes_no_sae_chunks_change_nothing_and_frozen_saes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = build("cosine", prefixes=(8, 16)).requires_grad_(False)
    before = {name: value.numpy().tobytes() for name, value in sae.state_dict().items()}
    with torch.no_grad():
        one = measure_gradients(sae, tokens(100), batch_tokens=50)
    monkeypatch.setattr(gradients, "CHUNK_NUMBERS", 100)
    assert measure_gradients(sae, tokens(100), batch_tokens=50) == one
    assert {name: value.numpy().tobytes() for name, value in sae.state_dict().items()} == before
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in sae.parameters())


def test_padding_is_left_out_and_refusals() -> None:
    sae = build()
    padded = torch.cat([tokens(64), torch.zeros(30, D)])
    assert measure_gradients(sae, padded, batch_tokens=64)["tokens"] == 64
    with pytest.raises(CosaeError, match="gated"):
        measure_gradients(build(selector="gated"), tokens())
    with pytest.raises(CosaeError, match="at least 8 tokens"):
        measure_gradients(sae, tokens(7))
    with pytest.raises(CosaeError, match=r"shape \(\.\.\., 8\)"):
        measure_gradients(sae, torch.randn(20, 9))
