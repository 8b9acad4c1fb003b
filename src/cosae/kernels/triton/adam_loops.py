"""Triton loops of the optimiser; their meaning is the plain path of `train.adam` and `moments`. A few rows a program.

A row is held in registers from its gradient to its new unit length, so every number is read and written once.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def measure_rows(
    grad, weight, along_R, square_R, n_rows, n_columns, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """along = ⟨g, d⟩/⟨d, d⟩ where rows are unit (else 0); square = |g − along·d|²."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    real = row < n_rows
    inside = real[:, None] & (column < n_columns)[None, :]
    at = row[:, None] * n_columns + column[None, :]
    rest = tl.load(grad + at, mask=inside, other=0.0)
    if UNIT:
        d = tl.load(weight + at, mask=inside, other=0.0)
        along = tl.sum(rest * d, 1) / tl.maximum(tl.sum(d * d, 1), 1e-16)
        rest -= along[:, None] * d
        tl.store(along_R + row, along, mask=real)
    tl.store(square_R + row, tl.sum(rest * rest, 1), mask=real)


@triton.jit
def _draw(position, key):
    """`moments.draws` of these positions: uint32."""
    x = position.to(tl.uint32) * 0x9E3779B9 + key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _power(x, POWER: tl.constexpr):
    cube = x * x * x
    if POWER == 6:
        cube = cube * cube
    return cube


@triton.jit
def _read(
    data, scale, at, block_at, inside, block_inside, STATE: tl.constexpr, LEVELS: tl.constexpr, POWER: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`Moment.read`: STATE 0 fp32, 1 bf16, 2 int8."""
    value = tl.load(data + at, mask=inside, other=0).to(tl.float32)
    if STATE == 2:
        size = tl.load(scale + block_at, mask=block_inside, other=0.0)
        sign = tl.where(value < 0.0, -1.0, 1.0)
        value = sign * _power(tl.abs(value) / LEVELS, POWER)
        value = tl.reshape(tl.reshape(value, (BLOCK_R, BLOCK_D // 256, 256)) * size[:, :, None], (BLOCK_R, BLOCK_D))
    return value


@triton.jit
def _write(
    data, scale, value, at, block_at, inside, block_inside, key,
    STATE: tl.constexpr, LEVELS: tl.constexpr, POWER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`Moment.write`."""
    if STATE == 0:
        tl.store(data + at, value, mask=inside)
    if STATE == 1:
        bits = value.to(tl.uint32, bitcast=True) + (_draw(at, key) >> 16)
        tl.store(data + at, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    if STATE == 2:
        blocks = tl.reshape(tl.abs(value), (BLOCK_R, BLOCK_D // 256, 256))
        size = tl.max(blocks, 2)
        inverse = tl.where(size > 0.0, 1.0 / tl.maximum(size, 1.17549435e-38), 0.0)
        share = tl.minimum(tl.reshape(blocks * inverse[:, :, None], (BLOCK_R, BLOCK_D)), 1.0)
        low = tl.floor(LEVELS * tl.exp2(tl.log2(tl.maximum(share, 1e-38)) / POWER))
        low = tl.minimum(low, LEVELS - 1.0)
        below, above = _power(low / LEVELS, POWER), _power((low + 1.0) / LEVELS, POWER)
        chance = (share - below) / (above - below)
        code = low + tl.where((_draw(at, key) >> 8).to(tl.float32) * 5.9604644775390625e-08 < chance, 1.0, 0.0)
        if POWER == 6:  # noqa: SIM108 (a constant: only one side is compiled)
            code = tl.where(share > 0.0, tl.maximum(code, 1.0), 0.0)
        else:
            code = tl.where(value < 0.0, -code, code)
        tl.store(data + at, code.to(data.dtype.element_ty), mask=inside)
        tl.store(scale + block_at, size, mask=block_inside)


@triton.jit(do_not_specialize=["mean_key", "square_key"])
def step_rows(
    grad, weight, mean_data, mean_scale, square_data, square_scale, along_R, unit_rows, norm_R, error_R,
    n_rows, n_columns, clip, gain1, beta2, gain2, rate, root_bias2, eps, floor, mean_key, square_key,
    UNIT: tl.constexpr, LEAVE: tl.constexpr, STATE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Projection, clip, Adam and renormalisation; with LEAVE also the new row's unit vector, norm and rounding.

    gain1 = 1 − β1, gain2 = 1 − β2, rate = lr / (1 − β1^t), floor = smallest norm divided by in unit_rows.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    real = row < n_rows
    inside = real[:, None] & (column < n_columns)[None, :]
    at = row[:, None] * n_columns + column[None, :]
    n_blocks = (n_columns + 255) // 256
    block = tl.arange(0, BLOCK_D // 256 if STATE == 2 else 1)
    block_at = row[:, None] * n_blocks + block[None, :]
    block_inside = real[:, None] & (block < n_blocks)[None, :]
    g = tl.load(grad + at, mask=inside, other=0.0)
    w = tl.load(weight + at, mask=inside, other=0.0)
    if UNIT:
        g -= tl.load(along_R + row, mask=real, other=0.0)[:, None] * w
    g *= clip
    mean = _read(mean_data, mean_scale, at, block_at, inside, block_inside, STATE, 127, 3, BLOCK_R, BLOCK_D)
    mean += gain1 * (g - mean)
    square = _read(square_data, square_scale, at, block_at, inside, block_inside, STATE, 255, 6, BLOCK_R, BLOCK_D)
    square = beta2 * square + gain2 * g * g
    w -= rate * (mean / (tl.sqrt(square) / root_bias2 + eps))
    if UNIT:
        w /= tl.maximum(tl.sqrt(tl.sum(w * w, 1)), 1e-8)[:, None]
    tl.store(weight + at, w, mask=inside)
    _write(mean_data, mean_scale, mean, at, block_at, inside, block_inside, mean_key, STATE, 127, 3, BLOCK_R, BLOCK_D)
    _write(
        square_data, square_scale, square, at, block_at, inside, block_inside, square_key, STATE, 255, 6, BLOCK_R,
        BLOCK_D,
    )  # fmt: skip
    if LEAVE:
        norm = tl.maximum(tl.sqrt(tl.sum(w * w, 1)), floor)
        exact = w / norm[:, None]
        rounded = exact.to(unit_rows.dtype.element_ty)
        gap = exact - rounded.to(tl.float32)
        tl.store(unit_rows + at, rounded, mask=inside)
        tl.store(norm_R + row, norm, mask=real)
        tl.store(error_R + row, tl.sqrt(tl.sum(gap * gap, 1)), mask=real)
