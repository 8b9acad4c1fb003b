"""What the compiled loops share. Arrays are C-contiguous, fp32 unless said otherwise; a call does one of n_parts."""
# mypy: ignore-errors

from __future__ import annotations

import numba
import numpy as np

# Sums may be taken in vector lanes (reassoc), multiply-adds may be fused (contract); NaN and Inf keep their meaning.
_SUMS = {"reassoc", "contract"}


def compile_loop(function):
    """function compiled: releases the interpreter lock, kept in numba's cache where a place for it can be written."""
    # error_model: Python's check for division by zero would keep loops from being vectorised
    options = {"nogil": True, "error_model": "numpy", "fastmath": _SUMS, "boundscheck": False}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(**options)(function)


def inlined(function):
    # a real call costs 60 ns in reference counts of its arrays: more than a dot product of 192
    return numba.njit(inline="always", error_model="numpy", fastmath=_SUMS, boundscheck=False)(function)


@inlined
def dot(x_RD, r, y_RD, q):
    total = np.float32(0.0)
    for j in range(x_RD.shape[1]):
        total += x_RD[r, j] * y_RD[q, j]
    return total


@inlined
def four_dots(x_RD, r, y_RD, q0, q1, q2, q3):
    """⟨x_r, y_q⟩ of four rows of y: x is loaded once, and four rows of y are on their way at a time."""
    t0, t1, t2, t3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for j in range(x_RD.shape[1]):
        x = x_RD[r, j]
        t0 += x * y_RD[q0, j]
        t1 += x * y_RD[q1, j]
        t2 += x * y_RD[q2, j]
        t3 += x * y_RD[q3, j]
    return t0, t1, t2, t3


@inlined
def share(part, n_parts, size):
    return size * part // n_parts, size * (part + 1) // n_parts


@inlined
def row_norm(x_RD, r, floor):
    """max(|x_r|, floor)."""
    return max(np.sqrt(dot(x_RD, r, x_RD, r)), floor)


@inlined
def measure_row(grad_RD, weight_RD, r, unit):
    """along = ⟨g, d⟩/⟨d, d⟩ where rows are unit (else 0), fp32; and |g − along·d|², summed in float64."""
    width = grad_RD.shape[1]
    along = np.float32(0.0)
    square = 0.0
    if unit:
        inner, length = np.float32(0.0), np.float32(0.0)
        for j in range(width):
            inner += grad_RD[r, j] * weight_RD[r, j]
            length += weight_RD[r, j] * weight_RD[r, j]
        along = inner / max(length, np.float32(1e-16))
        for j in range(width):
            rest = np.float64(grad_RD[r, j] - along * weight_RD[r, j])
            square += rest * rest
    else:
        for j in range(width):
            gradient = np.float64(grad_RD[r, j])
            square += gradient * gradient
    return along, square
