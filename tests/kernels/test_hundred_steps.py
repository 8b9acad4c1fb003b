"""A hundred training steps of the sparse path and of the definition, from one start, stay together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cosae.kernels import Kernel, ScoreTerms, choose
from cosae.kernels.select import search
from cosae.train.optimizer import UnitRowAdam

WIDTH, N_FEATURES, N_TOKENS, K = 24, 96, 128, 4


def batch(step: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1000 + step)
    directions = nn.functional.normalize(torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1)), dim=-1)
    code = torch.relu(torch.randn(N_TOKENS, 64, generator=draw) - 1.5)
    return code @ directions * torch.exp(0.3 * torch.randn(N_TOKENS, 1, generator=draw))


def train(kernel: Kernel, per_feature: bool) -> float:
    """Mean loss of the last ten of a hundred steps."""
    draw = torch.Generator().manual_seed(0)
    rows = nn.functional.normalize(torch.randn(N_FEATURES, WIDTH, generator=draw), dim=-1)
    shape = (N_FEATURES,) if per_feature else ()
    p = {
        "rows": nn.Parameter(rows.clone()),
        "decoder": nn.Parameter(rows.clone()),
        "bias": nn.Parameter(torch.zeros(N_FEATURES)),
        "centre": nn.Parameter(torch.zeros(WIDTH)),
        "exponent": nn.Parameter(torch.zeros(shape)),
        "log_gain": nn.Parameter(torch.full(shape, 0.5)),
    }
    optimizer = UnitRowAdam(p, ("decoder",), lr=3e-3)
    live_B, hint, losses = torch.ones(N_TOKENS, dtype=torch.bool), None, []
    for step in range(100):
        z_BD = batch(step) - p["centre"]
        terms = ScoreTerms(z_BD, p["rows"], p["bias"], p["exponent"], p["log_gain"], 0, live_B, centre_only=True)
        entries, hint = kernel.select_batch_topk(terms, K * N_TOKENS, hint)
        value_E = kernel.entry_content(terms, entries) + kernel.at_feature(p["bias"], entries)
        loss = (z_BD - kernel.decode(value_E, entries, p["decoder"], N_TOKENS)).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    return sum(losses[-10:]) / 10


@pytest.mark.parametrize("per_feature", [False, True])
def test_paths_stay_together(per_feature: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "DENSE_SHARE", 1)
    fast, slow = (train(choose(name, "cpu"), per_feature) for name in ("auto", "reference"))
    assert fast == pytest.approx(slow, rel=1e-4)
