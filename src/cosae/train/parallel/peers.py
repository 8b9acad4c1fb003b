"""What a step asks of the other processes (`cosae.kernels.peers`), by collectives along two axes of the mesh."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from cosae.kernels.peers import Peers
from cosae.train.parallel.wire import Wire

BUCKET = 1 << 16
"""Gradients of fewer numbers travel together."""


class MeshPeers(Peers):
    """The processes that share this one's arms: those along `data` have other tokens, those along `feature` others of
    the features."""

    def __init__(self, data: Wire, feature: Wire, device: torch.device) -> None:
        self.data, self.feature, self.device = data, feature, device
        self.token_rank, self.token_ranks = data.place, data.n
        self.feature_rank, self.feature_ranks = feature.place, feature.n

    def rows(self, n_rows: int) -> slice:
        ends = [n_rows * place // self.token_ranks for place in (self.token_rank, self.token_rank + 1)]
        return slice(*ends)

    def tokens(self, x: Tensor) -> Tensor:
        return self.data.sum(x)

    def features(self, x: Tensor) -> Tensor:
        return self.feature.sum(x)

    def both(self, x: Tensor) -> Tensor:
        return self.feature.sum(self.data.sum(x))

    def both_and_back(self, x: Tensor) -> Tensor:
        return self.feature.sum(self.data.sum(x, back=True), back=True)

    def counts(self, *numbers: int) -> tuple[int, ...]:
        return tuple(self.bins(torch.tensor(numbers, device=self.device)).tolist())

    def bins(self, count: Tensor) -> Tensor:
        return self.feature.sum_(self.data.sum_(count))

    def beside(self, x_BK: Tensor) -> Tensor:
        return torch.cat(self.feature.gather(x_BK), dim=1)

    def whole(self, x: Tensor) -> Tensor:
        return torch.cat(self.feature.gather(x)) if x.dim() else x

    def reduce_gradients(self, parameters: Mapping[str, nn.Parameter], split: Collection[str]) -> None:
        flags = [int(p.grad is not None) for p in parameters.values()]
        there = self.bins(torch.tensor(flags, device=self.device)).tolist()
        for axes, names in (
            ((self.data,), [name for name in parameters if name in split]),
            ((self.data, self.feature), [name for name in parameters if name not in split]),
        ):
            known = dict(zip(parameters, there, strict=True))
            gradients = [_gradient(parameters[name]) for name in names if known[name]]
            for axis in axes:
                _sum_together(gradients, axis)

    def squares(self, squares: Tensor, split: Sequence[bool]) -> Tensor:
        if self.feature.n == 1:
            return squares
        own = torch.tensor([part or self.feature_rank == 0 for part in split], device=squares.device)
        return self.feature.sum_(torch.where(own, squares, 0.0))


def _gradient(parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient, dense, of zeros where only others have one."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.is_sparse:
        parameter.grad = parameter.grad.to_dense()
    elif not parameter.grad.is_contiguous():
        parameter.grad = parameter.grad.contiguous()
    return parameter.grad


def _sum_together(gradients: list[Tensor], wire: Wire) -> None:
    """Sum each in place: large ones where they lie, small ones as one message."""
    if wire.n == 1:
        return
    small = [grad for grad in gradients if grad.numel() < BUCKET]
    for grad in gradients:
        if grad.numel() >= BUCKET:
            wire.sum_(grad)
    if small:
        message = wire.sum_(torch.cat([grad.reshape(-1) for grad in small]))
        for grad, part in zip(small, torch.split(message, [grad.numel() for grad in small]), strict=True):
            grad.copy_(part.view_as(grad))
