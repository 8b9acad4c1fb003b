"""Sums and products whose bits do not depend on the number of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cosae.kernels.deterministic import FEW, matmul, total
from tests.support.threads import with_threads


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alike(call: Callable[[], Tensor]) -> Tensor:
    """What the call answers with 1, 2 and 3 threads, which must be one answer."""
    first, *others = [with_threads(n, call) for n in (1, 2, 3)]
    assert all(torch.equal(first, other) for other in others)
    return first


@pytest.mark.parametrize("shape", [(0,), (7,), (FEW - 1,), (FEW,), (FEW + 5,), (300, 501), (40, 1024, 3)])
def test_a_total_is_the_sum_by_any_number_of_threads(shape: tuple[int, ...]) -> None:
    x = draw(*shape)
    torch.testing.assert_close(alike(lambda: total(x)).double(), x.double().sum(), rtol=1e-5, atol=1e-3)


def test_small_totals_are_torchs_own_to_the_bit() -> None:
    x = draw(FEW - 1)
    assert torch.equal(total(x), x.sum())


def test_the_gradient_of_a_total_is_one_everywhere() -> None:
    x = draw(3, FEW).requires_grad_()
    total(x).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(("n", "k", "m"), [(1500, 1000, 100), (256, 3, 5), (1, 700, 64), (0, 4, 3), (257, 64, 1)])
def test_a_product_is_torchs_by_any_number_of_threads_with_its_gradients(n: int, k: int, m: int) -> None:
    a, b, up = draw(n, k), draw(k, m, seed=1), draw(n, m, seed=2)

    def both() -> Tensor:
        left, right = a.clone().requires_grad_(), b.clone().requires_grad_()
        out = matmul(left, right)
        grads = torch.autograd.grad(out, (left, right), up)
        return torch.cat([part.detach().flatten() for part in (out, *grads)])

    a64, b64, up64 = a.double(), b.double(), up.double()
    wanted = torch.cat([part.flatten() for part in (a64 @ b64, up64 @ b64.T, a64.T @ up64)])
    torch.testing.assert_close(alike(both).double(), wanted, rtol=1e-4, atol=1e-3)


def test_a_product_asks_for_no_gradient_that_nobody_wants() -> None:
    a, b = draw(300, 8), draw(8, 5, seed=1).requires_grad_()
    matmul(a, b).sum().backward()
    assert a.grad is None
    assert b.grad is not None
    torch.testing.assert_close(b.grad, a.T @ torch.ones(300, 5))
