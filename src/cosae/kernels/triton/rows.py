"""Unit rows in the screen's precision, made by Triton; the optimiser's sweep leaves those of the next step behind.

They cost 2 bytes a parameter of the encoder to keep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cosae.kernels.cache import StepCache
from cosae.kernels.triton import loops as triton_loops
from cosae.kernels.triton.sums import rows_block, width_block

WIDEST = 4096
"""Columns read at a time by one program."""


@dataclass(frozen=True)
class UnitRows:
    """unit_RD (R, D) rows over their length, rounded; norm_R (R,) that length, clamped; error_R (R,) |rounding|."""

    unit_RD: Tensor
    norm_R: Tensor
    error_R: Tensor


def unit_rows(x_RD: Tensor, floor: float, dtype: torch.dtype) -> UnitRows:
    """x / max(|x|, floor) in dtype (`screen.unit_rows`); x (R, D) fp32, contiguous."""
    n_rows, width = x_RD.shape
    unit_RD = torch.empty(n_rows, width, dtype=dtype, device=x_RD.device)
    norm_R, error_R = x_RD.new_empty(n_rows), x_RD.new_empty(n_rows)
    if n_rows:
        block = width_block(width, WIDEST)
        tall = rows_block(x_RD.device)
        triton_loops.unit_rows[(-(-n_rows // tall),)](
            x_RD.detach(), floor, unit_RD, norm_R, error_R, n_rows, width, BLOCK_R=tall, BLOCK_D=block
        )
    return UnitRows(unit_RD, norm_R, error_R)


def left(cache: StepCache, weight_RD: Tensor, dtype: torch.dtype) -> UnitRows:
    """Room for the unit rows of a parameter: what was left of it before, to be overwritten, or fresh memory."""
    rows = cache.rows(weight_RD, stale=True)
    if isinstance(rows, UnitRows) and rows.unit_RD.dtype == dtype:
        return rows
    n_rows = len(weight_RD)
    norm_R, error_R = (torch.empty(n_rows, device=weight_RD.device) for _ in range(2))
    return UnitRows(torch.empty(weight_RD.shape, dtype=dtype, device=weight_RD.device), norm_R, error_R)


def prepared(cache: StepCache | None, rows_RD: Tensor, dtype: torch.dtype) -> UnitRows | None:
    """What the optimiser left of these very rows, or None."""
    rows = None if cache is None else cache.rows(rows_RD)
    return rows if isinstance(rows, UnitRows) and rows.unit_RD.dtype == dtype else None
