"""The compiled loops themselves. Imported only where numba is installed; see `native` for how they are run.

Arrays: fp32 unless said otherwise, C-contiguous. Entries come feature-major here: `order_E` lists entry positions
feature by feature, those of feature i at offset_F1[i] : offset_F1[i + 1].
"""
# mypy: ignore-errors

from __future__ import annotations

import numba
import numpy as np

# Sums may be taken in vector lanes (reassoc), multiply-adds may be fused (contract); NaN and Inf keep their meaning.
_SUMS = {"reassoc", "contract"}
_BLOCK = 32


def _loop(function):
    return numba.njit(nogil=True, cache=True, boundscheck=False)(function)


@numba.njit(nogil=True, cache=True, fastmath=_SUMS, boundscheck=False)
def _dot(x, y):
    total = np.float32(0.0)
    for j in range(x.shape[0]):
        total += x[j] * y[j]
    return total


@numba.njit(nogil=True, cache=True, fastmath=_SUMS, boundscheck=False)
def _add_scaled(out, scale, x):
    for j in range(out.shape[0]):
        out[j] += scale * x[j]


@numba.njit(nogil=True, cache=True, fastmath=_SUMS, boundscheck=False)
def _dot_and_add(out, scale, x, y):
    """out += scale · x, returning ⟨x, y⟩: one read of x for both."""
    total = np.float32(0.0)
    for j in range(out.shape[0]):
        value = x[j]
        total += value * y[j]
        out[j] += scale * value
    return total


@_loop
def _range(part, n_parts, size):
    return size * part // n_parts, size * (part + 1) // n_parts


@_loop
def _feature_range(part, n_parts, offset_F1):
    """Features of one part, such that parts hold about as many entries and rows."""
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
        bounds[side] = low
    return bounds[0], bounds[1]


@numba.njit(nogil=True, cache=True, fastmath=_SUMS, boundscheck=False)
def unit_rows_bf16(part, n_parts, x_RD, norm_floor, unit_RD, norm_R, error_R):
    """unit = bf16 bits of x / max(|x|, floor); norm that divisor; error |unit − x / norm|."""
    first, last = _range(part, n_parts, x_RD.shape[0])
    width = x_RD.shape[1]
    exact = np.empty(width, np.float32)
    exact_bits = exact.view(np.uint32)
    rounded_bits = np.empty(width, np.uint32)
    rounded = rounded_bits.view(np.float32)
    for r in range(first, last):
        square = np.float32(0.0)
        for j in range(width):
            square += x_RD[r, j] * x_RD[r, j]
        norm = max(np.sqrt(square), norm_floor)
        norm_R[r] = norm
        inverse = np.float32(1.0) / norm
        for j in range(width):
            exact[j] = x_RD[r, j] * inverse
        for j in range(width):
            bits = exact_bits[j]
            high = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            unit_RD[r, j] = np.uint16(high)
            rounded_bits[j] = high << np.uint32(16)
        square = np.float32(0.0)
        for j in range(width):
            gap = exact[j] - rounded[j]
            square += gap * gap
        error_R[r] = np.sqrt(square)


@_loop
def _exact_score(dot, i, token, mode, sigma_B, log_r_B, exponent_F, log_gain_F, norm_F, unit_row, bias_F):
    score = dot
    if mode == 1:
        score = score * sigma_B[token]
    elif mode == 2:
        score = score * np.exp(log_gain_F[i] + (exponent_F[i] - np.float32(1.0)) * log_r_B[token])
    if unit_row:
        score = score / norm_F[i]
    return score + bias_F[i]


