"""Which features fire together, within an SAE and across SAEs: exact counts of candidates over the whole pass.

All pairs are too many to count (65k features: 4·10⁹ pairs). So the codes of the first tokens of the pass, the sample,
are kept, all pairs are compared on it, and the best few of each feature are candidates, beside its nearest by decoder
cosine. Candidates are then counted exactly on every token: on the sample at once, on later tokens as they come. Where
the pass is no longer than the sample, nothing was left to chance.

Tokens are those that count for every SAE and are no sinks: on few sinks thousands of features co-fire.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from cosae.kernels.cpu import native

Array = NDArray[Any]
CANDIDATES, NEAREST, SHOWN = 16, 8, 8
"""Of a feature: by codes on the sample, by decoder cosine; and how many neighbours of each kind are kept."""
PANEL_CELLS = 2**24
BLOCK_ENTRIES = 2**22
"""Entries of codes waiting to be counted together; bounds memory."""


class PairSums:
    """Σ over tokens of f_i g_j for P chosen pairs of features, i ascending."""

    def __init__(self, i_P: Array, j_P: Array) -> None:
        self.i_P, self.j_P = i_P, j_P
        self.sum_P = np.zeros(len(i_P))

    def add(self, a_NF: sparse.csc_array, b_NG: sparse.csc_array) -> None:
        """Tokens more."""
        if native.serves():
            found_P, line_N = np.empty(len(self.i_P)), np.zeros(a_NF.shape[0], np.float32)
            arrays = (a_NF.data, a_NF.indices, a_NF.indptr, b_NG.data, b_NG.indices, b_NG.indptr)
            native.loops("pairs").pair_sums(0, 1, *arrays, self.i_P, self.j_P, line_N, found_P)
            self.sum_P += found_P
            return
        cost_P = np.diff(a_NF.indptr)[self.i_P] + np.diff(b_NG.indptr)[self.j_P]
        split = np.searchsorted(np.cumsum(cost_P), np.arange(BLOCK_ENTRIES, int(cost_P.sum()), BLOCK_ENTRIES))
        for part in np.split(np.arange(len(self.i_P)), np.unique(split)):
            together = a_NF[:, self.i_P[part]].multiply(b_NG[:, self.j_P[part]])
            self.sum_P[part] += np.asarray(together.sum(0, dtype=np.float64)).ravel()


def unique_pairs(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Pairs (i, j) of all parts, each once, in order; a partner −1 is none."""
    i, j = (np.concatenate([part[side].reshape(-1) for part in parts]) for side in (0, 1))
    size = int(j.max(initial=0)) + 1
    pair = np.unique((i * size + j)[j >= 0])
    return pair // size, pair % size


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


def best_by_jaccard(fires_NF: sparse.csc_array, k: int) -> Array:
    """(F, k) features that fire on most of the same tokens, −1 where there are fewer that share one. Codes of ones."""
    count_F = torch.from_numpy(np.diff(fires_NF.indptr).astype(np.float32))
    best = _Best(fires_NF.shape[1], k)
    for rows, both in _panels(fires_NF, fires_NF.tocsr()):
        union = (count_F[rows, None] + count_F - both).clamp_min_(1)
        jaccard = both.div_(union)
        jaccard[range(len(jaccard)), range(rows.start, rows.stop)] = 0
        best.put(rows, jaccard)
    return best.id_Fk


def best_by_correlation(a_NF: sparse.csc_array, b_NG: sparse.csc_array, k: int) -> tuple[Array, Array]:
    """(F, k) features of b whose codes correlate most with each of a, and (G, k) of a with each of b; −1 where fewer
    correlate above 0."""
    n = a_NF.shape[0]
    (mean_F, unit_F), (mean_G, unit_G) = _moments(a_NF), _moments(b_NG)
    of_a, of_b = _Best(a_NF.shape[1], k), _Best(b_NG.shape[1], k)
    for rows, product in _panels(a_NF, b_NG.tocsr()):
        correlation = product.sub_(torch.outer(n * mean_F[rows], mean_G)).mul_(unit_F[rows, None]).mul_(unit_G)
        of_a.put(rows, correlation)
        of_b.merge(rows.start, correlation.T)
    return of_a.id_Fk, of_b.id_Fk


def _moments(code_NF: sparse.csc_array) -> tuple[Tensor, Tensor]:
    """(F,) mean, and 1 / |f − mean|, 0 for one that never varies; float32."""
    n = code_NF.shape[0]
    sum_F, square_F = (np.asarray(one.sum(0, dtype=np.float64)).ravel() for one in (code_NF, code_NF.power(2)))
    spread_F = np.sqrt(np.maximum(square_F - sum_F**2 / n, 0))
    unit_F = np.divide(1, spread_F, out=np.zeros_like(spread_F), where=spread_F > 0)
    return torch.from_numpy(sum_F / n).float(), torch.from_numpy(unit_F).float()


def _panels(a_NF: sparse.csc_array, b_NG: sparse.csr_array) -> Iterator[tuple[slice, Tensor]]:
    """Σ over tokens of f · g, some features of a at a time with all of b: their numbers, and (P, G) float32."""
    n_a, n_b = a_NF.shape[1], b_NG.shape[1]
    step = max(1, PANEL_CELLS // max(n_b, 1))
    for first in range(0, n_a, step):
        rows = slice(first, min(first + step, n_a))
        if native.serves():
            product = np.empty((rows.stop - first, n_b), np.float32)
            arrays = (a_NF.data, a_NF.indices, a_NF.indptr, b_NG.data, b_NG.indices, b_NG.indptr)
            native.run_parts(native.loops("pairs").products, native.parts_for(a_NF.nnz), *arrays, first, product)
        else:
            product = (a_NF[:, rows].T @ b_NG).toarray().astype(np.float32)
        yield rows, torch.from_numpy(product)


class _Best:
    """(F, k) the partners of each feature with the largest scores above 0, −1 where there are fewer."""

    def __init__(self, n: int, k: int) -> None:
        self.id_Fk, self._k = np.full((n, k), -1, np.int64), k
        self._score_Fk: Tensor | None = None

    def put(self, rows: slice, score_PG: Tensor) -> None:
        """All partners of some features."""
        top = score_PG.topk(min(self._k, score_PG.shape[1]), dim=1)
        self.id_Fk[rows, : top.indices.shape[1]] = np.where(top.values.numpy() > 0, top.indices.numpy(), -1)

    def merge(self, first: int, score_FP: Tensor) -> None:
        """Some partners of all features, the first of them number `first`."""
        top = score_FP.topk(min(self._k, score_FP.shape[1]), dim=1)
        score, id = top.values, top.indices + first
        if self._score_Fk is not None:
            known = self._score_Fk.shape[1]
            score, id = (
                torch.cat([self._score_Fk, score], 1),
                torch.cat([torch.from_numpy(self.id_Fk)[:, :known], id], 1),
            )
            top = score.topk(min(self._k, score.shape[1]), dim=1)
            score, id = top.values, id.gather(1, top.indices)
        self._score_Fk = score
        self.id_Fk[:, : id.shape[1]] = np.where(score.numpy() > 0, id.numpy(), -1)
