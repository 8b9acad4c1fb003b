"""Products of two SAEs' codes, summed over tokens; `cosae.browse.collect.cofiring` says what they are for.

a by feature: value_E and token_E, those of feature f at offset_F1[f] : offset_F1[f + 1].
"""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from cosae.kernels.cpu.loops.shared import compile_loop, share


@compile_loop
def products(part, n_parts, value_E, token_E, offset_F1, other_value_E, other_E, other_offset_N1, first, out_PG):
    """out_pg = Σ over tokens of f_{first + p} · g, for all g; b by token."""
    low, high = share(part, n_parts, out_PG.shape[0])
    for p in range(low, high):
        for g in range(out_PG.shape[1]):
            out_PG[p, g] = np.float32(0.0)
        for e in range(offset_F1[first + p], offset_F1[first + p + 1]):
            value, token = value_E[e], token_E[e]
            for o in range(other_offset_N1[token], other_offset_N1[token + 1]):
                out_PG[p, other_E[o]] += value * other_value_E[o]


@compile_loop
def pair_sums(
    part, n_parts, value_E, token_E, offset_F1, other_value_E, other_token_E, other_offset_G1, i_P, j_P, line_N, out_P
):  # fmt: skip
    """out_p = Σ over tokens of f_{i_p} · g_{j_p}, i ascending; b by feature, too. line_N: zeros, and zeros again."""
    for p in range(len(i_P)):
        i, j = i_P[p], j_P[p]
        if p == 0 or i != i_P[p - 1]:
            for e in range(offset_F1[i], offset_F1[i + 1]):
                line_N[token_E[e]] = value_E[e]
        total = 0.0
        for o in range(other_offset_G1[j], other_offset_G1[j + 1]):
            total += line_N[other_token_E[o]] * other_value_E[o]
        out_P[p] = total
        if p + 1 == len(i_P) or i != i_P[p + 1]:
            for e in range(offset_F1[i], offset_F1[i + 1]):
                line_N[token_E[e]] = np.float32(0.0)
