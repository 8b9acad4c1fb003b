"""Activations from N × d vectors, in a file or a tensor: vision, embeddings, anything that needs no language model.

Neighbouring rows of such files tend to be alike (patches of one image, tokens of one text), so train and
held-out are split by whole blocks of consecutive rows, drawn by a seeded permutation of the blocks.
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosae.activations.array_files import open_array
from cosae.errors import CosaeError, NotFiniteError, check_least, check_range
from cosae.io.digest import file_digest
from cosae.io.generators import epoch_order, seeded
from cosae.types import Activations

SCAN_ELEMENTS = 1 << 24  # values looked at together when checking for NaN: 64 MB of fp32
MAX_BLOCK_ROWS = 256


class _RowSource(ABC):
    """Endless chunks of the train rows of an array, each epoch in an order of its own, and its held-out rows."""

    def __init__(self, n_rows: int, d_in: int, block_rows: int, held_out_frac: float, chunk_tokens: int, seed: int):
        check_least("chunk_tokens", chunk_tokens, 1)
        self.n_rows, self.d_in, self.block_rows = n_rows, d_in, block_rows
        self.held_out_frac, self.chunk_tokens, self.seed = held_out_frac, chunk_tokens, seed
        self.sha256 = ""
        n_blocks = math.ceil(n_rows / block_rows)
        n_held_out = min(max(round(held_out_frac * n_blocks), 1), n_blocks - 1) if held_out_frac > 0 else 0
        held_out = torch.zeros(n_blocks, dtype=torch.bool)
        held_out[torch.randperm(n_blocks, generator=seeded("split", seed))[:n_held_out]] = True
        held_out_N = held_out.repeat_interleave(block_rows)[:n_rows]
        self._train_rows, self._held_out_rows = (part.nonzero().flatten() for part in (~held_out_N, held_out_N))

    @abstractmethod
    def _read(self, rows: Tensor) -> Tensor:
        """(n, D) rows in the order asked for."""

    @property
    def chunks_per_epoch(self) -> int:
        return math.ceil(len(self._train_rows) / self.chunk_tokens)

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        """Chunk `start`, `start + 1`, ... without end: train rows in an order of each epoch's own.

        Every row comes once an epoch, whose last chunk may be shorter. Any chunk can be remade to the bit.
        """
        for number in count(start):
            yield Activations.bare(self._read(self._rows_of(number)))

    def own_row(self, number: int, row: int) -> int:
        """Which row of the array is row `row` of chunk `number`."""
        return int(self._rows_of(number)[row])

    def _rows_of(self, number: int) -> Tensor:
        epoch, chunk = divmod(number, self.chunks_per_epoch)
        order = epoch_order(len(self._train_rows), self.seed, epoch)
        return self._train_rows[order[chunk * self.chunk_tokens : (chunk + 1) * self.chunk_tokens]]

    def held_out(self) -> Activations:
        """The rows kept out of training, in their order; none where `held_out_frac` is 0."""
        return Activations.bare(self._read(self._held_out_rows))

    def describe(self) -> dict[str, Any]:
        """Where the activations come from, in plain values for a record, with the SHA-256 of the file or the rows."""
        return {
            "sha256": self.sha256,
            "n_rows": self.n_rows,
            "d_in": self.d_in,
            "n_tokens": len(self._train_rows),
            "n_held_out": len(self._held_out_rows),
            "chunk_tokens": self.chunk_tokens,
            "seed": self.seed,
        }

    def _check_finite(self, what: str) -> None:
        step = max(1, SCAN_ELEMENTS // self.d_in)
        for start in range(0, self.n_rows, step):
            block = self._read(torch.arange(start, min(start + step, self.n_rows)))
            if not bool(block.isfinite().all()):
                row, column = (~block.isfinite()).nonzero()[0].tolist()
                raise NotFiniteError(
                    f"{what} must be finite. Got {float(block[row, column])} at row {start + row}, column {column} "
                    "(counted from 0): remove or repair such rows."
                )


class ArraySource(_RowSource):
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
        check_range("held_out_frac", held_out_frac, "[0, 1)")
        self.path = Path(path)
        self._array, self.key, self.file_dtype = open_array(self.path, key)
        n_rows, d_in = (int(size) for size in self._array.shape)
        if n_rows == 1 and held_out_frac > 0:
            raise CosaeError(f"'{self.path}' has a single row: give more rows, or held_out_frac 0 for no split.")
        block_rows = max(1, min(MAX_BLOCK_ROWS, n_rows // 100))
        super().__init__(n_rows, d_in, block_rows, held_out_frac, chunk_tokens, seed)
        if not allow_non_finite:
            self._check_finite(f"'{self.path}'" + (" as float32" if self.file_dtype == "float64" else ""))
        self.sha256 = file_digest(self.path)

    def describe(self) -> dict[str, Any]:
        """Where the activations come from, in plain values for a record, with the SHA-256 of the file."""
        dtype = str(self._read(torch.arange(1)).dtype).removeprefix("torch.")
        return {
            **super().describe(),
            "source": "array",
            "path": str(self.path),
            "key": self.key,
            "file_dtype": self.file_dtype,
            "dtype": dtype,
            "cast": "" if self.file_dtype == dtype else f"{self.file_dtype} values were cast to {dtype}",
            "held_out_frac": self.held_out_frac,
            "split": f"seeded permutation of blocks of {self.block_rows} consecutive rows",
            "block_rows": self.block_rows,
        }

    def _read(self, rows: Tensor) -> Tensor:
        """(n, D) rows in float32, float16 or bfloat16."""
        if isinstance(self._array, Tensor):
            x_ND = self._array[rows]
        else:
            values = self._array[rows.numpy()]
            x_ND = torch.from_numpy(values.astype(values.dtype.newbyteorder("="), order="C", copy=False))
        return x_ND.float() if x_ND.dtype == torch.float64 else x_ND


class TensorSource(_RowSource):
    """Endless chunks of train rows and one held-out set, from a tensor (N, D) in memory.

    Held-out rows are a seeded draw of single rows: pass rows in blocks of your own to a file and `ArraySource` where
    neighbours are alike. Raises CosaeError for anything but a finite float (N, D) tensor with N ≥ 2;
    `allow_non_finite` leaves rows that are not finite to the reader (cosae.activations.monitor).
    """

    def __init__(
        self,
        x_ND: Tensor,
        *,
        chunk_tokens: int = 65536,
        seed: int = 0,
        held_out_frac: float = 0.1,
        allow_non_finite: bool = False,
    ) -> None:
        rows = isinstance(x_ND, Tensor) and x_ND.ndim == 2 and x_ND.is_floating_point()
        if not rows or x_ND.shape[0] < 2 or x_ND.shape[1] < 1:
            got = f"{x_ND.dtype} {tuple(x_ND.shape)}" if isinstance(x_ND, Tensor) else type(x_ND).__name__
            raise CosaeError(
                f"activations must be a float tensor of shape (N, d) with N of at least 2. Got {got} instead."
            )
        check_range("held_out_frac", held_out_frac, "(0, 1)")
        self._x_ND = x_ND.detach().cpu().float()
        super().__init__(len(x_ND), int(x_ND.shape[1]), 1, held_out_frac, chunk_tokens, seed)
        if not allow_non_finite:
            self._check_finite("activations in float32")
        self.sha256 = hashlib.sha256(self._x_ND.contiguous().numpy().tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Where the activations come from, in plain values for a record, with the SHA-256 of the rows."""
        return {"source": "tensor", **super().describe()}

    def _read(self, rows: Tensor) -> Tensor:
        return self._x_ND[rows]
