"""Which features do two SAEs share, and is that fewer than two seeds of one SAE share?

In: codes of two SAEs on the same tokens (those a filter keeps: on sinks thousands of features co-fire and every
correlation is theirs, paper §9 A3) and their decoder rows. Out: one-to-one pairs and plain numbers.

    ρ_ij   Pearson correlation of codes over tokens, exact, float64 (cosae.evaluate.matching.similarity)
    cos_ij ⟨d_i, d'_j⟩ / |d_i||d'_j|
    pairs  by ρ or by cos; Hungarian: their sum over pairs is largest; or mutual: i and j are each other's best
    shared a pair with ρ ≥ 0.7 and cos > 0.7 (the paper's thresholds, §6)
    paper  for each feature of A its best of B by ρ, many to one: the share of A's features with such a best that is
           also shared. Not symmetric

A share means nothing alone: two seeds of one score share only part of their features. `against_yardstick` divides by
theirs. What the pairs say about a probing gap: cosae.evaluate.matching.discovery.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cosae.errors import CosaeError
from cosae.evaluate.encoded import Autoencoder, EncodedPass
from cosae.evaluate.matching.similarity import SIMILARITIES, Side, Similarity, best_partners, side_of, similarities_of
from cosae.evaluate.statistics import RESAMPLES, percentile_interval
from cosae.io.signals import within_reach
from cosae.types import Codes

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Method = Literal["hungarian", "mutual"]

MIN_CORRELATION = 0.7
MIN_COSINE = 0.7
MIN_FIRINGS = 10
HUNGARIAN_MAX = 8192
"""Alive features above which the assignment is refused: it costs F³ time and a dense F × F matrix (512 MB)."""


class Decoding(Autoencoder, Protocol):
    """What is asked of an SAE here: codes, and decoder rows (F, D)."""

    @property
    def W_dec(self) -> Tensor: ...


@dataclass(frozen=True)
class Pairs:
    """One-to-one pairs of features. All (P,), P at most the smaller number of alive features.

    a, b           feature ids in the first and second SAE, a ascending
    correlation    ρ of their codes
    cosine         of their decoder rows
    """

    a: Indices
    b: Indices
    correlation: Array
    cosine: Array

    def shared(self, min_correlation: float = MIN_CORRELATION, min_cosine: float = MIN_COSINE) -> Pairs:
        """The pairs that count as one feature: ρ ≥ min_correlation and cos > min_cosine."""
        keep = (self.correlation >= min_correlation) & (self.cosine > min_cosine)
        return Pairs(self.a[keep], self.b[keep], self.correlation[keep], self.cosine[keep])

    def __len__(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class Matching:
    """Everything `match` found. alive_a, alive_b: ids of features that fire on at least `min_firings` tokens."""

    by: Similarity
    method: Method
    tokens: int
    min_firings: int
    pairs: Pairs
    alive_a: Indices
    alive_b: Indices
    paper_a: Indices
    """Features of A that the paper's one-directional rule calls matched."""
    paper_b: Indices
    """Features of B by the same rule in the other direction."""
    paper_partners_b: int
    """How many different features of B were the best of paper_a: fewer, as many may share one."""
    paper_partners_a: int

    def numbers(self) -> dict[str, Any]:
        """Plain numbers: shares of alive features, and means over all pairs.

        shared_frac is over the smaller side, paper_frac_a and _b over alive features of A and B by the paper's rule,
        paper_partners_b and _a: how many different features those were given as their best.
        """
        shared = self.pairs.shared()
        smaller = max(min(len(self.alive_a), len(self.alive_b)), 1)
        return {
            "by": self.by,
            "method": self.method,
            "tokens": self.tokens,
            "min_firings": self.min_firings,
            "alive_a": len(self.alive_a),
            "alive_b": len(self.alive_b),
            "pairs": len(self.pairs),
            "shared": len(shared),
            "shared_frac": len(shared) / smaller,
            "mean_correlation": float(self.pairs.correlation.mean()) if len(self.pairs) else None,
            "mean_cosine": float(self.pairs.cosine.mean()) if len(self.pairs) else None,
            "paper_frac_a": len(self.paper_a) / max(len(self.alive_a), 1),
            "paper_frac_b": len(self.paper_b) / max(len(self.alive_b), 1),
            "paper_partners_b": self.paper_partners_b,
            "paper_partners_a": self.paper_partners_a,
            "min_correlation": MIN_CORRELATION,
            "min_cosine": MIN_COSINE,
        }


