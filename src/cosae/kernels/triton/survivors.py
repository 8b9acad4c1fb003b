"""Survivors by Triton: one tiled product whose epilogue appends what passes its threshold; exact scores follow.

No (B, F) tensor is made: the product's tile is compared in registers, and pairs that the bound does not exclude are
appended through an atomic counter into a buffer of bounded room. The counter goes on counting where the room ends,
which is how an overflow is seen; the appended pairs are in no repeatable order, and are sorted before anything else.

**Bound.** As in `screen`: s > t ⇔ κ > θ_bi = (t − β_i)·exp(−g_i − a_i l_b)·|w_i|^{−u}. Here no line stands in for θ:
the epilogue computes θ = ±2^(power_i + slope_i·l_b), power_i = (ln|t − β_i| − g_i − u ln|w_i|)/ln 2 (float64, rounded
once), slope_i = −a_i/ln 2. `unserved` keeps every term of that sum below 2⁹ in size, and the sum of two of them that
matters (|θ| ≤ 1.1, so it is ≤ 0.14) below that; at most eight roundings err by 2⁻¹⁶ each, that is by less than
8·2⁻¹⁶·ln 2 < 9e-5 relative in θ, 2^x itself by 2⁻²¹. Where |θ| > 1.1 the comparison is decided either way.

**Errors of κ.** With e_z, e_w the known rounding vectors of the unit vectors (0 for an fp32 product) the product errs
by |e_z| + (1 + 2⁻⁸)|e_w| (Cauchy–Schwarz, `screen`). Tensor cores add bf16 products in fp32 but may truncate where
they align: up to one unit in the last place a step, not half, and two steps a term (into the group, into the
accumulator), so the accumulation errs by at most d·2⁻²² on unit vectors; the exact fp32 re-scoring by d·2⁻²³. The
product stays in fp32 and is never rounded to bf16. Together

    margin_b = |e_z,b| + slack,   loss_i = 1.01 |e_w,i|,   slack = 3 (d + 32)·2⁻²³ + 2e-4

and a pair survives when not (κ̃ ≤ θ − margin_b − loss_i): a NaN survives, and its exact score decides.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from cosae.kernels.select import screen
from cosae.kernels.select.survivors import Survivors, exact_scores
from cosae.kernels.terms import R_MIN, ROW_MIN, ScoreTerms
from cosae.kernels.triton import loops as triton_loops
from cosae.kernels.triton import rows as triton_rows
from cosae.kernels.triton.sums import dots

TILE = (128, 128, 64)
"""Features, tokens and columns of one tile of the product on a GPU."""
SMALL_TILE = (32, 32, 16)
"""The same in the interpreter, whose tests use odd small shapes."""
GROUP = 8
"""Feature tiles walked together."""
WARPS, STAGES = 8, 3


def screen_dtype(device: torch.device) -> torch.dtype:
    """bf16 where tensor cores multiply it (compute capability 8.0 on) and in the interpreter, else fp32."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float32


def unserved(terms: ScoreTerms) -> str | None:
    """Why these kernels cannot serve these terms, or None where they can."""
    if terms.n_tokens * terms.n_features >= 2**62:
        return "there are more scores than an int64 counts"
    return screen.unserved_numbers(terms)


def _powers(terms: ScoreTerms, threshold_F: Tensor, norm_F: Tensor, floor_B: Tensor | None) -> tuple[Tensor, ...]:
    """sign, power and slope (F,) of θ; with floors of tokens the epilogue adds ln|t − β| itself."""
    n = terms.n_features
    log_F = -terms.log_gain.double().expand(n)
    if terms.row_power == 1:
        log_F = log_F - norm_F.double().log()
    lift_F = threshold_F.double() if terms.bias_F is None else threshold_F.double() - terms.bias_F.double()
    if floor_B is None:
        log_F = torch.where(lift_F == 0, 0.0, log_F + lift_F.abs().log())
    slope_F = (-terms.exponent.double().expand(n) / math.log(2)).float().contiguous()
    return lift_F.sign().float(), (log_F / math.log(2)).float(), slope_F


def survivors(terms: ScoreTerms, threshold_F: Tensor, room: int, floor_B: Tensor | None = None) -> Survivors | None:
    """Every live entry with s > threshold_F and s > floor_B; None where more than `room` pass the screen."""
    terms = replace(terms, z_BD=terms.z_BD.contiguous(), rows_FD=terms.rows_FD.contiguous())
    dtype = screen_dtype(terms.z_BD.device)
    tokens = triton_rows.unit_rows(terms.z_BD, R_MIN, dtype)
    rows = triton_rows.prepared(terms.cache, terms.rows_FD, dtype) or triton_rows.unit_rows(
        terms.rows_FD, ROW_MIN, dtype
    )
    log_r_B = tokens.norm_R.log()
    slack = 3.0 * (terms.z_BD.shape[1] + 32) * 2.0**-23 + 2e-4
    # a masked token's bound is +inf: nothing of it passes
    margin_B = torch.where(terms.live_B, tokens.error_R + slack, -torch.inf)
    sign_F, power_F, slope_F = _powers(terms, threshold_F, rows.norm_R, floor_B)
    bias_F = torch.zeros_like(threshold_F) if terms.bias_F is None else terms.bias_F.contiguous()
    floors = log_r_B if floor_B is None else floor_B.contiguous()
    bounds = (sign_F, power_F, slope_F, 1.01 * rows.error_R, threshold_F, bias_F, log_r_B, margin_B, floors)
    key = _append(rows.unit_RD, tokens.unit_RD, bounds, room, floor_B is not None)
    if key is None:
        return None
    key_S = key.sort().values
    feature_S = key_S // terms.n_tokens
    token_S = key_S - feature_S * terms.n_tokens
    dot_S = dots(terms.z_BD, terms.rows_FD, token_S, feature_S)
    score_S = exact_scores(terms, dot_S, token_S, feature_S, log_r_B, rows.norm_R)
    keep_S = (score_S > threshold_F[feature_S]) & terms.live_B[token_S]
    if floor_B is not None:
        keep_S &= score_S > floor_B[token_S]
    keep = keep_S.nonzero()[:, 0]
    feature_S = feature_S[keep]
    edge_F1 = torch.arange(terms.n_features + 1, device=key_S.device)
    count_F = torch.searchsorted(feature_S, edge_F1).diff()
    return Survivors(token_S[keep], dot_S[keep], score_S[keep], count_F, log_r_B, rows.norm_R)


def _append(unit_FD: Tensor, unit_BD: Tensor, bounds: tuple[Tensor, ...], room: int, floor: bool) -> Tensor | None:
    """Keys feature · B + token of the pairs that pass, in no order; None where they are more than `room`."""
    (n_features, width), n_tokens = unit_FD.shape, len(unit_BD)
    real = unit_FD.device.type == "cuda"
    block_f, block_b, block_d = TILE if real else SMALL_TILE
    key = torch.empty(room, dtype=torch.int64, device=unit_FD.device)
    counter = torch.zeros(1, dtype=torch.int64, device=unit_FD.device)
    grid = (-(-n_features // block_f) * -(-n_tokens // block_b),)
    sizes = {"BLOCK_F": block_f, "BLOCK_B": block_b, "BLOCK_D": block_d, "GROUP": GROUP}
    options = {"num_warps": WARPS, "num_stages": STAGES}
    triton_loops.find[grid](
        unit_BD, unit_FD, key, counter, *bounds, n_tokens, n_features, width, room,
        FLOOR=floor, WIDE=not real, **sizes, **options,
    )  # fmt: skip
    passed = int(counter)
    return key[:passed] if passed <= room else None
