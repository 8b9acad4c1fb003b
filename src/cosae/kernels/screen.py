"""The screen: one cheap product of unit vectors that cannot lose an entry above a threshold.

Write ẑ = z / max(r, R_MIN), ŵ = w / max(|w|, ROW_MIN), κ = ⟨ẑ, ŵ⟩ and l = ln max(r, R_MIN). Every score of the
family is s = A κ + β_i with A = exp(g_i + a_i l_b)·|w_i|^u > 0, so

    s > t  ⇔  κ > θ_bi := (t − β_i)·exp(−g_i − a_i l_b)·|w_i|^{−u}.

**θ as a line per feature.** With one a for all features θ_bi = V_i δ_b exactly, V_i = (t − β_i) e^{−g_i} |w_i|^{−u},
δ_b = e^{−a l_b}. With per-feature a_i tokens are sorted by l and cut into bins of width ≤ 2h (h = BIN / 2) around c;
with δ_b = l_b − c and y_i = (t − β_i) exp(−g_i − a_i c)|w_i|^{−u}, θ = y e^{−aδ} is bounded below on the bin by a line
U + V δ: for y ≥ 0 the tangent y(1 − aδ), since e^x ≥ 1 + x; for y < 0 the chord y(cosh(ah) − sinh(ah) δ/h), since
e^x is convex. So κ ≤ U + V δ − (errors of κ) proves s ≤ t, and nothing above t is lost.

**Errors of κ.** Let e_z = bf16(ẑ) − ẑ and e_w likewise; both are known vectors, so their lengths are computed, not
guessed. Cauchy–Schwarz:

    |⟨bf16 ẑ, bf16 ŵ⟩ − κ| = |⟨e_z, ŵ⟩ + ⟨bf16 ẑ, e_w⟩| ≤ |e_z| + (1 + 2⁻⁸)|e_w|

(each about 0.4·2⁻⁸; never above 2⁻⁸). A product accumulated in fp32 in any order errs by at most d·2⁻²³ on unit
vectors (|γ_d| with both roundings of a step), and so does the exact fp32 re-scoring; the product rounded to bf16
errs by at most 2⁻⁸ of its own value, which the comparison adds as |κ̃|·2⁻⁸. Factors in fp32 (exp of |log| ≤ LOG_MAX,
a division, a normalisation, θ's own rounding) err by less than 2e-5 relative where |θ| ≤ 1.1; where |θ| > 1.1 the
comparison is decided either way. Adding β cannot lift a rounded score above t when the exact one is not (rounding is
monotone and t is an fp32 number). Together

    margin_b = |e_z,b| + slack,  U_i −= 1.01 |e_w,i|,  slack = 2 (d + 32)·2⁻²³ + 4e-5

and an entry is a survivor when not (κ̃ + |κ̃|·2⁻⁸ ≤ U + Vδ − margin): a NaN survives, and is judged by its exact score.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cosae.kernels import native
from cosae.kernels.sums import compiled
from cosae.kernels.terms import R_MIN, ScoreTerms

BIN = 0.25
"""Width in ln r of one bin of tokens where exponents differ between features."""
FLOOR_BIN = 0.04
"""Width in ln t of one bin of tokens where thresholds differ between tokens."""
LOG_MAX = 80.0
"""Largest |logarithm of a scale| that fp32 holds with room for a product."""


def has_fast_bf16() -> bool:
    """Whether this processor multiplies bf16 natively (AVX512_BF16 or AMX) and torch's oneDNN product can use it."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and bool(check()) for check in checks)


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
    """The batch as the screen sees it: tokens sorted into bins of r where exponents differ.

    unit_BD (B, D) unit vectors in screen order, bf16 or fp32;  position_B (B,) int64 token of each screen column
    edge_N1 (N + 1,) int64 first column of each bin;  centre_N, half_N (N,) float64 its middle and half width in ln r
    delta_B, margin_B (B,) fp32 in screen order;  log_r_B (B,) fp32 in token order
    floor_N (N,) float64 smallest threshold of each bin's tokens, where tokens have their own thresholds
    """

    unit_BD: Tensor
    position_B: Tensor
    edge_N1: Tensor
    centre_N: Tensor
    half_N: Tensor
    delta_B: Tensor
    margin_B: Tensor
    log_r_B: Tensor
    floor_N: Tensor | None = None


