"""Many convex functions at once: each column's own minimum, and no work for columns that have arrived."""

from __future__ import annotations

import torch
from torch import Tensor

from cosae.evaluate.probing.lbfgs import minimise


def test_each_column_finds_its_own_minimum_however_its_curvature_differs() -> None:
    draw = torch.Generator().manual_seed(0)
    wanted = torch.randn(6, 4, generator=draw, dtype=torch.float64)
    bend = 10.0 ** torch.tensor([[-2.0, 0.0, 2.0, 3.0]]).double() * torch.linspace(1, 50, 6).double()[:, None]
    seen: list[int] = []

    def bowls(point: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(columns))
        away = point - wanted[:, columns]
        return (bend[:, columns] * away.square()).sum(0) / 2, bend[:, columns] * away

    found = minimise(bowls, 6, 4, 1e-9, 200)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert seen[0] == 4
    assert min(seen) < 4


def test_a_column_that_is_there_already_stays_and_steps_too_long_are_halved() -> None:
    def steep(point: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        shift = torch.tensor([0.0, 3.0]).double()[columns]
        away = point - shift
        return away.pow(4).sum(0), 4 * away.pow(3)

    found = minimise(steep, 1, 2, 1e-8, 200)
    assert found[0, 0] == 0.0
    torch.testing.assert_close(found[0, 1], torch.tensor(3.0).double(), atol=2e-2, rtol=0)
