"""The codes of many tokens, on disk and ordered by feature: what the exports for readers of features are made from.

The model runs once. Memory holds one chunk of tokens and the sums, whatever the number of tokens; entries lie in two
flat files: int32 tokens, float32 values, chunk after chunk, each chunk sorted by feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from cosae.errors import CosaeError
from cosae.models.capture import capture
from cosae.sae.model import SAE
from cosae.shown import counted
from cosae.types import Codes, Sequences, Site

CHUNK_TOKENS = 8192
MAX_TOKENS = 2**31 - 1

Array = NDArray[Any]


class Sums:
    """Over the tokens that were read (not ignored), in float64; v is a code, x an activation.

    n        how many tokens
    count_F  how often a feature fires (v ≠ 0); v_F, vv_F sums of v and v²; largest_F largest |v|
    x_D, xx_D  sums of x and x²; vx_FD of v·x
    """

    def __init__(self, d_in: int, d_sae: int) -> None:
        self.n = 0
        self.count_F = np.zeros(d_sae, np.int64)
        self.v_F, self.vv_F, self.largest_F = (np.zeros(d_sae) for _ in range(3))
        self.x_D, self.xx_D = np.zeros(d_in), np.zeros(d_in)
        self.vx_FD = np.zeros((d_sae, d_in))

    def add(self, chunk: sparse.csc_array, x_ND: Array, kept_N: Array) -> None:
        """Count a chunk: codes (N, F), activations (N, D) and which of its tokens were read (N,)."""
        counts = np.diff(chunk.indptr)
        feature_E = np.repeat(np.arange(len(counts)), counts)
        value_E = chunk.data.astype(np.float64)
        x_nD = x_ND[kept_N].astype(np.float64)
        self.n += len(x_nD)
        self.count_F += counts
        self.v_F += np.bincount(feature_E, value_E, len(counts))
        self.vv_F += np.bincount(feature_E, value_E**2, len(counts))
        np.maximum.at(self.largest_F, feature_E, np.abs(value_E))
        self.x_D += x_nD.sum(0)
        self.xx_D += (x_nD**2).sum(0)
        self.vx_FD += chunk.T @ x_ND


@dataclass(frozen=True)
class CachedCodes:
    """Codes of S sequences of T tokens. Token numbers are row · T + position.

    ids_ST      (S, T) int64 token ids
    start_CF1   (C, F + 1) int64: entries of feature f in chunk c are start[c, f] : start[c, f + 1] of the files
    sums        see `Sums`
    """

    folder: Path
    ids_ST: Tensor
    d_sae: int
    start_CF1: Array
    sums: Sums

    @property
    def n_tokens(self) -> int:
        return self.ids_ST.numel()

    def entries(self, first: int, stop: int) -> tuple[Array, Array, Array]:
        """Entries of features first … stop − 1: offsets (stop − first + 1,), tokens (E,) int64, values (E,) float32.

        Grouped by feature, tokens ascending within one.
        """
        token_file, value_file = self._files()
        spans = [(int(row[first]), int(row[stop])) for row in self.start_CF1]
        token_E = np.concatenate([token_file[a:b] for a, b in spans]).astype(np.int64)
        value_E = np.concatenate([value_file[a:b] for a, b in spans])
        counts_CF = np.diff(self.start_CF1[:, first : stop + 1], axis=1)
        feature_E = np.concatenate([np.repeat(np.arange(stop - first), counts) for counts in counts_CF])
        order = np.argsort(feature_E, kind="stable")  # chunks come in order of their tokens
        offset = np.concatenate([[0], np.cumsum(counts_CF.sum(0))])
        return offset, token_E[order], value_E[order]

    def chunk(self, number: int) -> sparse.csc_array:
        """(tokens of the chunk, F) float32 codes of one chunk, its tokens counted from its first."""
        token_file, value_file = self._files()
        start_F1 = self.start_CF1[number]
        span = slice(int(start_F1[0]), int(start_F1[-1]))
        token_E = token_file[span] - number * self.chunk_tokens
        rows = min(self.chunk_tokens, self.n_tokens - number * self.chunk_tokens)
        return sparse.csc_array((value_file[span], token_E, start_F1 - start_F1[0]), shape=(rows, self.d_sae))

    @property
    def chunk_tokens(self) -> int:
        return _chunk_rows(self.ids_ST.shape[1]) * self.ids_ST.shape[1]

    def _files(self) -> tuple[Array, Array]:
        total = int(self.start_CF1[-1, -1])
        if total == 0:
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        token = np.memmap(self.folder / "tokens.bin", np.int32, "r", shape=(total,))
        return token, np.memmap(self.folder / "values.bin", np.float32, "r", shape=(total,))


def _chunk_rows(context: int) -> int:
    return max(1, CHUNK_TOKENS // context)


@torch.no_grad()
def cache_codes(
    model: nn.Module,
    site: Site,
    sae: SAE,
    sequences: Sequences,
    folder: Path,
    *,
    ignored: Callable[[Tensor], Tensor] | None = None,
    batch_sequences: int = 16,
    log: Callable[[str], None] = lambda _: None,
) -> CachedCodes:
    """Run the model over `sequences` once and keep the SAE's codes in `folder`, which must exist and be empty.

    Special tokens are read by the model but have no codes, nor do tokens for which `ignored` (norms (n,) → (n,) bool)
    is true; neither is counted in the sums. Raises CosaeError for padded sequences, an SAE without a threshold or of
    another width than the site's, what `capture` refuses, and a disk that is full.
    """
    if not len(sequences) or not bool(sequences.mask_ST.all()):
        raise CosaeError("an export reads whole sequences of equal length: give at least one, without padding.")
    if sequences.ids_ST.numel() > MAX_TOKENS:
        raise CosaeError(f"an export holds at most {MAX_TOKENS:,} tokens. Got {sequences.ids_ST.numel():,} instead.")
    if not sae.calibrated:
        raise CosaeError("this SAE has no inference threshold yet: calibrate it (cosae.sae.calibrate) and save it.")
    sums = Sums(sae.d_in, sae.d_sae)
    context = sequences.ids_ST.shape[1]
    rows, starts, written = _chunk_rows(context), [], 0
    try:
        with (folder / "tokens.bin").open("wb") as tokens, (folder / "values.bin").open("wb") as values:
            for first in range(0, len(sequences), rows):
                part = sequences[first : first + rows]
                found = capture(model, part, site, batch_sequences=batch_sequences)[site.name]
                if (width := found.x_ND.shape[1]) != sae.d_in:
                    raise CosaeError(f"{site.name} has width {width}, the SAE d_in = {sae.d_in}: name its own site.")
                kept_N = ~part.special_ST.reshape(-1)
                if ignored is not None:
                    kept_N &= ~ignored(found.norm_N)
                chunk, x_ND = _codes(sae.encode(found.x_ND), kept_N), found.x_ND.float().numpy()
                sums.add(chunk, x_ND, kept_N.numpy())
                starts.append(written + chunk.indptr.astype(np.int64))
                written += chunk.nnz
                tokens.write((chunk.indices.astype(np.int64) + first * context).astype(np.int32).tobytes())
                values.write(chunk.data.astype(np.float32).tobytes())
                log(f"read {min(first + rows, len(sequences)):,} of {counted(len(sequences), 'sequence')}")
    except OSError as error:
        raise CosaeError(f"{folder} cannot be written ({error.strerror}): make room or choose another place.") from None
    return CachedCodes(folder, sequences.ids_ST, sae.d_sae, np.stack(starts), sums)


def _codes(codes: Codes, kept_N: Tensor) -> sparse.csc_array:
    """(N, F) float32 by feature, rows of tokens that are not kept emptied."""
    keep_E = kept_N[codes.token_E.cpu()].numpy()
    where = (codes.token_E.cpu().numpy()[keep_E], codes.feature_E.cpu().numpy()[keep_E])
    value_E = codes.value_E.float().cpu().numpy()[keep_E]
    found = sparse.coo_array((value_E, where), shape=(len(kept_N), codes.d_sae)).tocsc()
    found.sort_indices()
    return found
