"""The search's loops: rows rounded, columns compared with their bounds, survivors scored, kept and sorted."""
# mypy: ignore-errors

from __future__ import annotations

import numba
import numpy as np
from numba.extending import overload

from cosae.kernels.cpu.loops.shared import compile_loop, four_dots, inlined, row_norm, share


@compile_loop
def row_norms(part, n_parts, x_RD, floor, norm_R):
    """norm = max(|x|, floor) of each row."""
    first, last = share(part, n_parts, x_RD.shape[0])
    for r in range(first, last):
        norm_R[r] = row_norm(x_RD, r, floor)


@compile_loop
def round_rows_bf16(part, n_parts, x_RD, place_R, by_R, short_RD, error_R):
    """short = bf16 bits of by · x[place]; error |short − by · x[place]|."""
    first, last = share(part, n_parts, x_RD.shape[0])
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


@compile_loop
def round_rows_int8(part, n_parts, x_RD, place_R, by_R, short_RD, error_R, step_R):
    """short = by · x[place] in whole steps; step = largest coordinate / 127; error |step · short − by · x[place]|.

    Where no coordinate reaches 1e-30 (`screen.STEP_MIN`) short is 0 and step 1.
    """
    first, last = share(part, n_parts, x_RD.shape[0])
    width = x_RD.shape[1]
    exact, whole = np.empty(width, np.float32), np.empty(width, np.float32)
    most = np.float32(127.0)
    for r in range(first, last):
        place, by = place_R[r], by_R[r]
        top = np.float32(0.0)
        for j in range(width):
            value = x_RD[place, j] * by
            exact[j] = value
            top = max(top, abs(value))
        step, inverse = np.float32(1.0), np.float32(0.0)
        if top >= np.float32(1e-30):
            step, inverse = top / most, most / top
        square = np.float32(0.0)
        for j in range(width):
            value = np.rint(exact[j] * inverse)
            whole[j] = min(max(value, -most), most)
        for j in range(width):
            short_RD[r, j] = np.int8(whole[j])
            gap = exact[j] - whole[j] * step
            square += gap * gap
        error_R[r], step_R[r] = np.sqrt(square), step


@inlined
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


def _flag_fp32(screen_FB, row, first, last, level, scale, base, slope, unit, delta, margin, n, bits, value, flag):
    if level:
        bound = scale * (base * unit[n] + slope * delta[n] - margin[n])
        for j in range(np.uint64(first), np.uint64(last)):
            flag[j] = not (screen_FB[row, j] <= bound)
    else:
        for j in range(np.uint64(first), np.uint64(last)):
            flag[j] = not (screen_FB[row, j] <= scale * (base * unit[j] + slope * delta[j] - margin[j]))


def _flag_bf16(screen_FB, row, first, last, level, scale, base, slope, unit, delta, margin, n, bits, value, flag):
    """Screen values are the bits of bf16 numbers, as int16: κ̃ + 2⁻⁸|κ̃| is what must not exceed the bound.

    For one bound ≥ 0 it is enough that κ̃ ≤ bound / (1 + 2⁻⁸), and the bits of two bf16 numbers, one of them ≥ 0, are in
    the numbers' order: one comparison of 16-bit integers, sixteen or more at a time.
    """
    rounding, bound = np.float32(2.0**-8), np.float32(0.0)
    if level:
        bound = scale * (base * unit[n] + slope * delta[n] - margin[n])
    if level and bound >= 0:
        # 0.99609 < 1 / (1 + 2⁻⁸) by more than the product's rounding; cutting bits off rounds down
        value[0] = bound * np.float32(0.99609)
        top = np.int16(bits[0] >> np.int32(16))
        for j in range(np.uint64(first), np.uint64(last)):
            flag[j] = screen_FB[row, j] > top
    else:
        for j in range(np.uint64(first), np.uint64(last)):
            bits[j] = np.int32(screen_FB[row, j]) << np.int32(16)
        if level:
            for j in range(np.uint64(first), np.uint64(last)):
                flag[j] = not (value[j] + rounding * abs(value[j]) <= bound)
        else:
            for j in range(np.uint64(first), np.uint64(last)):
                limit = scale * (base * unit[j] + slope * delta[j] - margin[j])
                flag[j] = not (value[j] + rounding * abs(value[j]) <= limit)


def _flag_int8(screen_FB, row, first, last, level, scale, base, slope, unit, delta, margin, n, bits, value, flag):
    """Products of whole steps; one bound a column (`screen`, int8)."""
    for j in range(np.uint64(first), np.uint64(last)):
        limit = scale * (base * unit[j] + slope * delta[j] - margin[j])
        flag[j] = not (np.float32(screen_FB[row, j]) <= limit)


