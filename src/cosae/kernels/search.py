"""Selection by search: screen chunks of features against a threshold, score the survivors exactly, choose among them.

Enters: `ScoreTerms`; leaves: the `Entries` that `reference` selects. No (B, F) tensor is made.

**What "exactly" means.** A survivor's score is one fp32 dot product ⟨z_b, w_i⟩, summed in an order that depends on
the width alone, times its scale and plus its bias as in `reference.scores`; so the chosen set is a function of the
numbers, not of batch, chunk or thread count, and equal rows get equal scores. A dense product sums in another order:
the set can differ from `reference`'s only between scores that agree to within those roundings (about 1e-6 relative).
Equal scores go to the smaller flat index (token · F + feature), as everywhere.
"""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from cosae.kernels import native, reference, screen
from cosae.kernels.sums import GATHER, compiled
from cosae.kernels.terms import ROW_MIN, Entries, ScoreTerms

HINT_SHARE = 0.97
"""Share of the last step's smallest kept score at which the search begins; 1.05–1.2 × the wanted entries pass."""
DENSE_SHARE = 8
"""Where more than 1/8 of all scores are wanted the definition serves: a sparse path would only add to it."""
CHUNK = 1 << 22
"""Screen scores made at a time: 8 MB of bf16."""
SAMPLE = 64
"""Tokens scored densely to guess a threshold where no hint came."""

_log = logging.getLogger(__name__)
_scratch = threading.local()


@dataclass(frozen=True)
class Survivors:
    """Entries above their threshold, feature by feature, with exact fp32 dots and scores; count_F (F,) int64."""

    token_S: Tensor
    dot_S: Tensor
    score_S: Tensor
    count_F: Tensor

    def __len__(self) -> int:
        return int(self.token_S.shape[0])


@lru_cache(maxsize=8)
def _say_once(reason: str) -> None:
    _log.info("kernels: the dense definition serves, because %s", reason)


def screen_dtype() -> torch.dtype:
    """bf16 where the processor multiplies it natively, else fp32."""
    return torch.bfloat16 if screen.has_fast_bf16() else torch.float32


def _buffer(size: int, dtype: torch.dtype) -> Tensor:
    """The calling thread's reused work buffer (fresh pages cost more than the product that fills them)."""
    buffers: dict[torch.dtype, Tensor] = _scratch.__dict__.setdefault("buffers", {})
    if dtype not in buffers or buffers[dtype].numel() < size:
        buffers[dtype] = torch.empty(size, dtype=dtype)
    return buffers[dtype][:size]


@dataclass(frozen=True)
class _Scales:
    """What turns a dot into a score, as the compiled loop wants it."""

    mode: int
    sigma_B: Tensor
    log_r_B: Tensor
    exponent_F: Tensor
    log_gain_F: Tensor
    bias_F: Tensor


def _scales(terms: ScoreTerms, log_r_B: Tensor) -> _Scales:
    none = log_r_B.new_zeros(1)
    n = terms.n_features
    bias_F = log_r_B.new_zeros(n) if terms.bias_F is None else terms.bias_F.contiguous()
    if terms.plain:
        return _Scales(0, none, log_r_B, none, none, bias_F)
    if terms.exponent.dim() == 0 and terms.log_gain.dim() == 0:
        sigma_B = (terms.log_gain + (terms.exponent - 1.0) * log_r_B).exp()
        return _Scales(1, sigma_B, log_r_B, none, none, bias_F)
    wide = (terms.exponent.expand(n).contiguous(), terms.log_gain.expand(n).contiguous())
    return _Scales(2, none, log_r_B, *wide, bias_F)


