"""Whole training steps of the Triton path and of the definition, from one start, stay together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cosae.errors import CosaeError
from cosae.kernels import Kernel, describe
from cosae.kernels.select import search
from cosae.sae.file import load, save
from cosae.sae.model import SAE
from cosae.train.arm import Arm
from cosae.train.step import ArmState, OptimizerConfig, train_step


def train(kernel: str, device: torch.device, score: str, selector: str, steps: int) -> list[float]:
    """Losses, aux-k on a dead feature and a masked token included."""
    draw = torch.Generator().manual_seed(3)
    x_BD = torch.randn(4, 14, 9, generator=draw) * torch.exp(0.5 * torch.randn(4, 14, 1, generator=draw))
    x_BD[0, 5] = 0.0
    sae = SAE.build(9, 12, score=score, selector=selector, k=2, seed=0, sample=x_BD[1], device=device)
    sae.kernel = kernel
    # a large eps: Adam's first steps otherwise turn a gradient's rounding into its sign
    config = OptimizerConfig(lr=3e-3, warmup_steps=2, eps=1e-3)
    state = ArmState.start(Arm.of("a", score, selector=selector, k=2, seed=0), sae, 5.0, config)
    state.age_F[4] = 10**6
    losses = []
    for step in range(steps):
        losses.append(float(train_step(state, x_BD[step % 4].to(device), step, 1.0, 60)["loss"]))
    return losses


@pytest.mark.parametrize(
    ("score", "selector"),
    [("cosine_per_feature", "batch_topk"), ("inner", "jumprelu"), ("cosine", "gated"), ("inner", "abs_topk")],
)
@pytest.mark.parametrize("steps", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_steps_stay_together(
    steps: int, score: str, selector: str, device: torch.device, triton_path: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "DENSE_SHARE", 1)
    fast, slow = (train(kernel, device, score, selector, steps) for kernel in ("triton", "reference"))
    assert fast == pytest.approx(slow, rel=1e-4)


def test_the_record_says_so(device: torch.device, triton_path: Kernel) -> None:
    assert describe("triton", device).startswith("triton: ")


def test_a_saved_sae_is_checked_on_the_cpu_and_then_asks_for_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = SAE.build(9, 12, k=2, sample=torch.randn(50, 9, generator=torch.Generator().manual_seed(0)))
    save(sae, tmp_path / "sae")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    loaded = load(tmp_path / "sae", kernel="triton")
    assert loaded.kernel == "triton"
    with pytest.raises(CosaeError, match="not on a CUDA device"):
        loaded.encode(torch.ones(1, 9))
