"""Sums over active entries and their gradients; `cosae.kernels.cpu.sums` says what each loop of the same name means.

Entries come feature by feature here: `order_E` lists their positions, those of feature i at offset_F1[i] :
offset_F1[i + 1].
"""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from cosae.kernels.cpu.loops.shared import compile_loop, four_dots, inlined, measure_row, share

TOTAL_ROWS = 64
"""Features whose share of a total over all features is summed by one part."""


@inlined
def _dot_and_add(out_RD, r, scale, x_RD, q, y_RD):
    """out_r += scale · x_q, returning ⟨x_q, y_r⟩: one read of x for both."""
    total = np.float32(0.0)
    for j in range(out_RD.shape[1]):
        value = x_RD[q, j]
        total += value * y_RD[r, j]
        out_RD[r, j] += scale * value
    return total


@inlined
def _four_dots_and_adds(out_RD, r, v0, v1, v2, v3, x_RD, q0, q1, q2, q3, y_RD):
    """`_dot_and_add` of four rows of x."""
    t0, t1, t2, t3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for j in range(out_RD.shape[1]):
        x0, x1, x2, x3, y = x_RD[q0, j], x_RD[q1, j], x_RD[q2, j], x_RD[q3, j], y_RD[r, j]
        t0 += x0 * y
        t1 += x1 * y
        t2 += x2 * y
        t3 += x3 * y
        out_RD[r, j] += (v0 * x0 + v1 * x1) + (v2 * x2 + v3 * x3)
    return t0, t1, t2, t3


@inlined
def _add_rows(out_RD, r, value_E, x_RD, row_E, entry_S, first, last):
    """out_r += Σ value_e · x_row(e) over e = entry_S[first : last], four at a time to spare loads of out."""
    width = out_RD.shape[1]
    s = first
    while s + 4 <= last:
        e0, e1, e2, e3 = entry_S[s], entry_S[s + 1], entry_S[s + 2], entry_S[s + 3]
        v0, v1, v2, v3 = value_E[e0], value_E[e1], value_E[e2], value_E[e3]
        q0, q1, q2, q3 = row_E[e0], row_E[e1], row_E[e2], row_E[e3]
        for j in range(width):
            out_RD[r, j] += (v0 * x_RD[q0, j] + v1 * x_RD[q1, j]) + (v2 * x_RD[q2, j] + v3 * x_RD[q3, j])
        s += 4
    while s < last:
        e0 = entry_S[s]
        v0, q0 = value_E[e0], row_E[e0]
        for j in range(width):
            out_RD[r, j] += v0 * x_RD[q0, j]
        s += 1


@inlined
def _feature_range(part, n_parts, offset_F1, multiple):
    """Features of one part, such that parts hold about as many entries and rows; parts begin at multiples."""
    n_features = offset_F1.shape[0] - 1
    total = offset_F1[n_features] + n_features
    bounds = np.empty(2, np.int64)
    for side in range(2):
        goal = total * (part + side) // n_parts
        low, high = 0, n_features
        while low < high:
            middle = (low + high) // 2
            if offset_F1[middle] + middle < goal:
                low = middle + 1
            else:
                high = middle
        if part + side < n_parts:
            low = low // multiple * multiple
        bounds[side] = low
    return bounds[0], bounds[1]


@compile_loop
def entry_dots(part, n_parts, x_BD, rows_FD, token_E, order_E, offset_F1, dot_E):
    """dot_e = ⟨x_token, rows_feature⟩, in the order of the search's `scan`."""
    first, last = _feature_range(part, n_parts, offset_F1, 1)
    for i in range(first, last):
        end = offset_F1[i + 1]
        for s in range(offset_F1[i], end, 4):
            e0, e1 = order_E[s], order_E[min(s + 1, end - 1)]
            e2, e3 = order_E[min(s + 2, end - 1)], order_E[min(s + 3, end - 1)]
            dot_E[e0], dot_E[e1], dot_E[e2], dot_E[e3] = four_dots(
                rows_FD, i, x_BD, token_E[e0], token_E[e1], token_E[e2], token_E[e3]
            )