def _flag(screen_FB, row, first, last, level, scale, base, slope, unit, delta, margin, n, bits, value, flag):
    """flag_j = the bound of bin n does not exclude column j; by what the screen holds."""
    raise NotImplementedError


@overload(_flag, inline="always")
def _flag_of(screen_FB, row, first, last, level, scale, base, slope, unit, delta, margin, n, bits, value, flag):
    if screen_FB.dtype == numba.types.float32:
        return _flag_fp32
    return _flag_int8 if screen_FB.dtype == numba.types.int32 else _flag_bf16


@inlined
def _find_row(screen_FB, row, level, scale, edge_N1, base_NF, slope_NF, unit, delta, margin, bits, value, flag, found):
    """Columns of one row that the bound does not exclude, in order, into `found`; returns their number."""
    for n in range(edge_N1.shape[0] - 1):
        _flag(
            screen_FB, row, edge_N1[n], edge_N1[n + 1], level, scale, base_NF[n, row], slope_NF[n, row],
            unit, delta, margin, n, bits, value, flag,
        )  # fmt: skip
    return _append_flagged(flag.view(np.uint64), found, 0)


@compile_loop
def scan(
    part, n_parts, screen_FB, first_feature, level, limits, exact, out_token, out_dot, out_score, count_F, start, stop
):
    """Entries of a chunk above their threshold, row by row, into this part's share of the outputs [start : stop).

    Columns that the bound does not exclude (`_find_row`; with `level` unit, delta and margin are one number a bin, else
    one a column) get their exact scores (`_score_row`). count_F gets the entries of each feature. Returns their number
    in this part, or −1 where they do not fit; and how many exact scores were taken.
    """
    scale_R, edge_N1, base_NF, slope_NF, unit, delta, margin = limits
    room = (stop - start) // n_parts
    begin = start + room * part
    place, limit, tested = begin, begin + room, 0
    n_columns = screen_FB.shape[1]
    first, last = share(part, n_parts, screen_FB.shape[0])
    bits = np.empty(n_columns, np.int32)
    value = bits.view(np.float32)
    flag = np.zeros((n_columns + 7) // 8 * 8, np.uint8)
    found = np.empty(n_columns, np.int64)
    for row in range(first, last):
        n_found = _find_row(
            screen_FB, row, level, scale_R[row], edge_N1, base_NF, slope_NF, unit, delta, margin, bits, value, flag,
            found,
        )  # fmt: skip
        tested += n_found
        if limit - place < n_found:
            return -1, tested
        count = _score_row(first_feature + row, n_found, found, exact, out_token, out_dot, out_score, place)
        count_F[first_feature + row] = count
        place += count
    return place - begin, tested


@inlined
def _score_row(i, n_found, found, exact, out_token, out_dot, out_score, begin):
    """Exact scores of the columns found of feature i; those above their threshold are written. Returns their number."""
    (
        position_B, z_BD, rows_FD, live_B, threshold_F, floor_B, mode, sigma_B, log_r_B, exponent_F, log_gain_F,
        norm_F, unit_row, bias_F,
    ) = exact  # fmt: skip
    token_4, dot_4 = np.empty(4, np.int64), np.empty(4, np.float32)
    place, threshold, norm, bias = begin, threshold_F[i], np.float32(1.0), bias_F[i]
    power, gain = np.float32(0.0), np.float32(0.0)
    if unit_row:
        norm = norm_F[i]
    if mode == 2:
        power, gain = exponent_F[i] - np.float32(1.0), log_gain_F[i]
    for read in range(0, n_found, 4):
        # always four at a time, the last one again where they end: every dot is summed in the same order
        some = min(n_found - read, 4)
        for q in range(4):
            token_4[q] = position_B[found[read + min(q, some - 1)]]
        dot_4[0], dot_4[1], dot_4[2], dot_4[3] = four_dots(
            rows_FD, i, z_BD, token_4[0], token_4[1], token_4[2], token_4[3]
        )
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
    return place - begin


@compile_loop
def keep_and_sort(
    part, n_parts, token_S, dot_S, score_S, count_F, lowest, last_flat, n_tokens, token_E, feature_E, dot_E,
    order_E, offset_F1,
):  # fmt: skip
    """Of feature-major survivors keep those above `lowest`, or equal to it with flat index ≤ last_flat; token-major.

    Returns the number kept (the outputs' size). Every part looks at all survivors and writes its own tokens' entries.
    """
    n_features = count_F.shape[0]
    first, last = share(part, n_parts, n_tokens)
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