def _make_scan(is_bf16):
    @_loop
    def scan(
        part, n_parts, screen_FB, first_feature, position_B, edge_N1, base_NF, slope_NF, delta_B, margin_B,
        z_BD, rows_FD, live_B, threshold_F, mode, sigma_B, log_r_B, exponent_F, log_gain_F, norm_F, unit_row, bias_F,
        out_token, out_dot, out_score, count_F, start, stop,
    ):  # fmt: skip
        """Survivors of the screen in one chunk, re-scored exactly; those above their threshold are appended.

        Returns how many were written to out_*[start : stop] of this part's share, or −1 when they did not fit.
        """
        room = (stop - start) // n_parts
        place = start + room * part
        limit = place + room
        begin = place
        first, last = _range(part, n_parts, screen_FB.shape[0])
        bits = np.empty(_BLOCK, np.uint32)
        value = bits.view(np.float32)
        rounding = np.float32(2.0**-8)
        for row in range(first, last):
            i = first_feature + row
            before = place
            weight = rows_FD[i]
            for n in range(edge_N1.shape[0] - 1):
                base, slope = base_NF[n, row], slope_NF[n, row]
                block = edge_N1[n]
                while block < edge_N1[n + 1]:
                    size = min(_BLOCK, edge_N1[n + 1] - block)
                    if is_bf16:
                        for j in range(size):
                            bits[j] = np.uint32(screen_FB[row, block + j]) << np.uint32(16)
                        for j in range(size):
                            value[j] = value[j] + rounding * abs(value[j])
                    else:
                        for j in range(size):
                            value[j] = screen_FB[row, block + j]
                    hits = 0
                    for j in range(size):
                        hits += not (value[j] <= base + slope * delta_B[block + j] - margin_B[block + j])
                    if hits > 0:
                        for j in range(size):
                            if not (value[j] <= base + slope * delta_B[block + j] - margin_B[block + j]):
                                token = position_B[block + j]
                                if live_B[token]:
                                    dot = _dot(weight, z_BD[token])
                                    score = _exact_score(
                                        dot, i, token, mode, sigma_B, log_r_B, exponent_F, log_gain_F, norm_F,
                                        unit_row, bias_F,
                                    )  # fmt: skip
                                    if score > threshold_F[i]:
                                        if place == limit:
                                            return -1
                                        out_token[place] = token
                                        out_dot[place] = dot
                                        out_score[place] = score
                                        place += 1
                    block += size
            count_F[i] = place - before
        return place - begin

    return scan


scan_bf16 = _make_scan(True)
scan_fp32 = _make_scan(False)


@_loop
def keep_and_sort(token_S, dot_S, score_S, count_F, lowest, last_flat, n_tokens, token_E, feature_E, dot_E,
                  order_E, offset_F1):  # fmt: skip
    """Of feature-major survivors keep those above `lowest`, or equal to it with flat index ≤ last_flat; token-major.

    Returns the number kept (the outputs' size).
    """
    n_features = count_F.shape[0]
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
        offset_F1[i] = kept
        for _ in range(count_F[i]):
            score, token = score_S[s], token_S[s]
            if score > lowest or (score == lowest and token * n_features + i <= last_flat):
                e = place_B[token]
                place_B[token] = e + 1
                token_E[e] = token
                feature_E[e] = i
                dot_E[e] = dot_S[s]
                order_E[kept] = e
                kept += 1
            s += 1
    offset_F1[n_features] = kept
    return kept


@_loop
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


@_loop
def entry_dots(part, n_parts, x_BD, rows_FD, token_E, order_E, offset_F1, dot_E):
    """dot_e = ⟨x_token, rows_feature⟩."""
    first, last = _feature_range(part, n_parts, offset_F1)
    for i in range(first, last):
        for s in range(offset_F1[i], offset_F1[i + 1]):
            e = order_E[s]
            dot_E[e] = _dot(rows_FD[i], x_BD[token_E[e]])


@_loop
def token_sums(part, n_parts, value_E, rows_FD, feature_E, offset_B1, out_BD):
    """out_b = Σ over its entries of value · rows_feature."""
    first, last = _range(part, n_parts, out_BD.shape[0])
    for b in range(first, last):
        out_BD[b] = np.float32(0.0)
        for e in range(offset_B1[b], offset_B1[b + 1]):
            _add_scaled(out_BD[b], value_E[e], rows_FD[feature_E[e]])


@_loop
def feature_sums(part, n_parts, value_E, x_BD, token_E, order_E, offset_F1, pull_F, rows_FD, out_FD):
    """out_i = Σ over its entries of value · x_token, plus pull_i · rows_i."""
    first, last = _feature_range(part, n_parts, offset_F1)
    for i in range(first, last):
        out_FD[i] = np.float32(0.0)
        if pull_F[i] != 0.0:
            _add_scaled(out_FD[i], pull_F[i], rows_FD[i])
        for s in range(offset_F1[i], offset_F1[i + 1]):
            e = order_E[s]
            _add_scaled(out_FD[i], value_E[e], x_BD[token_E[e]])


@_loop
def feature_sums_and_dots(part, n_parts, value_E, x_BD, token_E, order_E, offset_F1, rows_FD, out_FD, dot_E):
    """feature_sums and entry_dots in one read of x."""
    first, last = _feature_range(part, n_parts, offset_F1)
    for i in range(first, last):
        out_FD[i] = np.float32(0.0)
        for s in range(offset_F1[i], offset_F1[i + 1]):
            e = order_E[s]
            dot_E[e] = _dot_and_add(out_FD[i], value_E[e], x_BD[token_E[e]], rows_FD[i])