@compile_loop
def token_sums(part, n_parts, value_E, rows_FD, feature_E, offset_B1, entry_E, stride, out_BD):
    """out_b = Σ over its entries of value · rows_feature; entry_E = 0, 1, 2 …

    `stride` features at a time for all tokens, so that their rows stay in the cache while tokens read them.
    """
    first, last = share(part, n_parts, out_BD.shape[0])
    at_B = offset_B1[first:last].copy()
    for b in range(first, last):
        out_BD[b] = np.float32(0.0)
    for edge in range(stride, rows_FD.shape[0] + stride, stride):
        for b in range(first, last):
            begin = end = at_B[b - first]
            while end < offset_B1[b + 1] and feature_E[end] < edge:
                end += 1
            _add_rows(out_BD, b, value_E, rows_FD, feature_E, entry_E, begin, end)
            at_B[b - first] = end


@compile_loop
def feature_sums(
    part, n_parts, value_E, x_BD, token_E, order_E, offset_F1, pull_F, rows_FD, out_FD, square_F, total_KD
):
    """out_i = Σ over its entries of value · x_token, plus pull_i · rows_i; square_i = |out_i|² in float64.

    total_k = Σ over the entries of TOTAL_ROWS features of value · rows_feature, unless total has no rows.
    """
    first, last = _feature_range(part, n_parts, offset_F1, TOTAL_ROWS)
    for i in range(first, last):
        pull = pull_F[i]
        for j in range(out_FD.shape[1]):
            out_FD[i, j] = pull * rows_FD[i, j]
        _add_rows(out_FD, i, value_E, x_BD, token_E, order_E, offset_F1[i], offset_F1[i + 1])
        square_F[i] = measure_row(out_FD, rows_FD, i, False)[1]
        if total_KD.shape[0] > 0:
            k = i // TOTAL_ROWS
            if i % TOTAL_ROWS == 0:
                total_KD[k] = np.float32(0.0)
            value = np.float32(0.0)
            for s in range(offset_F1[i], offset_F1[i + 1]):
                value += value_E[order_E[s]]
            for j in range(out_FD.shape[1]):
                total_KD[k, j] += value * rows_FD[i, j]


@compile_loop
def feature_sums_and_dots(
    part, n_parts, value_E, x_BD, token_E, order_E, offset_F1, rows_FD, out_FD, dot_E, along_F, square_F
):  # fmt: skip
    """feature_sums and entry_dots in one read of x; along and square of out as by `measure_row` for unit rows."""
    first, last = _feature_range(part, n_parts, offset_F1, 1)
    for i in range(first, last):
        out_FD[i] = np.float32(0.0)
        s, end = offset_F1[i], offset_F1[i + 1]
        while s + 4 <= end:
            e0, e1, e2, e3 = order_E[s], order_E[s + 1], order_E[s + 2], order_E[s + 3]
            dot_E[e0], dot_E[e1], dot_E[e2], dot_E[e3] = _four_dots_and_adds(
                out_FD, i, value_E[e0], value_E[e1], value_E[e2], value_E[e3],
                x_BD, token_E[e0], token_E[e1], token_E[e2], token_E[e3], rows_FD,
            )  # fmt: skip
            s += 4
        while s < end:
            e = order_E[s]
            dot_E[e] = _dot_and_add(out_FD, i, value_E[e], x_BD, token_E[e], rows_FD)
            s += 1
        along_F[i], square_F[i] = measure_row(out_FD, rows_FD, i, True)


@compile_loop
def segment_sums(part, n_parts, value_E, order_E, offset_S1, out_S):
    """out_s = Σ of value_E[order_E[offset_s : offset_{s + 1}]], summed in float64."""
    first, last = share(part, n_parts, out_S.shape[0])
    for s in range(first, last):
        total = 0.0
        for e in range(offset_S1[s], offset_S1[s + 1]):
            total += value_E[order_E[e]]
        out_S[s] = total


@compile_loop
def squared_errors(part, n_parts, x_BD, y_BD, error_B):
    """error_b = |x_b − y_b|²."""
    first, last = share(part, n_parts, x_BD.shape[0])
    for b in range(first, last):
        total = np.float32(0.0)
        for j in range(x_BD.shape[1]):
            gap = x_BD[b, j] - y_BD[b, j]
            total += gap * gap
        error_B[b] = total


@compile_loop
def scaled_gaps(part, n_parts, x_BD, y_BD, scale_B, out_BD):
    """out_b = scale_b · (x_b − y_b)."""
    first, last = share(part, n_parts, x_BD.shape[0])
    for b in range(first, last):
        scale = scale_B[b]
        for j in range(x_BD.shape[1]):
            out_BD[b, j] = scale * (x_BD[b, j] - y_BD[b, j])