def match_saes(
    a: EncodedPass[Decoding],
    b: EncodedPass[Decoding],
    *,
    keep_N: Tensor | None = None,
    by: Similarity = "correlation",
    method: Method = "hungarian",
    min_firings: int = MIN_FIRINGS,
) -> Matching:
    """`match` of two SAEs of one site, on the tokens that are neither padding nor sinks; of them where keep_N is True.

    Raises CosaeError for passes of different samples, no token left, an SAE whose codes depend on the batch (batch_topk
    without a threshold), and where `match` does.
    """
    if a.sample is not b.sample and len(a.sample) != len(b.sample):
        raise CosaeError(f"features are matched on the same tokens. Got {len(a.sample)} and {len(b.sample)} instead.")
    if not all(getattr(one.sae, "calibrated", True) for one in (a, b)):
        raise CosaeError(
            "matching reads each token on its own, and one of the SAEs is a batch_topk without an inference threshold: "
            "calibrate it first (cosae.sae.calibrate.calibrate)."
        )
    keep_N = a.keep["sinks_out"] if keep_N is None else a.keep["sinks_out"] & keep_N
    if not bool(keep_N.any()):
        raise CosaeError("matching needs at least one token that is neither padding nor a sink; got none.")
    code_a, code_b = (one.codes.take(keep_N) for one in (a, b))
    return match(code_a, code_b, a.sae.W_dec, b.sae.W_dec, by=by, method=method, min_firings=min_firings)


def match(
    codes_a: Codes,
    codes_b: Codes,
    decoder_a_FD: Tensor,
    decoder_b_FD: Tensor,
    *,
    by: Similarity = "correlation",
    method: Method = "hungarian",
    min_firings: int = MIN_FIRINGS,
) -> Matching:
    """Pair the features of two SAEs one to one by the correlation of their codes on the same tokens.

    codes_a, codes_b          of the same N tokens, those a filter keeps
    decoder_a_FD, decoder_b_FD  (F, D) rows of any length, in one space
    by       what pairs are made by: "correlation" of codes or "cosine" of decoder rows
    method   "hungarian" up to 8192 alive features; "mutual" for any number, in memory bounded by chunks
    Features that fire on fewer than `min_firings` tokens, or alike on all of them, are left out. Raises CosaeError for
    different tokens or widths, an unknown similarity or method, or too many features for the assignment.
    """
    _check(codes_a, codes_b, decoder_a_FD, decoder_b_FD, by, method)
    a, b = side_of(codes_a, decoder_a_FD, min_firings), side_of(codes_b, decoder_b_FD, min_firings)
    if method == "hungarian" and max(len(a.id_A), len(b.id_A)) > HUNGARIAN_MAX:
        raise CosaeError(
            f"an assignment of {len(a.id_A)} × {len(b.id_A)} features would take hours: use method='mutual', "
            f"or raise min_firings (at most {HUNGARIAN_MAX})."
        )
    best = best_partners(a, b, by, whole=method == "hungarian")
    row_P, column_P = best.mutual() if best.whole is None else _assigned(best.whole)
    pairs = _pairs(a, b, row_P, column_P)
    closest = best if by == "correlation" else best_partners(a, b, "correlation")
    towards_b = _pairs(a, b, np.arange(len(closest.there_A)), closest.there_A).shared()
    towards_a = _pairs(a, b, closest.back_B, np.arange(len(closest.back_B))).shared()
    return Matching(
        by=by,
        method=method,
        tokens=codes_a.n_tokens,
        min_firings=min_firings,
        pairs=pairs,
        alive_a=a.id_A,
        alive_b=b.id_A,
        paper_a=towards_b.a,
        paper_b=towards_a.b,
        paper_partners_b=len(np.unique(towards_b.b)),
        paper_partners_a=len(np.unique(towards_a.a)),
    )


def _check(a: Codes, b: Codes, decoder_a_FD: Tensor, decoder_b_FD: Tensor, by: str, method: str) -> None:
    if a.n_tokens != b.n_tokens or a.n_tokens == 0:
        raise CosaeError(
            "features are matched on the same tokens, at least one. "
            f"Got codes of {a.n_tokens} and {b.n_tokens} tokens instead."
        )
    shapes = tuple(decoder_a_FD.shape), tuple(decoder_b_FD.shape)
    if decoder_a_FD.shape[1] != decoder_b_FD.shape[1] or (shapes[0][0], shapes[1][0]) != (a.d_sae, b.d_sae):
        raise CosaeError(
            "decoder rows must have one row per feature and one width in both SAEs. Got shapes "
            f"{shapes[0]} and {shapes[1]} for {a.d_sae} and {b.d_sae} features instead."
        )
    if method not in ("hungarian", "mutual"):
        raise CosaeError(f"method must be hungarian or mutual. Got {method!r} instead.")
    if by not in SIMILARITIES:
        raise CosaeError(f"by must be correlation or cosine. Got {by!r} instead.")


