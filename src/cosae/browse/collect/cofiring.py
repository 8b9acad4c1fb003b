"""Which features fire together, within an SAE and across SAEs: exact counts of candidates over the whole pass.

All pairs are too many to count (65k features: 4·10⁹ pairs). So the codes of the first tokens of the pass, the sample,
are kept, all pairs are compared on it, and the best few of each feature are candidates, beside its nearest by decoder
cosine. Candidates are then counted exactly on every token: on the sample at once, on later tokens as they come. Where
the pass is no longer than the sample, nothing was left to chance.

Tokens are those that count for every SAE and are no sinks: on few sinks thousands of features co-fire.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

Array = NDArray[Any]
CANDIDATES, NEAREST, SHOWN = 16, 8, 8
"""Of a feature: by codes on the sample, by decoder cosine; and how many neighbours of each kind are kept."""
PANEL_CELLS = 2**24
BLOCK_ENTRIES = 2**22
"""Entries of codes waiting to be counted together; bounds memory."""


class PairSums:
    """Σ over tokens of f_i g_j and of 1[f_i fires] 1[g_j fires] for P chosen pairs of features."""

    def __init__(self, i_P: Array, j_P: Array) -> None:
        self.i_P, self.j_P = i_P, j_P
        self.product_P, self.both_P = np.zeros(len(i_P)), np.zeros(len(i_P), np.int64)

    def add(self, a_NF: sparse.csc_array, b_NF: sparse.csc_array, values: bool) -> None:
        """Tokens more. values: whether the products of values are wanted, beside the counts."""
        cost_P = np.diff(a_NF.indptr)[self.i_P] + np.diff(b_NF.indptr)[self.j_P]
        split = np.searchsorted(np.cumsum(cost_P), np.arange(BLOCK_ENTRIES, int(cost_P.sum()), BLOCK_ENTRIES))
        for part in np.split(np.arange(len(self.i_P)), np.unique(split)):
            together = a_NF[:, self.i_P[part]].multiply(b_NF[:, self.j_P[part]]).tocsc()
            self.both_P[part] += np.diff(together.indptr)
            if values:
                self.product_P[part] += np.asarray(together.sum(0)).ravel()


def unique_pairs(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Pairs (i, j) of all parts, each once, in order; a partner −1 is none."""
    i, j = (np.concatenate([part[side].reshape(-1) for part in parts]) for side in (0, 1))
    keep = j >= 0
    both = np.unique(np.stack([i[keep], j[keep]], 1), axis=0)
    return both[:, 0], both[:, 1]


def best_by_cosine(a_FD: Tensor, b_GD: Tensor, k: int, itself: bool) -> tuple[Array, Array]:
    """(F, k) features of b nearest to each of a by cosine, −1 where there are fewer; the cosines. itself: a is b."""
    a, b = (one.detach().float().cpu() for one in (a_FD, b_GD))
    a, b = (one / one.norm(dim=1, keepdim=True).clamp_min(1e-30) for one in (a, b))
    id_Fk, value_Fk = np.full((len(a), k), -1, np.int64), np.full((len(a), k), np.nan)
    step = max(1, PANEL_CELLS // len(b))
    for first in range(0, len(a), step):
        cosine = a[first : first + step] @ b.T
        if itself:
            cosine[range(len(cosine)), range(first, first + len(cosine))] = -2
        top = cosine.topk(min(k, len(b)), dim=1)
        value, id = top.values.numpy(), top.indices.numpy()
        known = value > -2
        id_Fk[first : first + step, : id.shape[1]] = np.where(known, id, -1)
        value_Fk[first : first + step, : id.shape[1]] = np.where(known, value, np.nan)
    return id_Fk, value_Fk


def best_by_jaccard(code_NF: sparse.csc_array, k: int) -> Array:
    """(F, k) features that fire on most of the same tokens, −1 where there are fewer that share one."""
    fires_NF = code_NF.copy()
    fires_NF.data = np.ones_like(fires_NF.data)
    count_F = np.diff(fires_NF.indptr).astype(np.float32)
    fires_FN, by_token = fires_NF.T.tocsr(), fires_NF.tocsr()
    return _best_of_panels(fires_FN, by_token, k, lambda both, rows: _jaccard(both, count_F[rows], count_F), True)


def _jaccard(both_PF: Array, count_P: Array, count_F: Array) -> Array:
    union_PF = count_P[:, None] + count_F - both_PF
    found: Array = np.divide(both_PF, union_PF, out=np.zeros_like(both_PF), where=union_PF > 0)
    return found


def best_by_correlation(a_NF: sparse.csc_array, b_NG: sparse.csc_array, k: int) -> Array:
    """(F, k) features of b whose codes correlate most with each of a, −1 where fewer correlate above 0."""
    n = a_NF.shape[0]
    (mean_F, spread_F), (mean_G, spread_G) = _moments(a_NF), _moments(b_NG)

    def correlation(product: Array, rows: slice) -> Array:
        about = product - n * mean_F[rows, None] * mean_G
        size = spread_F[rows, None] * spread_G
        found: Array = np.divide(about, size, out=np.zeros_like(about), where=size > 0)
        return found

    return _best_of_panels(a_NF.T.tocsr(), b_NG.tocsr(), k, correlation, False)


def _moments(code_NF: sparse.csc_array) -> tuple[Array, Array]:
    """(F,) mean, and length of f − mean; float32."""
    n = code_NF.shape[0]
    sum_F, square_F = np.asarray(code_NF.sum(0)).ravel(), np.asarray(code_NF.multiply(code_NF).sum(0)).ravel()
    return (sum_F / n).astype(np.float32), np.sqrt(np.maximum(square_F - sum_F**2 / n, 0)).astype(np.float32)


def _best_of_panels(a_FN: sparse.csr_array, b_NG: sparse.csr_array, k: int, score: Any, itself: bool) -> Array:
    """The k best of all of b for each of a by `score` of the products, some features of a at a time."""
    n_a, n_b = a_FN.shape[0], b_NG.shape[1]
    found = np.full((n_a, k), -1, np.int64)
    step = max(1, PANEL_CELLS // max(n_b, 1))
    for first in range(0, n_a, step):
        rows = slice(first, min(first + step, n_a))
        value = score((a_FN[rows] @ b_NG).toarray().astype(np.float32), rows)
        if itself:
            value[range(rows.stop - first), range(first, rows.stop)] = 0
        some = np.argpartition(-value, min(k, n_b) - 1, axis=1)[:, : min(k, n_b)]
        order = np.argsort(-np.take_along_axis(value, some, 1), axis=1, kind="stable")
        id = np.take_along_axis(some, order, 1)
        found[rows, : id.shape[1]] = np.where(np.take_along_axis(value, id, 1) > 0, id, -1)
    return found