def unit_rows(x_RD: Tensor, floor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x / max(|x|, floor) rounded to dtype (R, D), that divisor (R,), and the rounding's length (R,), fp32."""
    if dtype == torch.bfloat16 and compiled(x_RD):
        unit_RD = torch.empty(x_RD.shape, dtype=dtype)
        norm_R, error_R = x_RD.new_empty(len(x_RD)), x_RD.new_empty(len(x_RD))
        views = (x_RD.contiguous().numpy(), torch.tensor(floor, dtype=torch.float32).numpy()[()])
        outs = (unit_RD.view(torch.uint16).numpy(), norm_R.numpy(), error_R.numpy())
        native.run_parts(native.loops().unit_rows_bf16, native.parts_for(x_RD.numel()), *views, *outs)
        return unit_RD, norm_R, error_R
    norm_R = torch.linalg.vector_norm(x_RD, dim=-1).clamp_min(floor)
    exact_RD = x_RD / norm_R[:, None]
    if dtype == x_RD.dtype:
        return exact_RD, norm_R, torch.zeros_like(norm_R)
    unit_RD = exact_RD.to(dtype)
    return unit_RD, norm_R, torch.linalg.vector_norm(exact_RD.sub_(unit_RD), dim=-1)


def prepare_tokens(terms: ScoreTerms, dtype: torch.dtype, floor_B: Tensor | None = None) -> Tokens:
    """Normalise, sort into bins where needed, and bound the errors of one batch.

    floor_B (B,): each token's own threshold; tokens are then binned by it too (FLOOR_BIN), and each bin is screened
    at its smallest.
    """
    n_tokens, width = terms.z_BD.shape
    unit_BD, norm_B, error_B = unit_rows(terms.z_BD, R_MIN, dtype)
    slack = 2.0 * (width + 32) * 2.0**-23 + 4e-5
    margin_B = error_B + slack
    log_r_B = norm_B.log()
    log_r64_B = log_r_B.double()
    shared = terms.exponent.dim() == 0
    if shared and floor_B is None:
        delta_B = torch.exp(-terms.exponent.double() * log_r64_B).float()
        none_N = torch.zeros(1, dtype=torch.float64)
        edge_N1 = torch.tensor([0, n_tokens])
        return Tokens(unit_BD, torch.arange(n_tokens), edge_N1, none_N, none_N, delta_B, margin_B, log_r_B)
    bin_B = torch.zeros(n_tokens, dtype=torch.int64)
    if not shared:
        bin_B = ((log_r64_B - log_r64_B.min()) / BIN).floor().long()
    if floor_B is not None:
        level_B = (floor_B.double().clamp_min(torch.finfo(torch.float32).tiny).log() / FLOOR_BIN).floor().long()
        bin_B = bin_B * 100_000 + level_B
    sorted_B, position_B = bin_B.sort(stable=True)
    _, count_N = torch.unique_consecutive(sorted_B, return_counts=True)
    edge_N1 = torch.cat([count_N.new_zeros(1), count_N.cumsum(0)])
    which_B = torch.repeat_interleave(count_N)
    log_r64_B = log_r64_B[position_B]

    def smallest(value_B: Tensor) -> Tensor:
        return value_B.new_full((len(count_N),), torch.inf).scatter_reduce_(0, which_B, value_B, "amin")

    low_N, high_N = smallest(log_r64_B), -smallest(-log_r64_B)
    centre_N, half_N = (low_N + high_N) / 2, (high_N - low_N) / 2
    delta_B = torch.exp(-terms.exponent.double() * log_r64_B) if shared else log_r64_B - centre_N[which_B]
    floor_N = None if floor_B is None else smallest(floor_B.double()[position_B])
    return Tokens(
        unit_BD[position_B], position_B, edge_N1, centre_N, half_N, delta_B.float(), margin_B[position_B], log_r_B,
        floor_N,
    )  # fmt: skip


def lines(
    terms: ScoreTerms, tokens: Tokens, rows: slice, threshold_F: Tensor, norm_R: Tensor, error_R: Tensor
) -> tuple[Tensor, Tensor]:
    """(N, R) base and slope: κ ≤ base + slope·δ_b − margin_b proves s ≤ t for the features of `rows`.

    t is the larger of the feature's threshold and the bin's floor.
    """
    bias_R = 0.0 if terms.bias_F is None else terms.bias_F[rows].double()
    log_R = _at(terms.log_gain, rows).double()
    if terms.row_power == 1:
        log_R = log_R + norm_R.double().log()
    lift_NR = threshold_F[rows].double()[None]
    if tokens.floor_N is not None:
        lift_NR = torch.maximum(lift_NR, tokens.floor_N[:, None])
    lift_NR = lift_NR - bias_R
    loss_R = 1.01 * error_R
    if terms.exponent.dim() == 0:
        slope_NR = (lift_NR * torch.exp(-log_R)).float()
        return (-loss_R).expand_as(slope_NR).contiguous(), slope_NR.contiguous()
    exponent_R = _at(terms.exponent, rows).double()
    y_NR = lift_NR * torch.exp(-log_R - exponent_R * tokens.centre_N[:, None])
    reach_NR = exponent_R * tokens.half_N[:, None]
    below = y_NR < 0
    chord_NR = torch.where(tokens.half_N[:, None] > 0, reach_NR.sinh() / tokens.half_N[:, None], exponent_R)
    base_NR = torch.where(below, y_NR * reach_NR.cosh(), y_NR)
    slope_NR = torch.where(below, -y_NR * chord_NR, -y_NR * exponent_R)
    return (base_NR - loss_R).float().contiguous(), slope_NR.float().contiguous()


def _at(parameter: Tensor, rows: slice) -> Tensor:
    return parameter if parameter.dim() == 0 else parameter[rows]
