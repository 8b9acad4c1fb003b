"""The compiled loops themselves. Imported only where numba is installed; see `native` for how they are run.

Arrays: fp32 unless said otherwise, C-contiguous. Entries come feature-major here: `order_E` lists entry positions
feature by feature, those of feature i at offset_F1[i] : offset_F1[i + 1].
"""
# mypy: ignore-errors

from __future__ import annotations

import numba
import numpy as np
from numba.extending import overload

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


def _inlined(function):
    # a real call costs 60 ns in reference counts of its arrays: more than a dot product of 192
    return numba.njit(inline="always", error_model="numpy", fastmath=_SUMS, boundscheck=False)(function)


@_inlined
def _dot(x_RD, r, y_RD, q):
    total = np.float32(0.0)
    for j in range(x_RD.shape[1]):
        total += x_RD[r, j] * y_RD[q, j]
    return total


@_inlined
def _four_dots(x_RD, r, y_RD, q0, q1, q2, q3):
    """⟨x_r, y_q⟩ of four rows of y: x is loaded once, and four rows of y are on their way at a time."""
    t0, t1, t2, t3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for j in range(x_RD.shape[1]):
        x = x_RD[r, j]
        t0 += x * y_RD[q0, j]
        t1 += x * y_RD[q1, j]
        t2 += x * y_RD[q2, j]
        t3 += x * y_RD[q3, j]
    return t0, t1, t2, t3


@_inlined
def _dot_and_add(out_RD, r, scale, x_RD, q, y_RD):
    """out_r += scale · x_q, returning ⟨x_q, y_r⟩: one read of x for both."""
    total = np.float32(0.0)
    for j in range(out_RD.shape[1]):
        value = x_RD[q, j]
        total += value * y_RD[r, j]
        out_RD[r, j] += scale * value
    return total


@_inlined
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


@_inlined
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


@_inlined
def _range(part, n_parts, size):
    return size * part // n_parts, size * (part + 1) // n_parts


TOTAL_ROWS = 64
"""Features whose share of a total over all features is summed by one part."""


@_inlined
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


@_inlined
def row_norm(x_RD, r, floor):
    """max(|x_r|, floor)."""
    return max(np.sqrt(_dot(x_RD, r, x_RD, r)), floor)


@_inlined
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


@compile_loop
def row_norms(part, n_parts, x_RD, floor, norm_R):
    """norm = max(|x|, floor) of each row."""
    first, last = _range(part, n_parts, x_RD.shape[0])
    for r in range(first, last):
        norm_R[r] = row_norm(x_RD, r, floor)


@compile_loop
def round_rows_bf16(part, n_parts, x_RD, place_R, by_R, short_RD, error_R):
    """short = bf16 bits of by · x[place]; error |short − by · x[place]|."""
    first, last = _range(part, n_parts, x_RD.shape[0])
    width = x_RD.shape[1]
    exact = np.empty(width, np.float32)
    exact_bits = exact.view(np.uint32)
    rounded_bits = np.empty(width, np.uint32)
    rounded = rounded_bits.view(np.float32)
    for r in range(first, last):
        place, by = place_R[r], by_R[r]
        for j in range(width):
            exact[j] = x_RD[place, j] * by
        for j in range(width):
            bits = exact_bits[j]
            high = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            short_RD[r, j] = np.uint16(high)
            rounded_bits[j] = high << np.uint32(16)
        square = np.float32(0.0)
        for j in range(width):
            gap = exact[j] - rounded[j]
            square += gap * gap
        error_R[r] = np.sqrt(square)


@_inlined
def _append_flagged(eight, out_token, place):
    """Columns whose flag is set, in order; flags are looked at eight at a time. Returns the next free place."""
    ones = np.uint64(0x0101010101010101)
    for w in range(eight.shape[0]):
        left = eight[w]
        while left != 0:
            # the lowest flag of eight; the bytes below it are counted by a product of ones
            below = (left & (~left + np.uint64(1))) - np.uint64(1)
            out_token[place] = 8 * w + np.int64(((below & ones) * ones) >> np.uint64(56))
            place += 1
            left &= left - np.uint64(1)
    return place