def survivors(
    terms: ScoreTerms, threshold_F: Tensor, room: int, dtype: torch.dtype | None = None
) -> tuple[Survivors, Tensor] | None:
    """Every live entry with s > threshold_F, and |w_i| (F,); None where there are more than about `room`."""
    dtype = dtype or screen_dtype()
    terms = replace(terms, z_BD=terms.z_BD.contiguous(), rows_FD=terms.rows_FD.contiguous())
    tokens = screen.prepare_tokens(terms, dtype)
    scales = _scales(terms, tokens.log_r_B)
    n_tokens, n_features = terms.n_tokens, terms.n_features
    norm_F = terms.rows_FD.new_empty(n_features)
    count_F = torch.zeros(n_features, dtype=torch.int64)
    room += 2 * n_tokens * torch.get_num_threads()  # a part of a chunk begins a row only with room for all of it
    found = Survivors(torch.empty(room, dtype=torch.int64), torch.empty(room), torch.empty(room), count_F)
    step = max(1, min(4096, CHUNK // n_tokens))
    place = 0
    for first in range(0, n_features, step):
        rows = slice(first, min(first + step, n_features))
        unit_RD, norm_R, error_R = screen.unit_rows(terms.rows_FD[rows], ROW_MIN, dtype)
        norm_F[rows] = norm_R
        line = screen.lines(terms, tokens, rows, threshold_F, norm_R, error_R)
        product_RB = _buffer(len(norm_R) * n_tokens, dtype).view(len(norm_R), n_tokens)
        torch.mm(unit_RD, tokens.unit_BD.T, out=product_RB)
        scan = _scan_compiled if compiled(terms.z_BD, terms.rows_FD) else _scan_plain
        written = scan(terms, tokens, scales, rows, product_RB, line, threshold_F, norm_F, found, place)
        if written is None:
            return None
        place += written
    kept = Survivors(found.token_S[:place], found.dot_S[:place], found.score_S[:place], count_F)
    return kept, norm_F


def _scan_compiled(
    terms: ScoreTerms, tokens: screen.Tokens, scales: _Scales, rows: slice, product_RB: Tensor,
    line: tuple[Tensor, Tensor], threshold_F: Tensor, norm_F: Tensor, found: Survivors, place: int,
) -> int | None:  # fmt: skip
    """One chunk by the compiled loop: written behind `place`; None where it does not fit."""
    bf16 = product_RB.dtype == torch.bfloat16
    loops = native.loops()
    raw = product_RB.view(torch.uint16) if bf16 else product_RB
    n_parts = native.parts_for(product_RB.numel())
    outs = [t.numpy() for t in (found.token_S, found.dot_S, found.score_S)]
    share = (found.count_F.numpy(), place, len(found))
    bounds = [t.numpy() for t in (tokens.edge_N1, *line, tokens.delta_B, tokens.margin_B)]
    find = loops.find_bf16 if bf16 else loops.find_fp32
    sizes = native.run_parts(find, n_parts, raw.numpy(), rows.start, *bounds, outs[0], *share)
    if min(sizes) < 0:
        return None
    inputs = [t.numpy() for t in (tokens.position_B, terms.z_BD, terms.rows_FD, terms.live_B, threshold_F)]
    factors = (scales.sigma_B, scales.log_r_B, scales.exponent_F, scales.log_gain_F, norm_F)
    exact = (*inputs, scales.mode, *(t.numpy() for t in factors), terms.row_power == 0, scales.bias_F.numpy())
    sizes = native.run_parts(loops.rescore, n_parts, len(product_RB), rows.start, *exact, *outs, *share)
    room = (len(found) - place) // n_parts
    end = place + sizes[0]
    for part in range(1, n_parts):
        begin = place + room * part
        for out in outs:
            out[end : end + sizes[part]] = out[begin : begin + sizes[part]]
        end += sizes[part]
    return int(end - place)


def _scan_plain(
    terms: ScoreTerms, tokens: screen.Tokens, scales: _Scales, rows: slice, product_RB: Tensor,
    line: tuple[Tensor, Tensor], threshold_F: Tensor, norm_F: Tensor, found: Survivors, place: int,
) -> int | None:  # fmt: skip
    """One chunk in PyTorch."""
    base_NR, slope_NR = line
    top_RB = product_RB.float()
    if product_RB.dtype == torch.bfloat16:
        top_RB = top_RB + top_RB.abs() * 2.0**-8
    bin_B = torch.repeat_interleave(tokens.edge_N1.diff())
    bound_RB = torch.addcmul(base_NR.T[:, bin_B], slope_NR.T[:, bin_B], tokens.delta_B) - tokens.margin_B
    row_S, column_S = (~(top_RB <= bound_RB)).nonzero(as_tuple=True)
    token_S, feature_S = tokens.position_B[column_S], row_S + rows.start
    dot_S = torch.empty(len(token_S))
    step = max(1, GATHER // terms.z_BD.shape[1])
    for begin in range(0, len(token_S), step):
        part = slice(begin, begin + step)
        dot_S[part] = (terms.z_BD[token_S[part]] * terms.rows_FD[feature_S[part]]).sum(-1)
    score_S = _exact(terms, scales, dot_S, token_S, feature_S, norm_F)
    keep_S = (score_S > threshold_F[feature_S]) & terms.live_B[token_S]
    token_S, dot_S, score_S = token_S[keep_S], dot_S[keep_S], score_S[keep_S]
    end = place + len(token_S)
    if end > len(found):
        return None
    found.token_S[place:end], found.dot_S[place:end], found.score_S[place:end] = token_S, dot_S, score_S
    found.count_F[rows] = torch.bincount(feature_S[keep_S] - rows.start, minlength=len(product_RB))
    return end - place


def _exact(
    terms: ScoreTerms, scales: _Scales, dot_S: Tensor, token_S: Tensor, feature_S: Tensor, norm_F: Tensor
) -> Tensor:
    """(S,) scores of entries from their dots, in the order of operations of `reference.scores`."""
    score_S = dot_S
    if scales.mode == 1:
        score_S = score_S * scales.sigma_B[token_S]
    elif scales.mode == 2:
        power_S = (scales.exponent_F[feature_S] - 1.0) * scales.log_r_B[token_S]
        score_S = score_S * (scales.log_gain_F[feature_S] + power_S).exp()
    if terms.row_power == 0:
        score_S = score_S / norm_F[feature_S]
    return score_S + scales.bias_F[feature_S]


def _entries(terms: ScoreTerms, found: Survivors, lowest: float, last_flat: int) -> Entries:
    """The survivors above `lowest`, or equal to it with flat index ≤ last_flat; what is known goes along."""
    size, n_features = len(found), terms.n_features
    if native.AVAILABLE:
        token_E, feature_E, order_E = (torch.empty(size, dtype=torch.int64) for _ in range(3))
        dot_E, offset_F1 = torch.empty(size), torch.empty(n_features + 1, dtype=torch.int64)
        arrays = [t.numpy() for t in (found.token_S, found.dot_S, found.score_S, found.count_F)]
        outs = [t.numpy() for t in (token_E, feature_E, dot_E, order_E, offset_F1)]
        lowest32 = torch.tensor(lowest, dtype=torch.float32).numpy()[()]
        kept = native.loops().keep_and_sort(*arrays, lowest32, last_flat, terms.n_tokens, *outs)
        entries = Entries(token_E[:kept], feature_E[:kept])
        entries.memo["by_feature"] = (order_E[:kept], offset_F1)
        dot_E = dot_E[:kept]
    else:
        flat_S = _flat(found, n_features)
        keep_S = (found.score_S > lowest) | ((found.score_S == lowest) & (flat_S <= last_flat))
        flat_E, order = flat_S[keep_S].sort()
        entries = Entries(flat_E // n_features, flat_E % n_features)
        dot_E = found.dot_S[keep_S][order]
    entries.memo["dots"] = (_identity(terms), dot_E)
    return entries


def _flat(found: Survivors, n_features: int) -> Tensor:
    return found.token_S * n_features + torch.repeat_interleave(found.count_F)


def _identity(terms: ScoreTerms) -> Any:
    """What tells these z and rows from any others, edits in place included; None in inference mode."""
    z_BD, rows_FD = terms.z_BD, terms.rows_FD
    if z_BD.is_inference() or rows_FD.is_inference():
        return None
    return (z_BD.data_ptr(), z_BD._version, z_BD.shape, rows_FD.data_ptr(), rows_FD._version, rows_FD.shape)


def remembered_dots(terms: ScoreTerms, entries: Entries) -> Tensor | None:
    """(E,) products that selection computed for these very entries of these very terms, or None."""
    identity, dot_E = entries.memo.get("dots", (None, None))
    if identity is None or identity != _identity(terms):
        return None
    return cast(Tensor, dot_E)


def _sampled_threshold(terms: ScoreTerms, n_keep: int) -> float:
    """A guess from SAMPLE evenly spaced live tokens, a little low; 0 where no score is positive."""
    live = terms.live_B.nonzero()[:, 0]
    if len(live) == 0:
        return 0.0
    spread = torch.linspace(0, len(live) - 1, min(SAMPLE, len(live))).long()
    few = live[spread]
    part = ScoreTerms(
        terms.z_BD[few], terms.rows_FD, terms.bias_F, terms.exponent, terms.log_gain, terms.row_power,
        terms.live_B[few], terms.plain,
    )  # fmt: skip
    flat = reference.scores(part).reshape(-1)
    rank = min(flat.numel(), max(1, math.ceil(1.2 * n_keep * len(few) / len(live))))
    return max(0.0, 0.95 * float(flat.topk(rank).values[-1]))


def _search(terms: ScoreTerms, n_keep: int, hint: float | None) -> Survivors:
    """Survivors of a threshold that at least n_keep pass (all positive scores where fewer are positive)."""
    everything = terms.n_tokens * terms.n_features
    room = min(everything, 3 * n_keep + 4096)
    sampled = hint is None or not (0.0 < hint < math.inf)
    guess = _sampled_threshold(terms, n_keep) if sampled else HINT_SHARE * cast(float, hint)
    too_low: float | None = None
    too_high: float | None = None
    for attempt in range(12):
        threshold_F = torch.full((terms.n_features,), guess)
        answer = survivors(terms, threshold_F, room)
        if answer is not None and (len(answer[0]) >= n_keep or guess == 0.0):
            return answer[0]
        if answer is None:
            too_low = guess
        else:
            too_high = guess
        if not sampled:
            sampled, guess = True, _sampled_threshold(terms, n_keep)
            guess = guess if too_high is None else min(guess, 0.9 * too_high)
        elif too_high is None:
            room, guess = min(everything, 4 * room), 1.1 * guess
        else:
            guess = 0.0 if too_low is None else (too_low + too_high) / 2
        if attempt >= 4:
            room, guess = everything, too_low or 0.0
    raise AssertionError("a search with room for every score always ends")


@torch.no_grad()
def select_batch_topk(terms: ScoreTerms, n_keep: int, hint: float | None = None) -> tuple[Entries, float]:
    """The n_keep largest scores of the whole batch among those > 0 (paper §2), and the smallest kept score.

    hint: the last batch's smallest kept score, where there is one; any value gives the same result.
    """
    terms = terms.detached()
    reason = screen.unserved(terms)
    if reason is None and n_keep * DENSE_SHARE > terms.n_tokens * terms.n_features:
        reason = "a large share of all scores is wanted"
    if reason is not None:
        _say_once(reason)
        return reference.select_batch_topk(terms, n_keep, hint)
    found = _search(terms, n_keep, hint) if n_keep > 0 else None
    if found is None or len(found) == 0:
        empty = torch.empty(0, dtype=torch.int64)
        return Entries(empty, empty.clone()), 0.0
    last_flat = terms.n_tokens * terms.n_features
    if len(found) <= n_keep:
        lowest = float(found.score_S.min())
    else:
        lowest = float(found.score_S.kthvalue(len(found) - n_keep + 1).values)
        n_ties = n_keep - int((found.score_S > lowest).sum())
        tied_S = found.score_S == lowest
        if int(tied_S.sum()) > n_ties:
            last_flat = int(_flat(found, terms.n_features)[tied_S].sort().values[n_ties - 1])
    return _entries(terms, found, lowest, last_flat), lowest


@torch.no_grad()
def select_above(terms: ScoreTerms, threshold: Tensor) -> Entries:
    """Every entry with s > threshold; threshold () or (F,)."""
    terms = terms.detached()
    reason = screen.unserved(terms)
    if reason is not None:
        _say_once(reason)
        return reference.select_above(terms, threshold)
    everything = terms.n_tokens * terms.n_features
    threshold_F = threshold.detach().float().expand(terms.n_features).contiguous()
    answer = survivors(terms, threshold_F, max(4096, everything // 16)) or survivors(terms, threshold_F, 2 * everything)
    assert answer is not None
    return _entries(terms, answer[0], -math.inf, everything)


select_topk = reference.select_topk
