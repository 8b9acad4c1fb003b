"""Which features and which coordinates of the activations go with each feature.

In: cached codes. Out: for each feature the k best partners by Pearson's correlation, with the cosine of the two.

    pearson(v, w) = (n Σvw − Σv Σw) / √((n Σv² − (Σv)²)(n Σw² − (Σw)²))      cosine(v, w) = Σvw / √(Σv² Σw²)

over the tokens that were read, silent ones included, in float64 from sums; 0 where either never varies.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cosae.interop.cached_codes import Array, CachedCodes

PANEL_CELLS = 2**26
"""Products of a panel of features with all others are held at once: 256 MiB in float32."""


class Partners(NamedTuple):
    """The k best partners of each feature, best first: ids, Pearson's correlation and cosine, each (F, k)."""

    id_Fk: Array
    pearson_Fk: Array
    cosine_Fk: Array


def correlated_features(codes: CachedCodes, k: int = 3) -> Partners:
    """The features that fire with each feature, itself left out."""
    sums, size = codes.sums, max(1, PANEL_CELLS // codes.d_sae)
    found = []
    for first in range(0, codes.d_sae, size):
        panel = np.arange(first, min(first + size, codes.d_sae))
        product = np.zeros((len(panel), codes.d_sae), np.float32)
        flat = product.reshape(-1)
        for number in range(len(codes.start_CF1)):
            chunk = codes.chunk(number)
            together = (chunk[:, panel].T @ chunk).tocoo()  # each cell once: the plain += below is safe
            flat[together.row.astype(np.int64) * codes.d_sae + together.col] += together.data
        for rows in (slice(start, start + 256) for start in range(0, len(panel), 256)):
            pair = panel[rows]
            pearson, cosine = _compare(sums.n, product[rows], sums.v_F[pair], sums.vv_F[pair], sums.v_F, sums.vv_F)
            pearson[np.arange(len(pair)), pair] = -np.inf
            found.append(_best(pearson, cosine, min(k, codes.d_sae - 1)))
    return Partners(*map(np.concatenate, zip(*found, strict=True)))


def correlated_neurons(codes: CachedCodes, k: int = 3) -> Partners:
    """The coordinates of the activations that vary with each feature."""
    sums = codes.sums
    found = []
    for rows in (slice(start, start + 1024) for start in range(0, codes.d_sae, 1024)):
        pearson, cosine = _compare(sums.n, sums.vx_FD[rows], sums.v_F[rows], sums.vv_F[rows], sums.x_D, sums.xx_D)
        found.append(_best(pearson, cosine, min(k, len(sums.x_D))))
    return Partners(*map(np.concatenate, zip(*found, strict=True)))


def _compare(n: int, vw_PF: Array, v_P: Array, vv_P: Array, w_F: Array, ww_F: Array) -> tuple[Array, Array]:
    spread_P, spread_F = np.maximum(n * vv_P - v_P**2, 0), np.maximum(n * ww_F - w_F**2, 0)
    vw_PF = vw_PF.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        pearson = (n * vw_PF - np.outer(v_P, w_F)) / np.sqrt(np.outer(spread_P, spread_F))
        cosine = vw_PF / np.sqrt(np.outer(vv_P, ww_F))
    pearson, cosine = (np.nan_to_num(one, nan=0.0, posinf=0.0, neginf=0.0) for one in (pearson, cosine))
    return np.clip(pearson, -1, 1), np.clip(cosine, -1, 1)


def _best(pearson_PF: Array, cosine_PF: Array, k: int) -> Partners:
    some = np.argpartition(-pearson_PF, max(k - 1, 0), axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(pearson_PF, some, 1), axis=1, kind="stable")
    id_Pk = np.take_along_axis(some, order, 1)
    return Partners(id_Pk, np.take_along_axis(pearson_PF, id_Pk, 1), np.take_along_axis(cosine_PF, id_Pk, 1))