def _pairs(a: Side, b: Side, row_P: Indices, column_P: Indices) -> Pairs:
    return Pairs(a.id_A[row_P], b.id_A[column_P], *similarities_of(a, b, row_P, column_P))


def _assigned(similar_AB: NDArray[Any]) -> tuple[Indices, Indices]:
    """The pairs of the largest sum: a minute's work at thousands of features, which a signal ends."""
    row_P, column_P = within_reach(lambda: linear_sum_assignment(similar_AB, maximize=True))
    return row_P, column_P


def against_yardstick(
    found: Matching, yardsticks: Sequence[Matching], seed: int = 0, n_resamples: int = RESAMPLES
) -> dict[str, Any]:
    """What share of A's alive features B has too, beside what a run of A's own score with another seed has of them.

    found: A with B. yardsticks: matchings of same-score SAEs of other seeds; best A with A', A first in each.
    Returns shared_frac, yardstick_frac (mean over yardsticks); `difference` = shared − yardstick with difference_low,
    _high; `ratio` = shared / yardstick with low, high (None where the yardstick shares next to nothing): 95 %
    bootstrap over A's features. `paired`: every yardstick is of the same A on as many tokens, so that resamples draw
    the same features for both. A ratio of 1: the two scores differ no more than two seeds do.
    Raises CosaeError without yardsticks, for pairs made in different ways, and where nothing is alive.
    """
    if not yardsticks:
        raise CosaeError("a matching is read against at least one same-score pair of other seeds; got none.")
    ways = [(one.by, one.method, one.min_firings) for one in (found, *yardsticks)]
    if len(set(ways)) > 1:
        raise CosaeError(f"a matching and its yardsticks must be made in the same way. Got {ways} instead.")
    hits = [_hits(one) for one in (found, *yardsticks)]
    if not all(len(one) for one in hits):
        raise CosaeError("the yardstick needs features that fire in every SAE; got one with none on these tokens.")
    paired = all(one.tokens == found.tokens and np.array_equal(one.alive_a, found.alive_a) for one in yardsticks)
    share_R, floor_R = _resampled(hits, paired, seed, n_resamples)
    share, floor = float(hits[0].mean()), float(np.mean([one.mean() for one in hits[1:]]))
    known = floor > 0 and bool((floor_R > 0).all())
    low, high = percentile_interval(share_R / floor_R) if known else (None, None)
    difference_low, difference_high = percentile_interval(share_R - floor_R)
    return {
        "features": len(hits[0]),
        "paired": paired,
        "shared_frac": share,
        "yardstick_frac": floor,
        "difference": share - floor,
        "difference_low": difference_low,
        "difference_high": difference_high,
        "ratio": share / floor if floor > 0 else None,
        "low": low,
        "high": high,
        "seed": seed,
        "resamples": n_resamples,
    }


def _hits(found: Matching) -> NDArray[np.bool_]:
    """(A,) bool: alive features of A that are in a shared pair."""
    return np.isin(found.alive_a, found.pairs.shared().a)


def _resampled(hits: list[NDArray[np.bool_]], paired: bool, seed: int, n_resamples: int) -> tuple[Array, Array]:
    """(R,) resampled share of the first, and mean share of the others.

    Drawing features with replacement draws from the few kinds of feature there are (hit here, missed there): one
    multinomial draw, however many features.
    """
    rng = np.random.default_rng(seed)
    groups = [np.stack(hits)] if paired else [one[None] for one in hits]
    means = []
    for hit_MA in groups:
        kinds_MK, count_K = np.unique(hit_MA, axis=1, return_counts=True)
        n = hit_MA.shape[1]
        means.append(rng.multinomial(n, count_K / n, size=n_resamples) @ kinds_MK.T.astype(np.float64) / n)
    mean_RM: Array = np.concatenate(means, axis=1)
    return mean_RM[:, 0], mean_RM[:, 1:].mean(1)
