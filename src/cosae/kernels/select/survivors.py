"""Survivors: every entry above its threshold, found by the screen chunk by chunk and scored exactly.

No (B, F) tensor is made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from cosae.kernels.cache import Choices, Workspace
from cosae.kernels.cpu import native
from cosae.kernels.cpu.sums import compiled, sampled_dots
from cosae.kernels.select import screen
from cosae.kernels.select.pick import FORMATS, PRODUCTS, pick
from cosae.kernels.terms import ScoreTerms

CHUNK = 1 << 24
"""Bytes of screen scores made at a time."""


@dataclass(frozen=True)
class Survivors:
    """Entries above their threshold, feature by feature, with exact fp32 dots and scores; count_F (F,) int64.

    log_r_B (B,) and norm_F (F,) fp32 are ln r and |w_i|, clamped as in `ScoreTerms`.
    """

    token_S: Tensor
    dot_S: Tensor
    score_S: Tensor
    count_F: Tensor
    log_r_B: Tensor
    norm_F: Tensor

    def __len__(self) -> int:
        return int(self.token_S.shape[0])


@dataclass(frozen=True)
class _Scales:
    """What turns a dot into a score, as the compiled loop wants it."""

    mode: int
    sigma_B: Tensor
    log_r_B: Tensor
    exponent_F: Tensor
    log_gain_F: Tensor
    bias_F: Tensor
    floor_B: Tensor


def _scales(terms: ScoreTerms, log_r_B: Tensor, floor_B: Tensor | None) -> _Scales:
    none = log_r_B.new_zeros(1)
    n = terms.n_features
    bias_F = log_r_B.new_zeros(n) if terms.bias_F is None else terms.bias_F.contiguous()
    floor_B = torch.full_like(log_r_B, -torch.inf) if floor_B is None else floor_B
    if terms.plain:
        return _Scales(0, none, log_r_B, none, none, bias_F, floor_B)
    if terms.exponent.dim() == 0 and terms.log_gain.dim() == 0:
        sigma_B = (terms.log_gain + (terms.exponent - 1.0) * log_r_B).exp()
        return _Scales(1, sigma_B, log_r_B, none, none, bias_F, floor_B)
    wide = (terms.exponent.expand(n).contiguous(), terms.log_gain.expand(n).contiguous())
    return _Scales(2, none, log_r_B, *wide, bias_F, floor_B)


def survivors(terms: ScoreTerms, threshold_F: Tensor, room: int, floor_B: Tensor | None = None) -> Survivors | None:
    """Every live entry with s > threshold_F and s > floor_B; None where there are more than about `room`."""
    choices = Choices() if terms.cache is None else terms.cache.choices
    name = pick(terms, min(room // 3, terms.n_tokens * terms.n_features), _screen_noise, choices)
    found, n_tested = screened(terms, threshold_F, room, FORMATS[name], floor_B)
    choices.learn(name, n_tested)
    return found


def _screen_noise(terms: ScoreTerms, name: str) -> None:
    threshold_F = torch.full((terms.n_features,), 1e30)
    screened(terms, threshold_F, 0, FORMATS[name])


def screened(
    terms: ScoreTerms, threshold_F: Tensor, room: int, dtype: torch.dtype, floor_B: Tensor | None = None
) -> tuple[Survivors | None, int]:
    """`survivors` by a screen in `dtype`, and how many exact scores were taken."""
    terms = replace(terms, z_BD=terms.z_BD.contiguous(), rows_FD=terms.rows_FD.contiguous())
    tokens = screen.prepare_tokens(terms, dtype, floor_B)
    scales = _scales(terms, tokens.log_r_B, floor_B)
    n_tokens, n_features = terms.n_tokens, terms.n_features
    norm_F = screen.row_norms(terms.rows_FD, terms.cache)
    workspace = Workspace() if terms.cache is None else terms.cache.workspace
    line = screen.lines(terms, tokens, threshold_F, norm_F)
    count_F = torch.zeros(n_features, dtype=torch.int64)
    room += 2 * n_tokens * torch.get_num_threads()  # a part of a chunk scores a row only with room for all of it
    found = Survivors(
        torch.empty(room, dtype=torch.int64), torch.empty(room), torch.empty(room), count_F, tokens.log_r_B, norm_F
    )
    product_dtype = PRODUCTS[dtype]
    step = max(1, min(4096, CHUNK // (n_tokens * product_dtype.itemsize)))
    scan = _scan_compiled if compiled(terms.z_BD, terms.rows_FD) else _scan_plain
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    place = n_tested = 0
    for first in range(0, n_features, step):
        rows = slice(first, min(first + step, n_features))
        part = screen.prepare_rows(terms.rows_FD[rows], norm_F[rows], dtype, tokens.stretch)
        product_RB = workspace.product(len(part.factor_RD) * n_tokens, product_dtype).view(-1, n_tokens)
        multiply(part.factor_RD, tokens.factor_BD.T, out=product_RB)
        base_NR, slope_NR = (x_NF[:, rows] for x_NF in line)
        base_NR = base_NR if part.loss_R is None else base_NR - part.loss_R
        bounds = (part.scale_R, base_NR.contiguous(), slope_NR.contiguous())
        written, tested = scan(terms, tokens, scales, rows, product_RB, bounds, threshold_F, norm_F, found, place)
        n_tested += tested
        if written is None:
            return None, n_tested
        place += written
    cut = {name: getattr(found, name)[:place] for name in ("token_S", "dot_S", "score_S")}
    return replace(found, **cut), n_tested


def _scan_compiled(
    terms: ScoreTerms, tokens: screen.Tokens, scales: _Scales, rows: slice, product_RB: Tensor,
    bounds: tuple[Tensor, Tensor, Tensor], threshold_F: Tensor, norm_F: Tensor, found: Survivors, place: int,
) -> tuple[int | None, int]:  # fmt: skip
    """One chunk by the compiled loop: written behind `place` (None where it does not fit); exact scores taken."""
    n_parts = native.parts_for(product_RB.numel())
    outs = [t.numpy() for t in (found.token_S, found.dot_S, found.score_S)]
    screened = product_RB.view(torch.int16) if product_RB.dtype == torch.bfloat16 else product_RB
    limits = (bounds[0], tokens.edge_N1, *bounds[1:], tokens.unit, tokens.delta, tokens.margin)
    compared = (screened.numpy(), rows.start, tokens.level, tuple(t.numpy() for t in limits))
    inputs = (tokens.position_B, terms.z_BD, terms.rows_FD, terms.live_B, threshold_F, scales.floor_B)
    factors = (scales.sigma_B, scales.log_r_B, scales.exponent_F, scales.log_gain_F, norm_F)
    exact = (
        *(t.numpy() for t in inputs), scales.mode, *(t.numpy() for t in factors), terms.row_power == 0,
        scales.bias_F.numpy(),
    )  # fmt: skip
    share = (*outs, found.count_F.numpy(), place, len(found))
    answers = native.run_parts(native.loops("search").scan, n_parts, *compared, exact, *share)
    sizes, n_tested = [size for size, _ in answers], sum(tested for _, tested in answers)
    if min(sizes) < 0:
        return None, n_tested
    room = (len(found) - place) // n_parts
    end = place + sizes[0]
    for part in range(1, n_parts):
        begin = place + room * part
        for out in outs:
            out[end : end + sizes[part]] = out[begin : begin + sizes[part]]
        end += sizes[part]
    return int(end - place), n_tested


def _scan_plain(
    terms: ScoreTerms, tokens: screen.Tokens, scales: _Scales, rows: slice, product_RB: Tensor,
    bounds: tuple[Tensor, Tensor, Tensor], threshold_F: Tensor, norm_F: Tensor, found: Survivors, place: int,
) -> tuple[int | None, int]:  # fmt: skip
    """One chunk in PyTorch."""
    row_S, column_S = _passed(tokens, product_RB, bounds).nonzero(as_tuple=True)
    token_S, feature_S = tokens.position_B[column_S], row_S + rows.start
    count_R = torch.bincount(row_S, minlength=len(product_RB))
    offset_R1 = torch.cat([count_R.new_zeros(1), count_R.cumsum(0)])
    dot_S = sampled_dots(terms.z_BD, terms.rows_FD[rows], token_S, offset_R1)
    score_S = exact_scores(terms, dot_S, token_S, feature_S, scales.log_r_B, norm_F)
    n_tested = len(token_S)
    keep_S = (score_S > threshold_F[feature_S]) & (score_S > scales.floor_B[token_S]) & terms.live_B[token_S]
    token_S, dot_S, score_S = token_S[keep_S], dot_S[keep_S], score_S[keep_S]
    end = place + len(token_S)
    if end > len(found):
        return None, n_tested
    found.token_S[place:end], found.dot_S[place:end], found.score_S[place:end] = token_S, dot_S, score_S
    found.count_F[rows] = torch.bincount(feature_S[keep_S] - rows.start, minlength=len(product_RB))
    return end - place, n_tested


def _passed(tokens: screen.Tokens, product_RB: Tensor, bounds: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """(R, B) bool: what the bound does not exclude."""
    scale_R, base_NR, slope_NR = bounds
    passed_RB = torch.empty(product_RB.shape, dtype=torch.bool)
    for n, (first, last) in enumerate(pairwise(tokens.edge_N1.tolist())):
        columns = slice(n, n + 1) if tokens.level else slice(first, last)
        # scale · (base · unit + slope · δ − margin) as one product; a single column where one bound serves the bin
        factor_R3 = scale_R[:, None] * torch.stack([base_NR[n], slope_NR[n], torch.full_like(base_NR[n], -1.0)], dim=1)
        bound_RC = factor_R3 @ torch.stack([x[columns] for x in (tokens.unit, tokens.delta, tokens.margin)])
        if product_RB.dtype == torch.bfloat16:
            # κ̃ + u|κ̃| > t implies κ̃ > t − 1.01 u|t|, which spares a copy of κ̃
            bound_RC.sub_(bound_RC.abs(), alpha=1.01 * 2.0**-8)
        part_RC = passed_RB[:, first:last]
        torch.le(product_RB[:, first:last], bound_RC, out=part_RC)
        part_RC.logical_not_()
    return passed_RB


def exact_scores(
    terms: ScoreTerms, dot_S: Tensor, token_S: Tensor, feature_S: Tensor, log_r_B: Tensor, norm_F: Tensor
) -> Tensor:
    """(S,) scores of entries from their fp32 dots, in the order of operations of `reference.scores`; ln r and |w| as in
    `Survivors`."""
    scales = _scales(terms, log_r_B, None)
    score_S = dot_S
    if scales.mode == 1:
        score_S = score_S * scales.sigma_B[token_S]
    elif scales.mode == 2:
        power_S = (scales.exponent_F[feature_S] - 1.0) * scales.log_r_B[token_S]
        score_S = score_S * (scales.log_gain_F[feature_S] + power_S).exp()
    if terms.row_power == 0:
        score_S = score_S / norm_F[feature_S]
    return score_S + scales.bias_F[feature_S]
