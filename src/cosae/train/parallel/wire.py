"""One axis of the mesh: sums and gathers over its processes, counted in bytes, with a gradient where one is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Wire:
    """The processes along one axis.

    n, place  how many, and which this one is
    sent      bytes handed to collectives so far; a ring sends each of them 2 (n − 1) / n times
    """

    def __init__(self, group: Any, n: int, place: int, guard: Callable[[], Any]) -> None:
        self.group, self.n, self.place, self.guard, self.sent = group, n, place, guard, 0

    def sum_(self, x: Tensor) -> Tensor:
        """Σ over the processes, in place."""
        if self.n > 1:
            self.sent += x.nbytes
            with self.guard():
                dist.all_reduce(x, group=self.group)
        return x

    def sum(self, x: Tensor, back: bool = False) -> Tensor:
        """Σ over the processes; the gradient is each one's own, with `back` summed too."""
        if self.n == 1:
            return x
        return (
            _summed(x, self, back)
            if x.requires_grad
            else self.sum_(x.detach().clone(memory_format=torch.contiguous_format))
        )

    def gather(self, x: Tensor) -> list[Tensor]:
        """x of each process, all of one shape, in their order."""
        if self.n == 1:
            return [x]
        self.sent += x.nbytes
        parts = [torch.empty_like(x) for _ in range(self.n)]
        with self.guard():
            dist.all_gather(parts, x.contiguous(), group=self.group)
        return parts


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire, back: bool) -> Tensor:
        ctx.wire, ctx.back = wire, back
        return wire.sum_(x.detach().clone(memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        return (ctx.wire.sum_(grad.clone(memory_format=torch.contiguous_format)) if ctx.back else grad), None, None


_summed: Any = _Summed.apply
