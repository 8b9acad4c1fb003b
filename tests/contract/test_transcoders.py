"""The contract for transcoders: every score × selector × decoder × frame, with targets of another width."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cosae import load, save
from cosae.errors import CosaeError
from cosae.sae import loss as losses
from cosae.sae.calibrate import calibrate, measure_fve, measure_l0
from cosae.sae.fold import fold_decoder_norm, fold_input_scale
from cosae.sae.model import SAE
from cosae.train.arm import Arm
from cosae.train.step import ArmState, Batch, OptimizerConfig, train_step
from tests.support import by_hand
from tests.support.combinations import D_IN, D_SAE, DECODERS, MASKED, Combination, K, every_combination, make_x

D_OUT = 7
LIVE = [row for row in range(24) if row not in MASKED]


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def make_y(x_BD: Tensor, seed: int = 0) -> Tensor:
    """(B, D_OUT) a rectified map of x, off the origin."""
    draw = torch.Generator().manual_seed(seed)
    return 3 * (x_BD @ torch.randn(D_IN, D_OUT, generator=draw)).relu() + torch.randn(D_OUT, generator=draw)


@torch.no_grad()
def make(c: Combination, target_frame: str = "raw", skip: bool = False, kernel: str = "auto") -> SAE:
    """A transcoder of this kind, fitted to a sample, its parameters then moved off their special values."""
    prefixes, norm_restoring = DECODERS[c.decoder]
    sample = make_x(seed=9, tokens=300)
    sae = SAE.build(
        D_IN, D_SAE, c.score, c.selector, K, 0, c.frame, d_out=D_OUT, target_frame=target_frame, skip=skip,
        prefixes=prefixes, norm_restoring=norm_restoring, kernel=kernel, sample=sample, target=make_y(sample),
    )  # fmt: skip
    draw = torch.Generator().manual_seed(3)
    for parameter in sae.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return sae


def kinds(c: Combination) -> tuple[tuple[str, bool], ...]:
    """Frames of the target and skips that are tried: a target's frame says something in these frames alone."""
    return (("raw", True),) if c.frame == "raw" else (("raw", False), ("input", True))


@every_combination
def test_codes_and_targets_by_hand(combination: Combination) -> None:
    """Codes are an SAE's; what is decoded is m s (Σ f d + W z) + c, in numpy float64."""
    x_BD = make_x()
    for target_frame, skip in kinds(combination):
        sae = make(combination, target_frame, skip)
        calibrate(sae, make_x(seed=9, tokens=300))
        own = by_hand.read(sae)
        dense, z, scale, _ = by_hand.encode(sae, x_BD.double().numpy(), training=False)
        codes = sae.encode(x_BD)
        np.testing.assert_allclose(codes.to_dense().detach(), dense, rtol=2e-4, atol=1e-4)
        sums = by_hand.reconstruct(sae, dense, z)[-1]
        live = (x_BD != 0).any(1).double().numpy()[:, None]
        sums = sums + live * (z @ own["target.skip_OD"].T) if skip else sums
        scale = scale if target_frame == "input" else np.ones(len(scale))
        wanted = own["target.size"] * scale[:, None] * sums + own["target.centre_O"]
        got = sae.decode(codes).detach()
        assert got.shape == (24, D_OUT)
        np.testing.assert_allclose(got[LIVE], wanted[LIVE], rtol=1e-3, atol=1e-3 * np.abs(wanted).max())
        assert torch.equal(sae(x_BD), sae.decode(codes))


def gradients(sae: SAE, x_BD: Tensor, y_BD: Tensor) -> tuple[dict[str, Tensor | None], Tensor]:
    output = sae.train_forward(x_BD, y_BD=y_BD)
    config = losses.LossConfig(reweight=1.0, aux_k=3)
    dead_F = torch.arange(D_SAE) % 5 == 2
    terms = losses.terms_of(sae, output, config, variance=7.0, dead_F=dead_F, sparsity_weight=0.3)
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    return {name: p.grad for name, p in sae.named_parameters()}, loss


