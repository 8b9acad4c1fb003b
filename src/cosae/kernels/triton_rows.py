"""Unit rows in the screen's precision, made by Triton; the optimiser's sweep leaves those of the next step behind.

What `leave` was given is found by `prepared` only for the same tensor in the same state: a row matrix that was written
to since, or another one at its address, is prepared afresh. It costs 2 bytes a parameter of the encoder to keep.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from cosae.kernels import triton_loops
from cosae.kernels.triton_sums import rows_block, width_block

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


_left: dict[int, tuple[weakref.ref[Tensor], int, UnitRows]] = {}


def leave(weight_RD: Tensor, rows: UnitRows) -> None:
    """Keep `rows` for as long as weight (a parameter) lives and is not written to."""
    key = weight_RD.data_ptr()
    gone = weakref.ref(weight_RD, lambda ref: _forget(key, ref))
    _left[key] = (gone, weight_RD._version, rows)


def left(weight_RD: Tensor, dtype: torch.dtype) -> UnitRows:
    """Room for the unit rows of a parameter: what was left for it before, to be overwritten, or fresh memory."""
    if weight_RD.data_ptr() in _left:
        ref, _, rows = _left[weight_RD.data_ptr()]
        if ref() is weight_RD and rows.unit_RD.dtype == dtype:
            return rows
    n_rows = len(weight_RD)
    norm_R, error_R = (torch.empty(n_rows, device=weight_RD.device) for _ in range(2))
    return UnitRows(torch.empty(weight_RD.shape, dtype=dtype, device=weight_RD.device), norm_R, error_R)


def _forget(key: int, ref: weakref.ref[Tensor]) -> None:
    if key in _left and _left[key][0] is ref:
        del _left[key]


def prepared(rows_RD: Tensor, dtype: torch.dtype) -> UnitRows | None:
    """What was left for these very rows, or None."""
    if rows_RD.is_inference() or rows_RD.data_ptr() not in _left:
        return None
    ref, version, rows = _left[rows_RD.data_ptr()]
    weight = ref()
    if weight is None or weight.data_ptr() != rows_RD.data_ptr() or weight.shape != rows_RD.shape:
        return None
    unchanged = weight._version == version == rows_RD._version
    return rows if unchanged and rows.unit_RD.dtype == dtype else None
