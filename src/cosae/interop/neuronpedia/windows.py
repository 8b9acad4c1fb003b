"""Which stretches of text show a feature, and histograms: the parts of a dashboard that are drawn from codes.

A window is a whole sequence without its first token; of a group each is of another sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cosae.interop.cached_codes import Array, CachedCodes
from cosae.interop.neuronpedia.settings import Options

BINS, DECIMALS = 50, 3


def windows(
    token_e: Array,
    value_e: Array,
    codes: CachedCodes,
    row_tokens: Sequence[list[str]],
    shown: Options,
    seed: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """The top group, then intervals from the highest down, of one feature: token_e ascending, value_e its codes there.

    Neuronpedia's keys; `seed` is of the draws from the intervals.
    """
    context = int(codes.ids_ST.shape[1])
    shown_e = token_e % context > 0  # the first token of a sequence is in no window
    token_e, value_e = token_e[shown_e], value_e[shown_e]
    if not len(token_e):
        return
    size_e = np.abs(value_e)
    largest, rng = float(size_e.max()), np.random.default_rng(seed)
    groups = [(-1.0, largest, -1.0, _distinct(token_e[np.argsort(-size_e, kind="stable")], context, shown.top))]
    edges = np.linspace(0, largest, shown.n_quantiles + 1)
    for low, high in reversed(list(itertools.pairwise(edges))):
        inside = token_e[(size_e >= low) & (size_e <= high)]
        n_inside = len(inside) + (codes.n_tokens - len(token_e) if low == 0 else 0)
        drawn = _distinct(rng.permutation(inside), context, shown.per_quantile)
        if low == 0 and len(drawn) < shown.per_quantile:
            drawn = np.concatenate([drawn, _silent(rng, token_e, codes, shown.per_quantile - len(drawn))])
        groups.append((low, high, n_inside / codes.n_tokens, drawn))
    for low, high, share, tokens in groups:
        for token in tokens.tolist():
            row, position = divmod(token, context)
            a, b = np.searchsorted(token_e, [row * context, (row + 1) * context])
            value_T = np.zeros(context)
            value_T[token_e[a:b] - row * context] = value_e[a:b]
            yield {
                "bin_min": round(float(low), DECIMALS),
                "bin_max": round(float(high), DECIMALS),
                "bin_contains": round(float(share), 5),
                "tokens": row_tokens[row],
                "values": rounded(value_T[1:]),
                "qualifying_token_index": position - 1,
            }


def _distinct(token_e: Array, context: int, n: int) -> Array:
    """The first n tokens that are of different sequences."""
    _, first = np.unique(token_e // context, return_index=True)
    return token_e[np.sort(first)[:n]]


def _silent(rng: np.random.Generator, token_e: Array, codes: CachedCodes, n: int) -> Array:
    """Up to n tokens at random at which the feature is silent, of sequences in which it never fires."""
    n_rows, context = codes.ids_ST.shape
    rows = np.setdiff1d(np.arange(n_rows), token_e // context)
    chosen = rng.choice(rows, min(n, len(rows)), replace=False)
    return chosen * context + rng.integers(1, context, len(chosen))


def histogram(value_n: Array) -> tuple[list[int], Array]:
    """Heights of 50 equal bins between the least and the largest value, and the bins' centres; empty for no values."""
    if not len(value_n):
        return [], np.zeros(0)
    low, high = float(value_n.min()), float(value_n.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    heights, edges = np.histogram(value_n, BINS, (low, high))
    return heights.tolist(), (edges[:-1] + edges[1:]) / 2


def rounded(value_n: Array) -> list[float]:
    found: list[float] = (np.round(np.asarray(value_n, np.float64), DECIMALS) + 0.0).tolist()  # + 0.0: no −0.0
    return found