@every_combination
def test_gradients_against_dense_float64(combination: Combination) -> None:
    x_BD = make_x()
    y_BD = make_y(x_BD)
    for target_frame, skip in kinds(combination):
        found, loss = gradients(make(combination, target_frame, skip), x_BD, y_BD)
        definition = make(combination, target_frame, skip, "reference").double()
        wanted, slow = gradients(definition, x_BD.double(), y_BD.double())
        assert float(((loss - slow) / slow).detach().abs()) < 1e-4
        rows = wanted["score.rows_FD"]
        for name, truth in wanted.items():
            assert truth is not None, name
            assert found[name] is not None, name
            if combination.frame == "unit" and "exponent" in name:  # r = 1, ln r = 0: they have no effect
                continue
            size = truth.norm()
            if truth.ndim == 0:  # a sum that may cancel, as where r = 1 or a length is restored
                size = size.clamp_min(0.05 * float(rows.norm()))
            assert float((found[name].double() - truth).norm() / size) < 1e-4, (name, target_frame)
        assert float(wanted["target.centre_O"].norm()) > 0
        assert not skip or float(wanted["target.skip_OD"].norm()) > 0


@every_combination
def test_save_and_load_are_the_identity(combination: Combination, tmp_path: Path) -> None:
    x_BD = make_x()
    for target_frame, skip in kinds(combination):
        sae = make(combination, target_frame, skip)
        back = load(save(sae, tmp_path / "sae"))
        assert back.cfg == sae.cfg
        kept = back.state_dict()
        assert all(torch.equal(value, kept[name]) or value.isnan() for name, value in sae.state_dict().items())
        assert torch.equal(back(x_BD), sae(x_BD))


@every_combination
def test_folds_leave_outputs(combination: Combination) -> None:
    x_BD = make_x()
    for target_frame, skip in kinds(combination):
        sae = make(combination, target_frame, skip)
        calibrate(sae, make_x(seed=9, tokens=300))
        for folded, scale in ((fold_decoder_norm(sae), 1.0), (fold_input_scale(sae, 3.7), 3.7)):
            torch.testing.assert_close(folded(x_BD / scale)[LIVE], sae(x_BD)[LIVE], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("selector", ["batch_topk", "jumprelu", "gated", "topk"])
@pytest.mark.parametrize("skip", [False, True])
def test_training_explains_the_target(selector: str, skip: bool) -> None:
    """A few hundred steps, the same on both paths; calibrated to its k; a skip begins at 0 and learns."""
    x_ND = make_x(seed=5, tokens=1500)
    y_ND = make_y(x_ND)
    fves = []
    for kernel in ("auto", "reference"):
        arm = Arm.of("one", "cosine", selector, d_sae=64, k=6, seed=0, kernel=kernel, skip=skip, lr=3e-3)
        state = ArmState.start(arm, arm.build(D_IN, x_ND, "cpu", D_OUT, y_ND), 300.0, OptimizerConfig(warmup_steps=0))
        assert state.sae.target is not None
        before = state.sae.target.centre_O.detach().clone()
        for step in range(120 if kernel == "auto" else 20):
            rows = torch.arange(step * 128, step * 128 + 128) % 1500
            numbers = train_step(state, Batch.of(x_ND[rows], y_BD=y_ND[rows]), step, 1.0, 20_000)
            if step == 19:
                fves.append(float(numbers["fve"]))
        assert not torch.equal(before, state.sae.target.centre_O)
        if kernel == "auto":
            calibrate(state.sae, x_ND)
            assert abs(measure_l0(state.sae, x_ND) - 6) < 0.1
            assert (measure_fve(state.sae, x_ND, 1500, y_ND) or 0) > 0.5
            assert state.sae.target.skip_OD is None or float(state.sae.target.skip_OD.detach().abs().max()) > 0
    assert fves[0] == pytest.approx(fves[1], abs=1e-4)


def test_what_only_a_transcoder_has_is_refused_elsewhere() -> None:
    with pytest.raises(CosaeError, match=r"linear skip is for a transcoder.*--target"):
        Arm.of("one", d_sae=8, k=2, seed=0, skip=True).build(4, None)
    sae = make(Combination("raw", "inner", "topk", "plain"))
    x_BD = make_x()
    with pytest.raises(CosaeError, match="learns from targets"):
        sae.train_forward(x_BD)
    plain = SAE.build(D_IN, D_SAE, k=K)
    with pytest.raises(CosaeError, match="learns from targets"):
        plain.train_forward(x_BD, y_BD=make_y(x_BD))
    skipping = make(Combination("raw", "inner", "topk", "plain"), skip=True)
    with pytest.raises(CosaeError, match=r"linear skip .* norm_stats=codes.norm_stats"):
        skipping.decode(skipping.encode(x_BD).to_dense())
    with pytest.raises(CosaeError, match="needs its targets"):
        SAE.build(D_IN, D_SAE, k=K, d_out=D_OUT, sample=x_BD)
    assert "d_out" not in replace(plain.cfg).to_dict()