def _flag_bf16(screen_FB, row, first, last, scale, base, slope, delta_B, margin_B, bits, value, flag):
    """flag_j = the bound does not exclude column j of the row (screen values are the bits of bf16 numbers)."""
    rounding = np.float32(2.0**-8)
    for j in range(np.uint64(first), np.uint64(last)):
        bits[j] = np.uint32(screen_FB[row, j]) << np.uint32(16)
    for j in range(np.uint64(first), np.uint64(last)):
        bound = scale * (base + slope * delta_B[j] - margin_B[j])
        flag[j] = not (value[j] + rounding * abs(value[j]) <= bound)


def _flag_fp32(screen_FB, row, first, last, scale, base, slope, delta_B, margin_B, bits, value, flag):
    for j in range(np.uint64(first), np.uint64(last)):
        flag[j] = not (screen_FB[row, j] <= scale * (base + slope * delta_B[j] - margin_B[j]))


def _flag(screen_FB, row, first, last, scale, base, slope, delta_B, margin_B, bits, value, flag):
    """`_flag_fp32` or `_flag_bf16`, by what the screen's values are."""
    raise NotImplementedError


@overload(_flag, inline="always")
def _flag_of(screen_FB, row, first, last, scale, base, slope, delta_B, margin_B, bits, value, flag):
    return _flag_fp32 if screen_FB.dtype == numba.types.float32 else _flag_bf16


