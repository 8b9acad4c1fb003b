"""What a feature makes of every token around its examples, kept in place on disk while examples come and go.

Each slot of each feature has room for one window: values and κ of its tokens. A window that is taken writes over the
one that leaves, so the file never grows; it is sparse where features are dead. After a crash, the pass that goes on
from a checkpoint takes the same windows in the same order; the token noted beside each says so at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosae.browse.collect.chunks import Chunk
from cosae.browse.store.format import KAPPA_ONE

Array = NDArray[Any]
BLOCK_TOKENS = 256
"""Tokens whose κ is computed in one product."""


class Windows:
    """value (F, slots, W) float32, kappa (F, slots, W) int16 of KAPPA_ONE, place (F, slots) int64: + 1, 0 for none."""

    def __init__(self, folder: Path, n_features: int, slots: int, width: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.width = width
        shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
            "value": (np.float32, (n_features, slots, width)),
            "kappa": (np.int16, (n_features, slots, width)),
            "place": (np.int64, (n_features, slots)),
        }
        self._files = {}
        for name, (kind, shape) in shapes.items():
            path = folder / f"{name}.bin"
            self._files[name] = np.memmap(path, kind, "r+" if path.exists() else "w+", shape=shape)

    def put(self, feature_e: Array, slot_e: Array, place_e: Array, value_eW: Array, kappa_eW: Array) -> None:
        """Windows of these slots; of two for one slot, the later."""
        for name, value in (("value", value_eW), ("kappa", kappa_eW), ("place", place_e + 1)):
            self._files[name][feature_e, slot_e] = value

    def take(self, features: slice) -> dict[str, Array]:
        """All slots of some features."""
        found = {name: np.asarray(file[features]) for name, file in self._files.items()}
        found["place"] = found["place"] - 1
        return found

    def flush(self) -> None:
        for file in self._files.values():
            file.flush()

    @staticmethod
    def bytes(n_features: int, slots: int, width: int) -> int:
        """On disk, at most."""
        return n_features * slots * (6 * width + 8)


def values_around(
    feature_e: Array, start_e: Array, length_e: Array, width: int, by_feature: tuple[Array, Array, Array], n_tokens: int
) -> Array:
    """(e, W) float32: values of a feature on the tokens from start_e on. by_feature: feature, token, value (E,) of the
    chunk, sorted by the first two."""
    feature_E, token_E, value_E = by_feature
    flat_E = feature_E * n_tokens + token_E
    low_e = np.searchsorted(flat_E, feature_e * n_tokens + start_e)
    count_e = np.searchsorted(flat_E, feature_e * n_tokens + start_e + length_e) - low_e
    row = np.repeat(np.arange(len(feature_e)), count_e)
    entry = np.arange(len(row)) - np.repeat(np.cumsum(count_e) - count_e - low_e, count_e)
    found = np.zeros((len(feature_e), width), np.float32)
    found[row, token_E[entry] - start_e[row]] = value_E[entry]
    return found


def kappas_around(
    feature_e: Array,
    token_e: Array,
    start_e: Array,
    length_e: Array,
    width: int,
    chunk: Chunk,
    z_ND: Tensor,
    rows_FD: Tensor,
) -> Array:
    """(e, W) int16: cosine of z with the feature's encoder row, in units of 1 / KAPPA_ONE; 0 beyond the window."""
    unit_ND = torch.nn.functional.normalize(z_ND.float(), dim=-1)
    rows_FD = rows_FD.float()
    found = np.zeros((len(feature_e), width), np.int16)
    starts = chunk.start_S1
    block_S = starts[:-1] // BLOCK_TOKENS  # of the sequences that begin in one block of tokens
    block_e = block_S[chunk.sequence_N[token_e]]
    order = np.argsort(block_e, kind="stable")
    edges = np.flatnonzero(np.append(True, np.diff(block_e[order]) != 0)) if len(order) else np.zeros(0, np.int64)
    for part in np.split(order, edges[1:]):
        if not len(part):
            continue
        inside = np.flatnonzero(block_S == block_e[part[0]])
        first, end = int(starts[inside[0]]), int(starts[inside[-1] + 1])
        used, column = np.unique(feature_e[part], return_inverse=True)
        row_UD = rows_FD[torch.from_numpy(used).to(rows_FD.device)]
        product_TU = (unit_ND[first:end] @ row_UD.T).cpu().numpy()
        length_U = torch.linalg.vector_norm(row_UD, dim=1).clamp_min(1e-30).cpu().numpy()
        offset = np.arange(width)
        at = np.minimum(start_e[part, None] - first + offset, end - first - 1)
        kappa = np.clip(product_TU[at, column[:, None]] / length_U[column, None], -1, 1)
        found[part] = np.where(offset < length_e[part, None], np.rint(kappa * KAPPA_ONE), 0)
    return found
