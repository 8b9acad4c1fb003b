"""Activations from a file of vectors (N × d): vision, embeddings, anything that needs no language model.

In: `.safetensors` (a 2-D tensor), `.npy` (memory-mapped) or `.parquet` (a column of equally long lists, or
floating point columns side by side). Out: `Activations` without tokens or documents, and a held-out part.

Neighbouring rows of such files tend to be alike (patches of one image, tokens of one text), so train and
held-out are told apart by whole blocks of consecutive rows, drawn by a seeded permutation of the blocks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosae.activations.array_files import open_array
from cosae.errors import CosaeError
from cosae.io.digest import file_digest
from cosae.io.generators import epoch_order, seeded
from cosae.types import Activations

SCAN_ELEMENTS = 1 << 24  # values looked at together when checking for NaN: 64 MB of fp32
MAX_BLOCK_ROWS = 256


class ArraySource:
    """Endless chunks of train rows and one held-out set, from a file of N × d values.

    path           .safetensors, .npy or .parquet
    key            tensor or list column to read; needed only where the file holds several
    chunk_tokens   rows per chunk
    seed           seed of the split and of each epoch's order
    held_out_frac  share of rows kept out of training, 0 ≤ share < 1; whole blocks of `block_rows` =
                   min(256, N // 100) consecutive rows, at least one row
    allow_non_finite  leave rows that are not finite to the reader (cosae.activations.monitor)

    Values stay float32, float16 or bfloat16 as they are; float64 becomes float32. Every value is checked
    once, on construction. Raises `CosaeError` for a missing, damaged, empty or unknown file, an unclear or
    absent key, a wrong rank or dtype, NaN or Inf (naming row and column), and options out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        key: str | None = None,
        chunk_tokens: int = 65536,
        seed: int = 0,
        held_out_frac: float = 0.1,
        allow_non_finite: bool = False,
    ) -> None:
        if chunk_tokens < 1:
            raise CosaeError(f"chunk_tokens must be at least 1. Got {chunk_tokens} instead.")
        if not 0 <= held_out_frac < 1:
            raise CosaeError(f"held_out_frac must be at least 0 and below 1. Got {held_out_frac} instead.")
        self.path = Path(path)
        self.chunk_tokens = chunk_tokens
        self.seed = seed
        self.held_out_frac = held_out_frac
        self._array, self.key, self.file_dtype = open_array(self.path, key)
        self.n_rows, self.d_in = (int(size) for size in self._array.shape)
        if not allow_non_finite:
            self._check_finite()
        self.block_rows = max(1, min(MAX_BLOCK_ROWS, self.n_rows // 100))
        self._train_rows, self._held_out_rows = self._split()
        self.sha256 = file_digest(self.path)

    @property
    def chunks_per_epoch(self) -> int:
        return math.ceil(len(self._train_rows) / self.chunk_tokens)

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        """Chunk `start`, `start + 1`, ... without end: train rows in an order of each epoch's own.

        Every row comes once an epoch, whose last chunk may be shorter. Any chunk can be remade to the bit.
        """
        for number in count(start):
            epoch, chunk = divmod(number, self.chunks_per_epoch)
            order = epoch_order(len(self._train_rows), self.seed, epoch)
            rows = order[chunk * self.chunk_tokens : (chunk + 1) * self.chunk_tokens]
            yield Activations.bare(self._read(self._train_rows[rows]))

    def held_out(self) -> Activations:
        """The rows kept out of training, in the file's order; none where `held_out_frac` is 0."""
        return Activations.bare(self._read(self._held_out_rows))

    def describe(self) -> dict[str, Any]:
        """Where the activations come from, in plain values for a record."""
        dtype = str(self._read(torch.arange(1)).dtype).removeprefix("torch.")
        return {
            "source": "array",
            "path": str(self.path),
            "key": self.key,
            "sha256": self.sha256,
            "n_rows": self.n_rows,
            "d_in": self.d_in,
            "file_dtype": self.file_dtype,
            "dtype": dtype,
            "cast": "" if self.file_dtype == dtype else f"{self.file_dtype} values were cast to {dtype}",
            "n_tokens": len(self._train_rows),
            "n_held_out": len(self._held_out_rows),
            "held_out_frac": self.held_out_frac,
            "split": f"seeded permutation of blocks of {self.block_rows} consecutive rows",
            "block_rows": self.block_rows,
            "chunk_tokens": self.chunk_tokens,
            "seed": self.seed,
        }

    def _split(self) -> tuple[Tensor, Tensor]:
        """Train and held-out row numbers, each ascending."""
        n_blocks = math.ceil(self.n_rows / self.block_rows)
        n_held_out = round(self.held_out_frac * n_blocks)
        if self.held_out_frac > 0:
            n_held_out = min(max(n_held_out, 1), n_blocks - 1)
            if n_held_out == 0:
                raise CosaeError(
                    f"'{self.path}' has a single row, which cannot be split; give more rows or held_out_frac 0."
                )
        held_out = torch.zeros(n_blocks, dtype=torch.bool)
        held_out[torch.randperm(n_blocks, generator=seeded("split", self.seed))[:n_held_out]] = True
        held_out_N = held_out.repeat_interleave(self.block_rows)[: self.n_rows]
        return (~held_out_N).nonzero().flatten(), held_out_N.nonzero().flatten()

    def _read(self, rows: Tensor) -> Tensor:
        """(n, D) rows in float32, float16 or bfloat16, in the order asked for."""
        if isinstance(self._array, Tensor):
            x_ND = self._array[rows]
        else:
            values = self._array[rows.numpy()]
            x_ND = torch.from_numpy(values.astype(values.dtype.newbyteorder("="), order="C", copy=False))
        return x_ND.float() if x_ND.dtype == torch.float64 else x_ND

    def _check_finite(self) -> None:
        step = max(1, SCAN_ELEMENTS // self.d_in)
        for start in range(0, self.n_rows, step):
            block = self._read(torch.arange(start, min(start + step, self.n_rows)))
            if bool(block.isfinite().all()):
                continue
            row, column = (int(i) for i in (~block.isfinite()).nonzero()[0])
            value = "NaN" if bool(block[row, column].isnan()) else "infinite"
            wide = " as float32" if self.file_dtype == "float64" else ""
            raise CosaeError(
                f"'{self.path}' is {value}{wide} at row {start + row}, column {column} (counted from 0); "
                "remove or repair such rows, or leave them out with data.non_finite=drop."
            )
