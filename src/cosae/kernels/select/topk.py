"""Top-k per token by the same screen: guess each token's k-th score from a sample, search above it, repair the rest.

The guess changes no result: a token with fewer than k survivors above a positive guess is done densely.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from cosae.kernels import reference
from cosae.kernels.cpu.sums import grouped
from cosae.kernels.select import search
from cosae.kernels.terms import Entries, ScoreTerms

SAMPLE_SHARE = 4
"""One feature in four is scored densely for the guess."""


def _guess(terms: ScoreTerms, k: int, absolute: bool, dtype: torch.dtype) -> Tensor:
    """(B,) ≥ 0: scores that a little more than k of each token's probably exceed, from a product in `dtype`."""
    feature_S = torch.arange(0, terms.n_features, SAMPLE_SHARE, device=terms.z_BD.device)
    part = terms.of_features(feature_S, terms.rows_FD[feature_S])
    dot_BS = (part.z_BD.to(dtype) @ part.rows_FD.T.to(dtype)).to(part.z_BD.dtype)
    score_BS = reference.scores(part, dot_BS)
    rank_BS = torch.where(terms.live_B[:, None], score_BS.abs(), 0.0) if absolute else score_BS
    expected = k / SAMPLE_SHARE
    rank = math.ceil(expected + 2.0 * math.sqrt(expected)) + 1
    return rank_BS.topk(min(rank, rank_BS.shape[1]), dim=1, sorted=True).values[:, -1].clamp_min(0.0) * (1 - 1e-6)


def _best(flat_S: Tensor, rank_S: Tensor, n_tokens: int, n_features: int, k: int) -> tuple[Tensor, Tensor]:
    """Flat indices of each token's k largest, ties to the smaller feature; and how many each token had (B,)."""
    token_S = flat_S // n_features
    count_B = torch.bincount(token_S, minlength=n_tokens)
    start_B = count_B.cumsum(0) - count_B
    column_S = torch.arange(len(flat_S), device=flat_S.device) - start_B[token_S]
    table = rank_S.new_full((n_tokens, max(1, int(count_B.max()))), -torch.inf)
    table[token_S, column_S] = rank_S
    wide = table.shape[1]
    if wide <= k:
        return flat_S, count_B
    lowest_B1 = table.kthvalue(wide - k + 1, dim=1, keepdim=True).values
    above, tied = table > lowest_B1, table == lowest_B1
    room_B1 = k - above.sum(1, keepdim=True)
    keep = above | (tied & (tied.cumsum(1) <= room_B1))
    return flat_S[keep[token_S, column_S]], count_B


@torch.no_grad()
def select_topk(terms: ScoreTerms, k: int, absolute: bool = False, *, finder: search.Finder = search.CPU) -> Entries:
    """Per token the k largest scores among those > 0; with `absolute`, the k largest |s| among those ≠ 0."""
    terms = terms.detached()
    if not finder.serves(terms, k * terms.n_tokens) or k < 1:
        return grouped(reference.select_topk(terms, k, absolute), terms)
    floor_B = _guess(terms, k, absolute, finder.guess_dtype)
    zero_F = terms.z_BD.new_zeros(terms.n_features)
    room = 8 * k * terms.n_tokens + 4096
    sides = [terms]
    if absolute:  # the scores of the other side are exactly −s
        sides.append(replace(terms, z_BD=-terms.z_BD, bias_F=None if terms.bias_F is None else -terms.bias_F))
    answers = [finder.survivors(side, zero_F, room, floor_B) for side in sides]
    found = [part for part in answers if part is not None]
    if len(found) < len(sides):
        search.log_once("the dense definition serves", "more scores than expected pass the guessed thresholds")
        return grouped(reference.select_topk(terms, k, absolute), terms)
    n_tokens, n_features = terms.n_tokens, terms.n_features
    flat_S, order = torch.cat([search.flat(part, n_features) for part in found]).sort()
    rank_S = torch.cat([part.score_S for part in found])[order]
    flat_E, count_B = _best(flat_S, rank_S, n_tokens, n_features, k)
    short = ((count_B < k) & (floor_B > 0) & terms.live_B).nonzero()[:, 0]
    if len(short):
        dense = reference.select_topk(terms.of_tokens(short), k, absolute)
        keep = ~torch.isin(flat_E // n_features, short)
        flat_E = torch.cat([flat_E[keep], short[dense.token_E] * n_features + dense.feature_E]).sort().values
    return grouped(Entries(flat_E // n_features, flat_E % n_features), terms)
