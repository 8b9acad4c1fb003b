"""The optimiser's sweeps by Triton: one that reads gradients for the global norm, one that does everything else.

A global clip needs the norm before the first parameter moves, so it costs a second read of the gradients (4 of the 34
bytes a parameter of a step with fp32 states); the result is the definition's, not that of a lagged norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cosae.kernels.cache import StepCache
from cosae.kernels.moments import Task
from cosae.kernels.terms import ROW_MIN
from cosae.kernels.triton import adam_loops as loops
from cosae.kernels.triton.rows import left
from cosae.kernels.triton.sums import rows_block
from cosae.kernels.triton.survivors import screen_dtype

WIDEST = 16384
"""Widest row that is held in registers; wider parameters are stepped by the plain path."""


def serves(grad: Tensor, weight: Tensor) -> bool:
    """Whether these sweeps serve a parameter."""
    return (
        weight.dim() == 2
        and 0 < weight.shape[1] <= WIDEST
        and weight.shape[0] > 0
        and all(t.dtype == torch.float32 and t.is_contiguous() for t in (grad, weight))
    )


def _sizes(weight: Tensor) -> dict[str, int]:
    width = weight.shape[1]
    block = max(256, 1 << (width - 1).bit_length())
    return {"BLOCK_R": rows_block(weight.device), "BLOCK_D": block, "num_warps": max(4, min(16, block // 512))}


def measure(grad: Tensor, weight: Tensor, unit: bool, cache: StepCache | None = None) -> tuple[Tensor | None, Tensor]:
    """Component of each gradient row along its row (R,) where unit, and the squared norm of the rest () float64."""
    n_rows, width = weight.shape
    sizes = _sizes(weight)
    square_R = weight.new_empty(n_rows)
    along_R = weight.new_empty(n_rows) if unit else square_R
    grid = (-(-n_rows // sizes["BLOCK_R"]),)
    loops.measure_rows[grid](grad, weight, along_R, square_R, n_rows, width, UNIT=unit, **sizes)
    return along_R if unit else None, square_R.sum(dtype=torch.float64)


def step(task: Task) -> None:
    """One sweep over a weight (R, D), in place; its new unit rows are left in the task's cache for the next screen."""
    weight, mean, square, along_R = task.weight, task.mean, task.square, task.along_R
    n_rows, width = weight.shape
    sizes = _sizes(weight)
    none = weight.new_empty(0)
    state = 0 if mean.uncompressed else 1 if mean.scale_RK is None else 2
    scales = [none if moment.scale_RK is None else moment.scale_RK for moment in (mean, square)]
    rows = None if task.cache is None else left(task.cache, weight, screen_dtype(weight.device))
    outs = (none, none, none) if rows is None else (rows.unit_RD, rows.norm_R, rows.error_R)
    flags: dict[str, Any] = {"UNIT": along_R is not None, "LEAVE": rows is not None, "STATE": state}
    gains = (1.0 - task.betas[0], task.betas[1], 1.0 - task.betas[1])
    loops.step_rows[(-(-n_rows // sizes["BLOCK_R"]),)](
        task.grad, weight, mean.data, scales[0], square.data, scales[1], none if along_R is None else along_R, *outs,
        n_rows, width, task.clip, *gains, task.rate, task.root_bias2, task.eps, ROW_MIN, *task.keys, **flags, **sizes,
    )  # fmt: skip
    torch.autograd.graph.increment_version(weight)
    if task.cache is not None:
        task.cache.leave_rows(weight, rows)
