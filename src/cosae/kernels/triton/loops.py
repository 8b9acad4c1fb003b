"""Triton loops over active entries, and the encoder product that appends what passes a threshold.

Nothing here defines a result: the twins are in `sums`, `survivors` and `screen`. Imported only where a path asks for
them. Offsets into matrices are int64 (2³¹ numbers are fewer than a large encoder holds). Every output number is
written by one program, summed in fp32 in an order that depends on shapes alone; the only atomic is the counter of
`find`, whose results are sorted afterwards.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unit_rows(x, floor, unit, norm, error, n_rows, n_columns, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """unit = x / max(|x|, floor) in unit's type; norm that divisor; error |unit − x / norm|. BLOCK_R rows a program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    real = row < n_rows
    at = row[:, None] * n_columns + tl.arange(0, BLOCK_D)[None, :]
    column = tl.arange(0, BLOCK_D)[None, :]
    square = tl.full((BLOCK_R, BLOCK_D), 0.0, tl.float32)
    for first in range(0, n_columns, BLOCK_D):
        inside = real[:, None] & (first + column < n_columns)
        value = tl.load(x + at + first, mask=inside, other=0.0)
        square += value * value
    length = tl.maximum(tl.sqrt(tl.sum(square, 1)), floor)
    lost = tl.full((BLOCK_R, BLOCK_D), 0.0, tl.float32)
    for first in range(0, n_columns, BLOCK_D):
        inside = real[:, None] & (first + column < n_columns)
        exact = tl.load(x + at + first, mask=inside, other=0.0) / length[:, None]
        rounded = exact.to(unit.dtype.element_ty)
        tl.store(unit + at + first, rounded, mask=inside)
        gap = exact - rounded.to(tl.float32)
        lost += gap * gap
    tl.store(norm + row, length, mask=real)
    tl.store(error + row, tl.sqrt(tl.sum(lost, 1)), mask=real)


