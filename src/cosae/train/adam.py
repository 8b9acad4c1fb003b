"""One parameter's part of an Adam step, by three paths. Enters a gradient; leaves a moved parameter and its moments.

`Plain` is the definition, in PyTorch. `Compiled` (on the CPU, with numba) and `cosae.kernels.triton.adam` (on a GPU)
step fp32 matrices in one sweep after one reading sweep for the global norm; they agree with the definition to rounding,
and with themselves to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.kernels import StepCache, choose
from cosae.kernels.cpu import native
from cosae.kernels.deterministic import total
from cosae.kernels.moments import Task
from cosae.kernels.terms import ROW_MIN

ROW_LENGTH_MIN = 1e-8
"""Smallest row length divided by when rows are renormalised (paper §3)."""
CHUNK = 1 << 20
"""Numbers of a compressed moment that are fp32 at a time."""
NEAR = 1 << 18
"""Numbers of a matrix that several passes follow one another over, in the cache; a pass over all of it takes 4 times
as long."""


class Path(Protocol):
    """How a parameter is measured and moved."""

    def measure(
        self, grad: Tensor, weight: Tensor, unit: bool, cache: StepCache | None
    ) -> tuple[Tensor | None, Tensor]: ...
    def step(self, task: Task) -> None: ...


class Plain:
    """The definition: each parameter in PyTorch, matrices a stretch of rows at a time."""

    def measure(
        self, grad: Tensor, weight: Tensor, unit: bool, cache: StepCache | None
    ) -> tuple[Tensor | None, Tensor]:
        """Component of each gradient row along its row (R,), and the squared norm of what is left, () float64."""
        if not unit:
            return None, torch.linalg.vector_norm(grad, dtype=torch.float64).square()
        along_R = grad.new_empty(len(grad))
        square = grad.new_zeros((), dtype=torch.float64)
        for rows in _stretches(grad, NEAR):
            some, base = grad[rows], weight[rows]
            along_R[rows] = (some * base).sum(-1) / base.square().sum(-1).clamp_min(ROW_LENGTH_MIN**2)
            rest = some - along_R[rows, None] * base
            square += torch.linalg.vector_norm(rest, dtype=torch.float64).square()
        return along_R, square

    def step(self, task: Task) -> None:
        if task.weight.dim() != 2:
            self._step(task, task.grad, task.weight, task.mean.data, task.square.data, None)
            return
        for rows in _stretches(task.weight, NEAR if task.mean.uncompressed else CHUNK):
            mean, square = task.mean.read(rows), task.square.read(rows)
            along_R = None if task.along_R is None else task.along_R[rows]
            self._step(task, task.grad[rows], task.weight[rows], mean, square, along_R)
            task.mean.write(rows, mean, task.keys[0])
            task.square.write(rows, square, task.keys[1])

    @staticmethod
    def _step(
        task: Task, grad: Tensor, weight: Tensor, mean: Tensor, square: Tensor, along_R: Tensor | None
    ) -> None:  # fmt: skip
        rest = grad if along_R is None else grad - along_R[:, None] * weight
        rest = rest * task.clip
        mean.lerp_(rest, 1.0 - task.betas[0])
        square.mul_(task.betas[1]).addcmul_(rest, rest, value=1.0 - task.betas[1])
        weight.addcdiv_(mean, square.sqrt().div_(task.root_bias2).add_(task.eps), value=-task.rate)
        if along_R is not None:
            weight.div_(torch.linalg.vector_norm(weight, dim=-1, keepdim=True).clamp_min(ROW_LENGTH_MIN))


def _stretches(matrix: Tensor, numbers: int) -> Iterator[slice]:
    """All rows, about so many numbers at a time."""
    n_rows, width = matrix.shape
    tall = max(1, numbers // max(1, width))
    return (slice(first, min(first + tall, n_rows)) for first in range(0, n_rows, tall))


class Compiled:
    """The same for fp32 matrices and moments on the CPU, by compiled loops."""

    def measure(
        self, grad: Tensor, weight: Tensor, unit: bool, cache: StepCache | None
    ) -> tuple[Tensor | None, Tensor]:
        known = None if cache is None else cache.measured_of(grad, weight, unit)
        if known is not None:
            return known.along_F, known.square
        along_R = torch.empty(len(grad))
        square_R = torch.empty(len(grad), dtype=torch.float64)
        arrays = (grad.numpy(), weight.numpy(), unit, along_R.numpy(), square_R.numpy())
        native.run_parts(native.loops("adam").measure_rows, native.parts_for(grad.numel(), 2), *arrays)
        return along_R if unit else None, total(square_R)

    def step(self, task: Task) -> None:
        if not task.mean.uncompressed:
            PLAIN.step(task)
            return
        unit = task.along_R is not None
        along_R = torch.zeros(len(task.grad)) if task.along_R is None else task.along_R
        tensors = (task.grad, task.weight, task.mean.data, task.square.data, along_R)
        numbers = (task.clip, *task.betas, task.rate, task.root_bias2, task.eps, ROW_MIN)
        norm_R = torch.empty(0 if task.cache is None else len(task.weight))
        native.run_parts(
            native.loops("adam").step_rows,
            native.parts_for(4 * task.grad.numel(), 2),
            *(t.numpy() for t in tensors),
            unit,
            *(np.float32(x) for x in numbers),
            norm_R.numpy(),
        )
        torch.autograd.graph.increment_version(task.weight)
        if task.cache is not None:
            task.cache.leave_rows(task.weight, norm_R)


PLAIN, COMPILED = Plain(), Compiled()


def path_of(kernel: str, grad: Tensor, weight: Tensor) -> Path:
    """The path that steps this parameter; `kernel` and devices as in `cosae.kernels.choose`."""
    if kernel == "reference" or weight.dim() != 2 or weight.dtype != torch.float32:
        return PLAIN
    if grad.dtype != weight.dtype or grad.device != weight.device:
        raise CosaeError(f"a gradient must be like its parameter, {weight.dtype} on {weight.device}.")
    if choose(kernel, weight.device).NAME == "triton":
        from cosae.kernels.triton import adam as triton_adam

        return triton_adam if triton_adam.serves(grad, weight) else PLAIN
    on_cpu = weight.device.type == "cpu" and weight.is_contiguous() and grad.is_contiguous()
    return COMPILED if on_cpu and native.serves() else PLAIN
