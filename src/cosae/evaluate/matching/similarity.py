"""How alike the features of two SAEs are: correlation of their codes, cosine of their decoder rows; exact, by chunks.

In: sparse codes of the same tokens, and decoder rows. Out: every feature's best partner by either, where asked the
whole matrix, and both similarities of given pairs. Float64 throughout; Σ f g comes from a sparse product, so

    correlation = (Σ f g − N · mean f · mean g) / (|f − mean f| |g − mean g|)

is exact however rarely two features fire together, and no token is sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from cosae.types import Codes

CHUNK_ELEMENTS = 1 << 22
"""Similarities worked on at once (32 MB in float64, a few copies): bounds memory, does not touch the numbers."""
Similarity = Literal["correlation", "cosine"]
SIMILARITIES: tuple[Similarity, ...] = ("correlation", "cosine")

Array = NDArray[np.float64]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Side:
    """The features of one SAE that take part.

    id_A (A,) int64; code_NA (N, A) their codes; mean_A and length_A (A,) mean f and |f − mean f|; unit_AD decoder rows
    of length 1 (a zero row stays zero)
    """

    id_A: Index
    code_NA: sparse.csc_matrix
    mean_A: Array
    length_A: Array
    unit_AD: Array


def side_of(codes: Codes, decoder_FD: Tensor, min_firings: int) -> Side:
    """Features that fire on at least `min_firings` tokens and whose codes are not the same on all of them."""
    code_NF = codes.to_scipy().tocsc()
    code_NF.eliminate_zeros()
    n = codes.n_tokens
    mean_F = np.asarray(code_NF.sum(0)).ravel() / n
    square_F = np.asarray(code_NF.multiply(code_NF).sum(0)).ravel()
    about_F = square_F - n * mean_F**2
    firings_F = np.diff(code_NF.indptr)
    # what is left of the rounding of a constant code is no variance
    id_A = np.flatnonzero((firings_F >= max(min_firings, 1)) & (about_F > 1e-12 * square_F))
    row_AD = decoder_FD.detach().cpu().double().numpy()[id_A]
    length_A1 = np.linalg.norm(row_AD, axis=1, keepdims=True)
    unit_AD = np.divide(row_AD, length_A1, out=np.zeros_like(row_AD), where=length_A1 > 0)
    return Side(id_A, code_NF[:, id_A], mean_F[id_A], np.sqrt(about_F[id_A]), unit_AD)


@dataclass(frozen=True)
class Partners:
    """Best partners, the smallest index of equals: there_A (A,) of each feature of a, back_B (B,) of each of b.

    whole: (A, B), all similarities, or None. Without features on the other side there is no partner: shapes (0,).
    """

    there_A: Index
    back_B: Index
    whole: Array | None

    def mutual(self) -> tuple[Index, Index]:
        """The pairs in which each is the other's best."""
        at_P = np.flatnonzero(self.back_B[self.there_A] == np.arange(len(self.there_A)))
        return at_P, self.there_A[at_P]


def best_partners(a: Side, b: Side, by: Similarity, whole: bool = False) -> Partners:
    """Best partners in one pass over chunks; `whole` keeps the matrix, 8 bytes a pair."""
    n_a, n_b = len(a.id_A), len(b.id_A)
    kept = np.empty((n_a, n_b)) if whole else None
    if not (n_a and n_b):
        return Partners(np.zeros(0, np.int64), np.zeros(0, np.int64), kept)
    there_A, back_B, best_B = np.zeros(n_a, np.int64), np.zeros(n_b, np.int64), np.full(n_b, -np.inf)
    for rows, value_CB in _chunks(a, b, by):
        there_A[rows] = value_CB.argmax(1)
        top_B = value_CB.argmax(0)
        new_B = value_CB[top_B, np.arange(n_b)]
        better_B = new_B > best_B
        back_B[better_B], best_B[better_B] = rows.start + top_B[better_B], new_B[better_B]
        if kept is not None:
            kept[rows] = value_CB
    return Partners(there_A, back_B, kept)


def _chunks(a: Side, b: Side, by: Similarity) -> Iterator[tuple[slice, Array]]:
    """Similarities (C, B) with all of b, some features of a at a time."""
    n_a, n_b = len(a.id_A), len(b.id_A)
    step = max(1, CHUNK_ELEMENTS // n_b)
    code_NB = b.code_NA.tocsr()
    for start in range(0, n_a, step):
        rows = slice(start, min(start + step, n_a))
        if by == "cosine":
            yield rows, a.unit_AD[rows] @ b.unit_AD.T
            continue
        value_CB = (a.code_NA[:, rows].T @ code_NB).toarray()
        value_CB -= np.outer(code_NB.shape[0] * a.mean_A[rows], b.mean_A)
        value_CB /= a.length_A[rows, None]
        value_CB /= b.length_A
        yield rows, value_CB


def similarities_of(a: Side, b: Side, at_P: Index, with_P: Index) -> tuple[Array, Array]:
    """Correlation and cosine (P,) of given pairs of features that take part."""
    n = a.code_NA.shape[0]
    product_P = np.asarray(a.code_NA[:, at_P].multiply(b.code_NA[:, with_P]).sum(0)).ravel()
    about_P = product_P - n * a.mean_A[at_P] * b.mean_A[with_P]
    correlation_P = np.clip(about_P / (a.length_A[at_P] * b.length_A[with_P]), -1, 1)
    cosine_P = np.clip(np.einsum("pd,pd->p", a.unit_AD[at_P], b.unit_AD[with_P]), -1, 1)
    return correlation_P, cosine_P
