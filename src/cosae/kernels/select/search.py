"""Selection by search: choose among the survivors of a threshold the entries that `reference` selects.

**What "exactly" means.** A survivor's score is one fp32 dot product ⟨z_b, w_i⟩, summed in an order that depends on
the width alone, times its scale and plus its bias as in `reference.scores`; so the chosen set is a function of the
numbers, not of batch, chunk or thread count, and equal rows get equal scores. A dense product sums in another order:
the set can differ from `reference`'s only between scores that agree to within those roundings (about 1e-6 relative).
Equal scores go to the smaller flat index (token · F + feature), as everywhere.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import numpy as np
import torch
from torch import Tensor

from cosae.kernels import reference
from cosae.kernels.cache import Seen
from cosae.kernels.cpu import native
from cosae.kernels.cpu.sums import grouped, token_offsets
from cosae.kernels.peers import ALONE, Peers
from cosae.kernels.select import screen, shared
from cosae.kernels.select.survivors import Survivors, survivors
from cosae.kernels.terms import Entries, Groups, Products, ScoreTerms

HINT_SHARE = 0.97
"""Share of the hint at which the search begins; 1.05–1.2 × the wanted entries pass where batches are alike."""
HINT_RISE, HINT_FALL = 1.005, 0.9
"""How fast a carried hint may rise from step to step, and how far it may lie below the last smallest kept score."""
DENSE_SHARE = 8
"""Where more than 1/8 of all scores are wanted the definition serves: a sparse path would only add to it."""
SAMPLE = 64
"""Tokens scored densely to guess a threshold where no hint came."""

KEEPING = 16
"""Multiply-adds that keeping one survivor costs as much time as."""

_log = logging.getLogger(__name__)


@lru_cache(maxsize=16)
def log_once(what: str, reason: str, level: int = logging.INFO) -> None:
    _log.log(level, "kernels: %s, because %s", what, reason)


@dataclass(frozen=True)
class Finder:
    """How a path finds the entries above a threshold; the search around it is the same on every device.

    unserved   why it cannot serve these terms, or None
    survivors  every live entry above its threshold (`survivors.survivors`)
    guess_dtype  precision of the dense product that per-token top-k guesses its thresholds from
    """

    unserved: Callable[[ScoreTerms], str | None]
    survivors: Callable[[ScoreTerms, Tensor, int, Tensor | None], Survivors | None]
    guess_dtype: torch.dtype = torch.float32

    def serves(self, terms: ScoreTerms, n_wanted: int = 0) -> bool:
        """Whether a search for so many entries serves; where the definition does, the reason is logged once."""
        reason = self.unserved(terms)
        if reason is None and n_wanted * DENSE_SHARE > terms.n_tokens * terms.n_features:
            reason = "a large share of all scores is wanted"
        if reason is not None:
            log_once("the dense definition serves", reason)
        return reason is None


CPU = Finder(screen.unserved, survivors)


def carried(hint: float | None, smallest: float | None) -> float | None:
    """The hint for the next batch: a low mark of the last smallest kept scores, that forgets by HINT_RISE a step.

    Batches differ, and a search that began too high costs the whole product again; one that began too low costs a
    few more exact scores.
    """
    if hint is None or smallest is None or not (0.0 < hint < math.inf):
        return smallest
    return max(min(smallest, HINT_RISE * hint), HINT_FALL * smallest)


def _entries(terms: ScoreTerms, found: Survivors, lowest: float, last_flat: int) -> Entries:
    """The survivors above `lowest`, or equal to it with flat index ≤ last_flat; what is known goes along."""
    size, n_features = len(found), terms.n_features
    if native.serves() and found.token_S.device.type == "cpu":
        token_E, feature_E, order_E = (torch.empty(size, dtype=torch.int64) for _ in range(3))
        dot_E, offset_F1 = torch.empty(size), torch.empty(n_features + 1, dtype=torch.int64)
        arrays = [t.numpy() for t in (found.token_S, found.dot_S, found.score_S, found.count_F)]
        outs = [t.numpy() for t in (token_E, feature_E, dot_E, order_E, offset_F1)]
        lowest32 = torch.tensor(lowest, dtype=torch.float32).numpy()[()]
        n_parts = native.parts_for(KEEPING * size)
        n_kept, *_ = native.run_parts(
            native.loops("search").keep_and_sort, n_parts, *arrays, lowest32, last_flat, terms.n_tokens, *outs
        )
        token_E, feature_E, dot_E, order_E = (t[:n_kept] for t in (token_E, feature_E, dot_E, order_E))
    else:
        flat_S = flat(found, n_features)
        keep = ((found.score_S > lowest) | ((found.score_S == lowest) & (flat_S <= last_flat))).nonzero()[:, 0]
        flat_E, place_E = flat_S[keep].sort()
        token_E, feature_E = flat_E // n_features, flat_E % n_features
        dot_E = found.dot_S[keep][place_E]
        order_E = torch.empty_like(place_E)
        order_E[place_E] = torch.arange(len(place_E), device=place_E.device)
        edge_F1 = torch.arange(n_features + 1, device=place_E.device)
        offset_F1 = torch.searchsorted(flat_S[keep] % n_features, edge_F1)
    entries = Entries(token_E, feature_E, cache=terms.cache)
    groups = Groups(token_offsets(entries, terms.n_tokens), order_E, offset_F1)
    products = Products(Seen(terms.z_BD), Seen(terms.rows_FD), dot_E, found.log_r_B, found.norm_F)
    return replace(entries, groups=groups, products=products)


def flat(found: Survivors, n_features: int) -> Tensor:
    """(S,) int64 token · F + feature of each survivor."""
    return found.token_S * n_features + torch.repeat_interleave(found.count_F, output_size=len(found))


def _sampled_threshold(terms: ScoreTerms, n_keep: int) -> float:
    """A guess from SAMPLE evenly spaced live tokens, a little low; 0 where no score is positive."""
    live = terms.live_B.nonzero()[:, 0]
    if len(live) == 0:
        return 0.0
    spread = torch.linspace(0, len(live) - 1, min(SAMPLE, len(live)), device=live.device).long()
    few = live[spread]
    flat = reference.scores(terms.of_tokens(few)).reshape(-1)
    rank = min(flat.numel(), max(1, math.ceil(1.2 * n_keep * len(few) / len(live))))
    return max(0.0, 0.95 * float(flat.topk(rank).values[-1]))


def _guess(terms: ScoreTerms, n_keep: int, peers: Peers) -> float:
    """The threshold to begin with where no hint came, the same on all processes: the mean of what each would guess."""
    if peers.alone:
        return _sampled_threshold(terms, n_keep)
    n = peers.token_ranks * peers.feature_ranks
    own = terms.z_BD.new_tensor(_sampled_threshold(terms, max(1, n_keep // n)))
    return float(peers.both(own)) / n


def _search(terms: ScoreTerms, n_keep: int, hint: float | None, finder: Finder, peers: Peers) -> tuple[Survivors, int]:
    """Survivors of a threshold that at least n_keep pass (all positive scores where fewer are positive), and how many
    there are in all processes."""
    everything = terms.n_tokens * terms.n_features
    room = min(everything, 3 * n_keep + 4096)
    sampled = hint is None or not (0.0 < hint < math.inf)
    guess = _guess(terms, n_keep, peers) if sampled else HINT_SHARE * cast(float, hint)
    too_low: float | None = None
    too_high: float | None = None
    for attempt in range(12):
        threshold_F = terms.z_BD.new_full((terms.n_features,), guess)
        answer = finder.survivors(terms, threshold_F, room, None)
        n_found, n_full = peers.counts(0 if answer is None else len(answer), int(answer is None))
        if answer is not None and n_full == 0 and (n_found >= n_keep or guess == 0.0):
            return answer, n_found
        if n_full:
            too_low = guess
        else:
            too_high = guess
        missing = 0.0 if n_full else 1.0 - n_found / n_keep
        if attempt == 0 and 0.0 < missing < 0.5:
            # a near miss, as where batches differ in norm: scores near the cut thin out about e-fold per 20 %
            guess *= 1.0 - 0.3 * missing - 0.03
        elif not sampled:
            sampled, guess = True, _guess(terms, n_keep, peers)
            guess = guess if too_high is None else min(guess, 0.9 * too_high)
        elif too_high is None:
            room, guess = min(everything, 4 * room), 1.1 * guess
        else:
            lowered = 0.6 * too_high if attempt < 3 else 0.0
            guess = lowered if too_low is None else (too_low + too_high) / 2
        if attempt >= 6:
            room, guess = everything, too_low or 0.0
    raise AssertionError("a search with room for every score always ends")


def _cut(score_S: Tensor, rank: int) -> tuple[float, int, int]:
    """The score of ascending rank `rank` (from 0); how many scores are above it, and how many equal to it."""
    if score_S.device.type == "cpu":  # numpy's partition is vectorised: a tenth of kthvalue's time
        score_N = score_S.numpy()
        lowest = np.partition(score_N, rank)[rank]
        return float(lowest), int(np.count_nonzero(score_N > lowest)), int(np.count_nonzero(score_N == lowest))
    lowest = float(score_S.kthvalue(rank + 1).values)
    return lowest, int((score_S > lowest).sum()), int((score_S == lowest).sum())


@torch.no_grad()
def select_batch_topk(
    terms: ScoreTerms, n_keep: int, hint: float | None = None, *, finder: Finder = CPU, peers: Peers = ALONE
) -> tuple[Entries, float]:
    """The n_keep largest scores of the whole batch among those > 0 (paper §2), and the smallest kept score.

    hint: the last batch's smallest kept score, where there is one; any value gives the same result. peers: who has the
    rest of batch and dictionary; the entries are this process' part of the n_keep of all.
    """
    terms = terms.detached()
    n = peers.token_ranks * peers.feature_ranks
    if peers.counts(int(finder.serves(terms, n_keep // n)))[0] < n:
        entries, smallest = reference.select_batch_topk(terms, n_keep, hint, peers)
        return grouped(entries, terms), smallest
    found, n_found = _search(terms, n_keep, hint, finder, peers) if n_keep > 0 else (None, 0)
    empty = torch.empty(0, dtype=torch.int64, device=terms.z_BD.device)
    if found is None or n_found == 0:
        return Entries(empty, empty.clone(), cache=terms.cache), 0.0
    last_flat = terms.n_tokens * terms.n_features
    if not peers.alone:
        lowest, last_flat = shared.cut(found.score_S, flat(found, terms.n_features), n_keep, terms.n_features, peers)
        if len(found) == 0:
            return Entries(empty, empty.clone(), cache=terms.cache), lowest
    elif n_found <= n_keep:
        lowest = float(found.score_S.min())
    else:
        lowest, n_above, n_tied = _cut(found.score_S, len(found) - n_keep)
        if n_above + n_tied > n_keep:
            tied_S = found.score_S == lowest
            last_flat = int(flat(found, terms.n_features)[tied_S].sort().values[n_keep - n_above - 1])
    return _entries(terms, found, lowest, last_flat), lowest


@torch.no_grad()
def select_above(terms: ScoreTerms, threshold: Tensor, *, finder: Finder = CPU) -> Entries:
    """Every entry with s > threshold; threshold () or (F,)."""
    terms = terms.detached()
    if not finder.serves(terms):
        return grouped(reference.select_above(terms, threshold), terms)
    everything = terms.n_tokens * terms.n_features
    threshold_F = threshold.detach().float().expand(terms.n_features).contiguous()
    answer = finder.survivors(terms, threshold_F, max(4096, everything // 16), None)
    if answer is None:
        answer = finder.survivors(terms, threshold_F, 2 * everything, None)
    assert answer is not None
    return _entries(terms, answer, -math.inf, everything)