@triton.jit
def find(
    unit_z, unit_w, key, counter, sign_F, power_F, slope_F, loss_F, lift_F, bias_F, log_r_B, margin_B, floor_B,
    n_tokens, n_features, n_columns, room,
    FLOOR: tl.constexpr, WIDE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Append key = feature · n_tokens + token of every pair that κ̃ ≤ θ − margin_b − loss_i does not exclude.

    θ = sign·2^(power_i + slope_i·ln r_b) (`triton_survivors`). The counter counts all that pass, written or not.
    Tiles are walked in groups of GROUP along the features, so that both factors stay in L2. WIDE multiplies in fp32
    (the interpreter has no bf16 product).
    """
    n_rows, n_cols = (n_features + BLOCK_F - 1) // BLOCK_F, (n_tokens + BLOCK_B - 1) // BLOCK_B
    tile = tl.program_id(0)
    first_row = tile // (GROUP * n_cols) * GROUP
    height = tl.minimum(n_rows - first_row, GROUP)
    at = tile % (GROUP * n_cols)
    feature = (first_row + at % height) * BLOCK_F + tl.arange(0, BLOCK_F)
    token = (at // height) * BLOCK_B + tl.arange(0, BLOCK_B)
    real_f, real_b = feature < n_features, token < n_tokens
    # a tile's edge reads row 0 again instead of a masked row: the loop's loads stay plain
    row_w = tl.where(real_f, feature, 0).to(tl.int64)[:, None] * n_columns
    row_z = tl.where(real_b, token, 0).to(tl.int64)[None, :] * n_columns
    product = tl.full((BLOCK_F, BLOCK_B), 0.0, tl.float32)
    for first in range(0, n_columns, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = column < n_columns
        w = tl.load(unit_w + row_w + column[None, :], mask=inside[None, :], other=0.0)
        z = tl.load(unit_z + row_z + column[:, None], mask=inside[:, None], other=0.0)
        if WIDE:
            w, z = w.to(tl.float32), z.to(tl.float32)
        product = tl.dot(w, z, product, input_precision="ieee")
    log_r = tl.load(log_r_B + token, mask=real_b, other=0.0)
    margin = tl.load(margin_B + token, mask=real_b, other=0.0)
    power = tl.load(power_F + feature, mask=real_f, other=0.0)
    slope = tl.load(slope_F + feature, mask=real_f, other=0.0)
    loss = tl.load(loss_F + feature, mask=real_f, other=0.0)
    log_theta = power[:, None] + slope[:, None] * log_r[None, :]
    if FLOOR:
        least = tl.load(lift_F + feature, mask=real_f, other=0.0)
        bias = tl.load(bias_F + feature, mask=real_f, other=0.0)
        floor = tl.load(floor_B + token, mask=real_b, other=0.0)
        lift = tl.maximum(least[:, None], floor[None, :]) - bias[:, None]
        sign = tl.where(lift > 0.0, 1.0, tl.where(lift < 0.0, -1.0, 0.0))
        log_theta += tl.log2(tl.maximum(tl.abs(lift), 1.2e-38))
    else:
        sign = tl.load(sign_F + feature, mask=real_f, other=0.0)[:, None]
    bound = sign * tl.exp2(log_theta) - margin[None, :] - loss[:, None]
    passed = (product <= bound) == 0
    passed = passed & real_f[:, None] & real_b[None, :]
    place = tl.atomic_add(counter + tl.full((BLOCK_F, BLOCK_B), 0, tl.int64), 1, mask=passed, sem="relaxed")
    pair = feature.to(tl.int64)[:, None] * n_tokens + token[None, :]
    tl.store(key + place, pair, mask=passed & (place < room))


@triton.jit
def entry_dots(x, rows, token_E, feature_E, dot_E, n_entries, n_columns, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr):
    """dot_e = ⟨x_token, rows_feature⟩, BLOCK_E entries a program."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    real = entry < n_entries
    at_x = tl.load(token_E + entry, mask=real, other=0)[:, None] * n_columns
    at_row = tl.load(feature_E + entry, mask=real, other=0)[:, None] * n_columns
    column = tl.arange(0, BLOCK_D)
    total = tl.full((BLOCK_E, BLOCK_D), 0.0, tl.float32)
    for first in range(0, n_columns, BLOCK_D):
        inside = (first + column < n_columns)[None, :] & real[:, None]
        a = tl.load(x + at_x + first + column[None, :], mask=inside, other=0.0)
        b = tl.load(rows + at_row + first + column[None, :], mask=inside, other=0.0)
        total += a * b
    tl.store(dot_E + entry, tl.sum(total, 1), mask=real)


@triton.jit
def row_sums(
    value_E, source, row_E, order_E, offset, pull, base, out, partial_dot,
    n_entries, n_columns,
    ORDERED: tl.constexpr, SUM: tl.constexpr, PULL: tl.constexpr, DOT: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_r = Σ over the entries of row r of value_e · source_row(e), plus pull_r · base_r.

    One (row, column tile) a program. Entries of row r are order_E[offset_r : offset_{r + 1}], or those positions
    themselves where not ORDERED. With DOT also ⟨source_row(e), base_r⟩ over the tile's columns into
    partial_dot[tile, e]: one read of source for both.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    column = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < n_columns
    at = row * n_columns + column
    total = tl.full((BLOCK_D,), 0.0, tl.float32)
    if PULL or DOT:
        own = tl.load(base + at, mask=inside, other=0.0)
    if PULL:
        total += tl.load(pull + row) * own
    first, last = tl.load(offset + row), tl.load(offset + row + 1)
    for start in range(first, last, BLOCK_E):
        place = start + tl.arange(0, BLOCK_E)
        real = place < last
        entry = place
        if ORDERED:
            entry = tl.load(order_E + place, mask=real, other=0)
        other = tl.load(row_E + entry, mask=real, other=0)
        block = tl.load(
            source + other[:, None] * n_columns + column[None, :], mask=real[:, None] & inside[None, :], other=0.0
        )
        if SUM:
            value = tl.load(value_E + entry, mask=real, other=0.0)
            total += tl.sum(value[:, None] * block, 0)
        if DOT:
            tl.store(partial_dot + tile * n_entries + entry, tl.sum(block * own[None, :], 1), mask=real)
    if SUM:
        tl.store(out + at, total, mask=inside)


@triton.jit
def segment_sums(value_E, order_E, offset, out, ORDERED: tl.constexpr, BLOCK_E: tl.constexpr):
    """out_r = Σ over the entries of row r of value_e. A row a program."""
    row = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offset + row), tl.load(offset + row + 1)
    total = tl.full((BLOCK_E,), 0.0, tl.float32)
    for start in range(first, last, BLOCK_E):
        place = start + tl.arange(0, BLOCK_E)
        real = place < last
        entry = place
        if ORDERED:
            entry = tl.load(order_E + place, mask=real, other=0)
        total += tl.load(value_E + entry, mask=real, other=0.0)
    tl.store(out + row, tl.sum(total, 0))
