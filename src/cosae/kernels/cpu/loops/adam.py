"""Compiled loops of the optimiser; their meaning is the plain path of `train.optimizer`. See `native` for threads.

Every parameter is a matrix of rows here; each row is handled by one part, so results do not depend on threads.
"""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from cosae.kernels.cpu.loops.shared import compile_loop, measure_row, row_norm, share


@compile_loop
def measure_rows(part, n_parts, grad_RD, weight_RD, unit, along_R, square_R):
    """along and square of every row (`measure_row`)."""
    first, last = share(part, n_parts, grad_RD.shape[0])
    for r in range(first, last):
        along_R[r], square_R[r] = measure_row(grad_RD, weight_RD, r, unit)


@compile_loop
def step_rows(
    part, n_parts, grad_RD, weight_RD, mean_RD, square_RD, along_R, unit, clip, beta1, beta2, rate, root_bias2, eps,
    norm_floor, norm_R,
):  # fmt: skip
    """One sweep: projection, clip, Adam, renormalisation, and the new rows' norms where norm_R has room for them.

    All scalars fp32; rate = lr / (1 − β1^t); norm = max(|row|, norm_floor), to the bit what `search.row_norms` says.
    """
    n_rows, width = grad_RD.shape
    one = np.float32(1.0)
    for r in range(n_rows * part // n_parts, n_rows * (part + 1) // n_parts):
        along = along_R[r]
        length = np.float32(0.0)
        for j in range(width):
            weight = weight_RD[r, j]
            gradient = (grad_RD[r, j] - along * weight) * clip
            mean = mean_RD[r, j] + (one - beta1) * (gradient - mean_RD[r, j])
            square = beta2 * square_RD[r, j] + (one - beta2) * gradient * gradient
            mean_RD[r, j], square_RD[r, j] = mean, square
            weight = weight - rate * (mean / (np.sqrt(square) / root_bias2 + eps))
            weight_RD[r, j] = weight
            length += weight * weight
        if unit:
            inverse = one / max(np.sqrt(length), np.float32(1e-8))
            for j in range(width):
                weight_RD[r, j] *= inverse
        if norm_R.shape[0] > 0:
            norm_R[r] = row_norm(weight_RD, r, norm_floor)
