"""Sums and dense products whose bits do not depend on the number of threads.

torch splits the sum of a whole tensor, and MKL some products, between its threads: another number of them rounds
otherwise. Here what is summed together depends on the shape alone. Off the CPU these are torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cosae.kernels.cpu import native

FEW = 1 << 15
"""torch sums fewer numbers on one thread."""
RUN = 1 << 10
"""Numbers that are summed together where there are more."""
ROWS = 256
"""Rows of a product that one thread computes at a time."""


def total(x: Tensor) -> Tensor:
    """() the sum of all numbers of x; differentiable. Below FEW numbers it is x.sum()."""
    x = x.reshape(-1)
    while x.device.type == "cpu" and x.numel() >= FEW:
        whole = x.numel() // RUN * RUN
        x = torch.cat([x[:whole].view(-1, RUN).sum(1), x[whole:].sum()[None]])
    return x.sum()


def matmul(a_NK: Tensor, b_KM: Tensor) -> Tensor:
    """(N, M) product of two matrices of one dtype; differentiable once."""
    return _product(a_NK, b_KM) if a_NK.device.type == "cpu" else a_NK @ b_KM


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_NK: Tensor, b_KM: Tensor) -> Tensor:
        ctx.save_for_backward(a_NK, b_KM)
        return _by_rows(a_NK, b_KM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a_NK, b_KM = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        return _by_rows(grads[0], b_KM.T) if need_a else None, _by_rows(a_NK.T, grads[0]) if need_b else None


_product: Any = _Product.apply


def _by_rows(a_NK: Tensor, b_KM: Tensor) -> Tensor:
    """The product, ROWS rows at a time, each by one thread of torch's."""
    out_NM = a_NK.new_empty(len(a_NK), b_KM.shape[1])

    @torch.no_grad()  # a thread's own state
    def multiply(part: int, n_parts: int) -> None:
        rows = slice(part * ROWS, (part + 1) * ROWS)
        torch.mm(a_NK[rows], b_KM, out=out_NM[rows])

    native.run_single(multiply, -(-len(a_NK) // ROWS))
    return out_NM
