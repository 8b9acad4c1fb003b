"""The screen: one cheap product of unit vectors that cannot lose an entry above a threshold.

Write ẑ = z / max(r, R_MIN), ŵ = w / max(|w|, ROW_MIN), κ = ⟨ẑ, ŵ⟩ and l = ln max(r, R_MIN). Every score of the
family is s = A κ + β_i with A = exp(g_i + a_i l_b)·|w_i|^u > 0, so

    s > t  ⇔  κ > θ_bi := (t − β_i)·exp(−g_i − a_i l_b)·|w_i|^{−u}.

**θ as a line per feature.** With one a for all features θ_bi = V_i δ_b exactly, V_i = (t − β_i) e^{−g_i} |w_i|^{−u},
δ_b = e^{−a l_b}. With per-feature a_i tokens are sorted by l and cut into bins of width ≤ 2h (h = BIN / 2) around c;
with δ_b = l_b − c and y_i = (t − β_i) exp(−g_i − a_i c)|w_i|^{−u}, θ = y e^{−aδ} is bounded below on the bin by a line
U + V δ: for y ≥ 0 the tangent y(1 − aδ), since e^x ≥ 1 + x; for y < 0 the chord y(cosh(ah) − sinh(ah) δ/h), since
e^x is convex. So κ ≤ U + V δ − (errors of κ) proves s ≤ t, and nothing above t is lost.

**Level bins.** With one a, and no thresholds of tokens' own, the comparison needs one number a feature and bin: tokens
are cut into bins of width ≤ LEVEL_BIN in a·l, and g_b ẑ_b is multiplied, g_b = e^{a (l_b)} / max of the bin ≤ 1. Then
κ > V_i δ_b ⇔ g_b κ > V_i δ, δ = e^{−max a l} the bin's own, and since g_b ≤ 1 an error of κ is one of g_b κ at most as
large. What a bin loses is that its margin is that of its largest g: at most e^{LEVEL_BIN} times what a token needs.

**Rows as they are.** Rows are not normalised but multiplied with their length in them: both sides of the comparison are
|w_i| times what is written here, which is rounded twice more (2⁻²³). Where a chunk holds a row longer than RAW_MAX,
whose products could leave fp32's range, its rows are normalised first.

**Errors of κ.** Let e_z = bf16(g ẑ) − g ẑ, and e_w = (bf16(w) − w)/|w|; both are known vectors, so their lengths are
computed, not guessed. Cauchy–Schwarz:

    |⟨bf16(g ẑ), bf16(w)⟩/|w| − g κ| = |⟨e_z, ŵ⟩ + ⟨bf16(g ẑ), e_w⟩| ≤ |e_z| + (1 + 2⁻⁸)|e_w|

(each about 0.4·2⁻⁸; never above 2⁻⁸). A product accumulated in fp32 in any order errs by at most d·2⁻²³ on unit
vectors (|γ_d| with both roundings of a step), and so does the exact fp32 re-scoring; the product rounded to bf16
errs by at most 2⁻⁸ of its own value, which the comparison adds as |κ̃|·2⁻⁸. Factors in fp32 (exp of |log| ≤ LOG_MAX,
a division, a normalisation, θ's own rounding) err by less than 2e-5 relative where |θ| ≤ 1.1; where |θ| > 1.1 the
comparison is decided either way. Adding β cannot lift a rounded score above t when the exact one is not (rounding is
monotone and t is an fp32 number). Together

    margin_b = |e_z,b| + slack,  loss_i = 1.01 |e_w,i|,  slack = 2 (d + 32)·2⁻²³ + 4e-5

and an entry is a survivor when not (κ̃ + |κ̃|·2⁻⁸ ≤ U + Vδ − margin − loss): a NaN survives where the bound is a NaN or
negative, and its exact score decides; tokens that are not finite are not served at all (`unserved_numbers`).

**int8.** Each token and each row has a step of its own, its largest coordinate / 127; the vectors are rounded to whole
steps, q, and the product P = ⟨q_b, q_i⟩ is exact in 32 bits (127² d < 2³¹), whatever adds it up. With
e_z = σ_b q_b − ẑ and e_w = (σ_i q_i − w)/|w|, measured as above, Cauchy–Schwarz says

    |P σ_b σ_i/|w| − κ| = |⟨e_z, ŵ⟩ + ⟨σ_b q_b, e_w⟩| ≤ |e_z| + (1 + |e_z|) |e_w|

about 0.75 % a side at Gaussian coordinates, d 768. So the comparison is P > (|w|/σ_i) (U + Vδ − margin − loss)/σ_b: as
σ_b differs from token to token, δ, the margin and the 1 before U are one number a column, and g_b is 1; tokens keep the
order of level bins, so that survivors come in the same order whatever the format. P becomes fp32 with an error of
2⁻²⁴ |P|, part of the slack. A row or token of coordinates below STEP_MIN is not divided by its step: q = 0, and e is
all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cosae.kernels.cache import StepCache
from cosae.kernels.cpu import native
from cosae.kernels.cpu.sums import compiled
from cosae.kernels.terms import R_MIN, ROW_MIN, ScoreTerms

BIN = 0.25
"""Width in ln r of one bin of tokens where exponents differ between features."""
LEVEL_BIN = 0.4
"""Width in a ln r of one bin of tokens where all features have one exponent."""
RAW_MAX = 2.0**60
"""Longest row that is multiplied as it is; longer ones are normalised first."""
FLOOR_BIN = 0.04
"""Width in ln t of one bin of tokens where thresholds differ between tokens."""
STEP_MIN = 1e-30
"""Largest coordinate below which an int8 vector is 0."""
LOG_MAX = 80.0
"""Largest |logarithm of a scale| that fp32 holds with room for a product."""


def unserved(terms: ScoreTerms) -> str | None:
    """Why the screen cannot serve these terms, or None where it can."""
    if any(t.device.type != "cpu" for t in (terms.z_BD, terms.rows_FD, terms.exponent, terms.log_gain)):
        return "tensors are not on the CPU"
    return unserved_numbers(terms)


def unserved_numbers(terms: ScoreTerms) -> str | None:
    """Why no screen can serve these terms, whatever the device, or None."""
    tensors = (terms.z_BD, terms.rows_FD, terms.exponent, terms.log_gain)
    if any(t.dtype != torch.float32 for t in tensors):
        return "the screen's margins are derived for float32"
    if min(terms.z_BD.shape[0], terms.n_features, terms.z_BD.shape[1]) == 0:
        return "there is nothing to score"
    log_r_B = terms.log_r_B
    largest = (terms.exponent - 1).abs().max() * log_r_B.abs().max() + terms.log_gain.abs().max()
    if not bool(largest < LOG_MAX):
        return f"a score's scale does not fit float32 (its logarithm reaches {float(largest):.0f})"
    return None


@dataclass(frozen=True)
class Tokens:
    """The batch as the screen sees it: tokens in bins, one after the other.

    factor_BD (B, D) what is multiplied, in screen order, of the screen's type: unit vectors, in a level bin times
              g_b ≤ 1, in int8 over their step
    position_B (B,) int64 token of each screen column;  edge_N1 (N + 1,) int64 first column of each bin
    level     True where a bin's columns share one δ and one margin
    unit, delta, margin  (N,) fp32 where level, else (B,) in screen order: base · unit + slope · delta − margin bounds
    stretch   bound of the factors' length: by how much the rows' own errors count
    centre_N, half_N (N,) float64 a bin's middle and half width in ln r;  log_r_B (B,) fp32 in token order
    floor_N (N,) float64 smallest threshold of each bin's tokens, where tokens have their own thresholds
    """

    factor_BD: Tensor
    position_B: Tensor
    edge_N1: Tensor
    level: bool
    unit: Tensor
    delta: Tensor
    margin: Tensor
    stretch: float
    centre_N: Tensor
    half_N: Tensor
    log_r_B: Tensor
    floor_N: Tensor | None = None


def norms(x_RD: Tensor, floor: float) -> Tensor:
    """(R,) max(|x|, floor)."""
    if not compiled(x_RD):
        length_R: Tensor = torch.linalg.vector_norm(x_RD, dim=-1)
        return length_R.clamp_min(floor)
    norm_R = x_RD.new_empty(len(x_RD))
    views = (x_RD.contiguous().numpy(), np.float32(floor), norm_R.numpy())
    native.run_parts(native.loops("search").row_norms, native.parts_for(x_RD.numel()), *views)
    return norm_R


def rounded(
    x_RD: Tensor, by_R: Tensor, dtype: torch.dtype, place_R: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """by · x[place] in dtype (R, D), the length (R,) fp32 of what rounding to it changed, and its step (R,).

    The step is 1 but for int8; fp32 is not rounded.
    """
    step_R = torch.ones_like(by_R)
    if dtype != x_RD.dtype and compiled(x_RD):
        place_R = torch.arange(len(x_RD)) if place_R is None else place_R
        short_RD, error_R = torch.empty(x_RD.shape, dtype=dtype), torch.empty_like(by_R)
        views = (x_RD.contiguous().numpy(), place_R.numpy(), by_R.numpy())
        if dtype == torch.int8:
            loop, outs = native.loops("search").round_rows_int8, [short_RD, error_R, step_R]
        else:
            loop, outs = native.loops("search").round_rows_bf16, [short_RD.view(torch.uint16), error_R]
        native.run_parts(loop, native.parts_for(x_RD.numel()), *views, *(t.numpy() for t in outs))
        return short_RD, error_R, step_R
    exact_RD = (x_RD if place_R is None else x_RD.index_select(0, place_R)) * by_R[:, None]
    if dtype == x_RD.dtype:
        return exact_RD, torch.zeros_like(by_R), step_R
    if dtype != torch.int8:
        short_RD = exact_RD.to(dtype)
        return short_RD, torch.linalg.vector_norm(exact_RD.sub_(short_RD), dim=-1), step_R
    low_R, top_R = exact_RD.aminmax(dim=-1)
    top_R = torch.maximum(top_R, -low_R)
    step_R = torch.where(top_R >= STEP_MIN, top_R / 127, step_R)
    whole_RD = (exact_RD / step_R[:, None]).round_().clamp_(-127, 127)
    short_RD = whole_RD.to(dtype)
    return short_RD, torch.linalg.vector_norm(exact_RD.addcmul_(whole_RD, step_R[:, None], value=-1), dim=-1), step_R


def prepare_tokens(terms: ScoreTerms, dtype: torch.dtype, floor_B: Tensor | None = None) -> Tokens:
    """Normalise, sort into bins, and bound the errors of one batch.

    floor_B (B,): each token's own threshold; tokens are then binned by it too (FLOOR_BIN), and each bin is screened
    at its smallest.
    """
    norm_B = norms(terms.z_BD, R_MIN)
    log_r_B = norm_B.log()
    log_r64_B = log_r_B.double()
    shared = terms.exponent.dim() == 0
    levels = shared and floor_B is None
    level = levels and dtype != torch.int8
    height_B = terms.exponent.double() * log_r64_B if levels else log_r64_B
    bin_B = torch.zeros_like(height_B, dtype=torch.int64)
    if levels or not shared:
        bin_B = ((height_B - height_B.min()) / (LEVEL_BIN if levels else BIN)).floor().long()
    if floor_B is not None:
        step_B = (floor_B.double().clamp_min(torch.finfo(torch.float32).tiny).log() / FLOOR_BIN).floor().long()
        bin_B = bin_B * 100_000 + step_B
    bin_B, position_B = bin_B.sort(stable=True)
    _, count_N = torch.unique_consecutive(bin_B, return_counts=True)
    edge_N1 = torch.cat([count_N.new_zeros(1), count_N.cumsum(0)])
    which_B = torch.repeat_interleave(count_N)

    def most(value_B: Tensor, how: str) -> Tensor:
        start = -torch.inf if how == "amax" else torch.inf
        return value_B.new_full((len(count_N),), start).scatter_reduce_(0, which_B, value_B, how)

    height_B = height_B[position_B]
    low_N, high_N = most(height_B, "amin"), most(height_B, "amax")
    by_B = 1.0 / norm_B[position_B]
    if level:
        by_B = by_B * torch.exp(height_B - high_N[which_B]).float()
    factor_BD, error_B, step_B = rounded(terms.z_BD, by_B, dtype, None if len(count_N) == 1 else position_B)
    margin = error_B + (2.0 * (terms.z_BD.shape[1] + 32) * 2.0**-23 + 4e-5)
    stretch = 1.01 * (1.0 + float(error_B.max())) if dtype == torch.int8 else 1.01
    unit = 1.0 / step_B
    centre_N, half_N = (low_N + high_N) / 2, (high_N - low_N) / 2
    if level:
        delta, margin, unit = torch.exp(-high_N).float(), most(margin, "amax"), unit.new_ones(len(count_N))
    elif levels:
        delta = torch.exp(-height_B).float() * unit
    elif shared:
        delta = torch.exp(-terms.exponent.double() * height_B).float() * unit
    else:
        delta = (height_B - centre_N[which_B]).float() * unit
    margin = margin if level else margin * unit
    floor_N = None if floor_B is None else most(floor_B.double()[position_B], "amin")
    bound = (unit, delta, margin, stretch)
    return Tokens(factor_BD, position_B, edge_N1, level, *bound, centre_N, half_N, log_r_B, floor_N)


@dataclass(frozen=True)
class Rows:
    """Encoder rows as the screen multiplies them: factor (R, D), of which scale · κ is the product with a unit vector.

    scale_R (R,);  loss_R (R,) bound of what rounding the row takes from κ, or None where it was not rounded
    """

    factor_RD: Tensor
    scale_R: Tensor
    loss_R: Tensor | None


def row_norms(rows_FD: Tensor, cache: StepCache | None = None) -> Tensor:
    """(F,) max(|w|, ROW_MIN): what the optimiser left of these very rows, or found now."""
    norm_F = None if cache is None else cache.rows(rows_FD)
    return norm_F if isinstance(norm_F, Tensor) else norms(rows_FD, ROW_MIN)


def prepare_rows(rows_RD: Tensor, norm_R: Tensor, dtype: torch.dtype, stretch: float = 1.01) -> Rows:
    """Rows (R, D) fp32 and their norms → what is multiplied: the rows as they are, where no product can overflow.

    stretch: that of the tokens they are multiplied with.
    """
    if not bool(norm_R.max() <= RAW_MAX):  # not so for a NaN
        unit_RD, error_R, step_R = rounded(rows_RD, 1.0 / norm_R, dtype)
        return Rows(unit_RD, 1.0 / step_R, stretch * error_R)
    if dtype == rows_RD.dtype:
        return Rows(rows_RD, norm_R, None)
    short_RD, error_R, step_R = rounded(rows_RD, torch.ones_like(norm_R), dtype)
    return Rows(short_RD, norm_R / step_R, stretch * error_R / norm_R)


def lines(terms: ScoreTerms, tokens: Tokens, threshold_F: Tensor, norm_F: Tensor) -> tuple[Tensor, Tensor]:
    """(N, F) base and slope: κ ≤ base + slope·δ_b − margin_b − loss_i proves s ≤ t (in int8 all of it over σ_b).

    t is the larger of the feature's threshold and the bin's floor.
    """
    bias_F = 0.0 if terms.bias_F is None else terms.bias_F.double()
    log_F = terms.log_gain.double()
    if terms.row_power == 1:
        log_F = log_F + norm_F.double().log()
    lift_NF = threshold_F.double().expand(len(tokens.centre_N), -1)
    if tokens.floor_N is not None:
        lift_NF = torch.maximum(lift_NF, tokens.floor_N[:, None])
    lift_NF = lift_NF - bias_F
    exponent_F = terms.exponent.double()
    if exponent_F.dim() == 0:
        slope_NF = (lift_NF * torch.exp(-log_F)).float()
        return torch.zeros_like(slope_NF), slope_NF.contiguous()
    y_NF = lift_NF * torch.exp(-log_F - exponent_F * tokens.centre_N[:, None])
    reach_NF = exponent_F * tokens.half_N[:, None]
    below = y_NF < 0
    chord_NF = torch.where(tokens.half_N[:, None] > 0, reach_NF.sinh() / tokens.half_N[:, None], exponent_F)
    base_NF = torch.where(below, y_NF * reach_NF.cosh(), y_NF)
    slope_NF = torch.where(below, -y_NF * chord_NF, -y_NF * exponent_F)
    return base_NF.float().contiguous(), slope_NF.float().contiguous()