@compile_loop
def find(
    part, n_parts, screen_FB, first_feature, scale_R, edge_N1, base_NF, slope_NF, delta_B, margin_B,
    out_token, count_F, start, stop,
):  # fmt: skip
    """Columns that the bound does not exclude, row by row, into this part's share of out_token[start : stop].

    count_F gets their number per feature. Returns that of the part, or −1 when they do not fit.
    """
    room = (stop - start) // n_parts
    begin = start + room * part
    place, limit = begin, begin + room
    n_columns = screen_FB.shape[1]
    first, last = _range(part, n_parts, screen_FB.shape[0])
    bits = np.empty(n_columns, np.uint32)
    value = bits.view(np.float32)
    flag = np.zeros((n_columns + 7) // 8 * 8, np.uint8)
    eight = flag.view(np.uint64)
    for row in range(first, last):
        if limit - place < n_columns:
            return -1
        before = place
        for n in range(edge_N1.shape[0] - 1):
            _flag(
                screen_FB, row, edge_N1[n], edge_N1[n + 1], scale_R[row], base_NF[n, row], slope_NF[n, row],
                delta_B, margin_B, bits, value, flag,
            )  # fmt: skip
        place = _append_flagged(eight, out_token, place)
        count_F[first_feature + row] = place - before
    return place - begin


def _flag_level_bf16(screen_FB, row, first, last, limit, bits, value, flag):
    """flag_j = not (κ̃ + 2⁻⁸|κ̃| ≤ limit); screen values are the bits of bf16 numbers, as int16.

    For a limit ≥ 0 it is enough that κ̃ ≤ limit / (1 + 2⁻⁸), and the bits of two bf16 numbers, one of them ≥ 0, are in
    the numbers' order: one comparison of 16-bit integers, sixteen or more at a time.
    """
    if limit >= 0:
        # 0.99609 < 1 / (1 + 2⁻⁸) by more than the product's rounding; cutting bits off rounds down
        value[0] = limit * np.float32(0.99609)
        top = np.int16(bits[0] >> np.int32(16))
        for j in range(np.uint64(first), np.uint64(last)):
            flag[j] = screen_FB[row, j] > top
    else:
        rounding = np.float32(2.0**-8)
        for j in range(np.uint64(first), np.uint64(last)):
            bits[j] = np.int32(screen_FB[row, j]) << np.int32(16)
        for j in range(np.uint64(first), np.uint64(last)):
            flag[j] = not (value[j] + rounding * abs(value[j]) <= limit)


def _flag_level_fp32(screen_FB, row, first, last, limit, bits, value, flag):
    for j in range(np.uint64(first), np.uint64(last)):
        flag[j] = not (screen_FB[row, j] <= limit)


def _flag_level(screen_FB, row, first, last, limit, bits, value, flag):
    """`_flag_level_fp32` or `_flag_level_bf16`, by what the screen's values are."""
    raise NotImplementedError


@overload(_flag_level, inline="always")
def _flag_level_of(screen_FB, row, first, last, limit, bits, value, flag):
    return _flag_level_fp32 if screen_FB.dtype == numba.types.float32 else _flag_level_bf16


@compile_loop
def find_level(
    part, n_parts, screen_FB, first_feature, scale_R, edge_N1, base_NF, slope_NF, delta_N, margin_N,
    out_token, count_F, start, stop,
):  # fmt: skip
    """`find` where one bound serves all columns of a bin."""
    room = (stop - start) // n_parts
    begin = start + room * part
    place, limit = begin, begin + room
    n_columns = screen_FB.shape[1]
    first, last = _range(part, n_parts, screen_FB.shape[0])
    bits = np.empty(n_columns, np.int32)
    value = bits.view(np.float32)
    flag = np.zeros((n_columns + 7) // 8 * 8, np.uint8)
    eight = flag.view(np.uint64)
    for row in range(first, last):
        if limit - place < n_columns:
            return -1
        before = place
        for n in range(edge_N1.shape[0] - 1):
            bound = scale_R[row] * (base_NF[n, row] + slope_NF[n, row] * delta_N[n] - margin_N[n])
            _flag_level(screen_FB, row, edge_N1[n], edge_N1[n + 1], bound, bits, value, flag)
        place = _append_flagged(eight, out_token, place)
        count_F[first_feature + row] = place - before
    return place - begin


@compile_loop
def rescore(
    part, n_parts, n_rows, first_feature, position_B, z_BD, rows_FD, live_B, threshold_F, floor_B, mode, sigma_B,
    log_r_B, exponent_F, log_gain_F, norm_F, unit_row, bias_F, out_token, out_dot, out_score, count_F, start, stop,
):  # fmt: skip
    """Exact scores of what `find` left in this part's share; those above their threshold stay, moved together."""
    read = start + (stop - start) // n_parts * part
    begin = place = read
    token_4, dot_4 = np.empty(4, np.int64), np.empty(4, np.float32)
    first, last = _range(part, n_parts, n_rows)
    for i in range(first_feature + first, first_feature + last):
        before, threshold, norm, bias = place, threshold_F[i], np.float32(1.0), bias_F[i]
        power, gain = np.float32(0.0), np.float32(0.0)
        if unit_row:
            norm = norm_F[i]
        if mode == 2:
            power, gain = exponent_F[i] - np.float32(1.0), log_gain_F[i]
        left = count_F[i]
        while left > 0:
            # always four at a time, the last one again where they end: every dot is summed in the same order
            some = min(left, 4)
            for q in range(4):
                token_4[q] = position_B[out_token[read + min(q, some - 1)]]
            dot_4[0], dot_4[1], dot_4[2], dot_4[3] = _four_dots(
                rows_FD, i, z_BD, token_4[0], token_4[1], token_4[2], token_4[3]
            )
            read += some
            left -= some
            for q in range(some):
                token, score = token_4[q], dot_4[q]
                if mode == 1:
                    score = score * sigma_B[token]
                elif mode == 2:
                    score = score * np.exp(gain + power * log_r_B[token])
                score = score / norm + bias
                if score > threshold and score > floor_B[token] and live_B[token]:
                    out_token[place], out_dot[place], out_score[place] = token, dot_4[q], score
                    place += 1
        count_F[i] = place - before
    return place - begin


@compile_loop
def scan(part, n_parts, screen_FB, first_feature, limits, exact, out_token, out_dot, out_score, count_F, start, stop):
    """`find`, then `rescore`, without meeting the other parts between them; −1 where what is found does not fit."""
    if find(part, n_parts, screen_FB, first_feature, *limits, out_token, count_F, start, stop) < 0:
        return -1
    outs = (out_token, out_dot, out_score)
    return rescore(part, n_parts, screen_FB.shape[0], first_feature, *exact, *outs, count_F, start, stop)


@compile_loop
def scan_level(
    part, n_parts, screen_FB, first_feature, limits, exact, out_token, out_dot, out_score, count_F, start, stop
):
    """The same with `find_level`."""
    if find_level(part, n_parts, screen_FB, first_feature, *limits, out_token, count_F, start, stop) < 0:
        return -1
    outs = (out_token, out_dot, out_score)
    return rescore(part, n_parts, screen_FB.shape[0], first_feature, *exact, *outs, count_F, start, stop)


@compile_loop
def keep_and_sort(
    part, n_parts, token_S, dot_S, score_S, count_F, lowest, last_flat, n_tokens, token_E, feature_E, dot_E,
    order_E, offset_F1,
):  # fmt: skip
    """Of feature-major survivors keep those above `lowest`, or equal to it with flat index ≤ last_flat; token-major.

    Returns the number kept (the outputs' size). Every part looks at all survivors and writes its own tokens' entries.
    """
    n_features = count_F.shape[0]
    first, last = _range(part, n_parts, n_tokens)
    place_B = np.zeros(n_tokens + 1, np.int64)
    s = 0
    for i in range(n_features):
        for _ in range(count_F[i]):
            score, token = score_S[s], token_S[s]
            if score > lowest or (score == lowest and token * n_features + i <= last_flat):
                place_B[token + 1] += 1
            s += 1
    for b in range(n_tokens):
        place_B[b + 1] += place_B[b]
    s, kept = 0, 0
    for i in range(n_features):
        if part == 0:
            offset_F1[i] = kept
        for _ in range(count_F[i]):
            score, token = score_S[s], token_S[s]
            if score > lowest or (score == lowest and token * n_features + i <= last_flat):
                if first <= token < last:
                    e = place_B[token]
                    place_B[token] = e + 1
                    token_E[e] = token
                    feature_E[e] = i
                    dot_E[e] = dot_S[s]
                    order_E[kept] = e
                kept += 1
            s += 1
    if part == 0:
        offset_F1[n_features] = kept
    return kept


@compile_loop
def group_by_feature(feature_E, offset_F1, order_E):
    """Counting sort of token-major entries by feature; stable."""
    n_features = offset_F1.shape[0] - 1
    offset_F1[:] = 0
    for e in range(feature_E.shape[0]):
        offset_F1[feature_E[e] + 1] += 1
    for i in range(n_features):
        offset_F1[i + 1] += offset_F1[i]
    place_F = offset_F1[:-1].copy()
    for e in range(feature_E.shape[0]):
        i = feature_E[e]
        order_E[place_F[i]] = e
        place_F[i] += 1


@compile_loop
def entry_dots(part, n_parts, x_BD, rows_FD, token_E, order_E, offset_F1, dot_E):
    """dot_e = ⟨x_token, rows_feature⟩, in the order of `rescore`."""
    first, last = _feature_range(part, n_parts, offset_F1, 1)
    for i in range(first, last):
        end = offset_F1[i + 1]
        for s in range(offset_F1[i], end, 4):
            e0, e1 = order_E[s], order_E[min(s + 1, end - 1)]
            e2, e3 = order_E[min(s + 2, end - 1)], order_E[min(s + 3, end - 1)]
            dot_E[e0], dot_E[e1], dot_E[e2], dot_E[e3] = _four_dots(
                rows_FD, i, x_BD, token_E[e0], token_E[e1], token_E[e2], token_E[e3]
            )


@compile_loop
def token_sums(part, n_parts, value_E, rows_FD, feature_E, offset_B1, entry_E, stride, out_BD):
    """out_b = Σ over its entries of value · rows_feature; entry_E = 0, 1, 2 …

    `stride` features at a time for all tokens, so that their rows stay in the cache while tokens read them.
    """
    first, last = _range(part, n_parts, out_BD.shape[0])
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
    first, last = _range(part, n_parts, out_S.shape[0])
    for s in range(first, last):
        total = 0.0
        for e in range(offset_S1[s], offset_S1[s + 1]):
            total += value_E[order_E[e]]
        out_S[s] = total


@compile_loop
def squared_errors(part, n_parts, x_BD, y_BD, error_B):
    """error_b = |x_b − y_b|²."""
    first, last = _range(part, n_parts, x_BD.shape[0])
    for b in range(first, last):
        total = np.float32(0.0)
        for j in range(x_BD.shape[1]):
            gap = x_BD[b, j] - y_BD[b, j]
            total += gap * gap
        error_B[b] = total


@compile_loop
def scaled_gaps(part, n_parts, x_BD, y_BD, scale_B, out_BD):
    """out_b = scale_b · (x_b − y_b)."""
    first, last = _range(part, n_parts, x_BD.shape[0])
    for b in range(first, last):
        scale = scale_B[b]
        for j in range(x_BD.shape[1]):
            out_BD[b, j] = scale * (x_BD[b, j] - y_BD[b, j])
