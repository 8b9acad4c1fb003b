"""Activations from N × d vectors, in a file or a tensor: vision, embeddings, anything that needs no language model.

Of an array (N, T, d) the T places of each of N sequences (images, texts) are rows; each knows its sequence and place.

Neighbouring rows of such files tend to be alike (patches of one image, tokens of one text), so train and
held-out are split by whole blocks of consecutive rows, drawn by a seeded permutation of the blocks.
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosae.activations.array_files import open_array
from cosae.activations.positions import choose_positions
from cosae.errors import CosaeError, NotFiniteError, check_least, check_range
from cosae.io.digest import file_digest
from cosae.io.generators import epoch_order, seeded
from cosae.types import Activations, Sequences

SCAN_ELEMENTS = 1 << 24  # values looked at together when checking for NaN: 64 MB of fp32
MAX_BLOCK_ROWS = 256


class _RowSource(ABC):
    """Endless chunks of the train rows of an array, each epoch in an order of its own, and its held-out rows.

    d_out: width of the targets beside them; None where there are none.
    """

    d_out: int | None = None

    def __init__(
        self,
        shape: tuple[int, ...],
        block_rows: int,
        held_out_frac: float,
        chunk_tokens: int,
        seed: int,
        positions: str,
    ):
        check_least("chunk_tokens", chunk_tokens, 1)
        self._place_K = _places(shape, positions)
        self._n_places, d_in = (shape[1] if len(shape) == 3 else 1), shape[-1]
        n_kept = 1 if self._place_K is None else len(self._place_K)
        n_rows = shape[0] * n_kept
        block_rows = max(1, round(block_rows / n_kept)) * n_kept  # whole sequences
        self._n_all = shape[0] * self._n_places
        self.positions = positions
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

    def _read_targets(self, rows: Tensor) -> Tensor:
        """(n, d_out) targets of these rows, where there are any."""
        raise NotImplementedError

    def _take(self, rows: Tensor) -> Activations:
        found = self._vectors(rows)
        return found if self.d_out is None else replace(found, y_ND=self._read_targets(rows))

    @property
    def chunks_per_epoch(self) -> int:
        return math.ceil(len(self._train_rows) / self.chunk_tokens)

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        """Chunk `start`, `start + 1`, ... without end: train rows in an order of each epoch's own.

        Every row comes once an epoch, whose last chunk may be shorter. Any chunk can be remade to the bit.
        """
        for number in count(start):
            yield self._take(self._rows_of(number))

    def own_row(self, number: int, row: int) -> int:
        """Which row of the array is row `row` of chunk `number`."""
        return int(self._rows_of(number)[row])

    def _rows_of(self, number: int) -> Tensor:
        epoch, chunk = divmod(number, self.chunks_per_epoch)
        order = epoch_order(len(self._train_rows), self.seed, epoch)
        return self._train_rows[order[chunk * self.chunk_tokens : (chunk + 1) * self.chunk_tokens]]

    def held_out(self) -> Activations:
        """The rows kept out of training, in their order; none where `held_out_frac` is 0."""
        return self._take(self._held_out_rows)

    def _vectors(self, rows: Tensor) -> Activations:
        """Rows by their numbers, with the sequence and place of each where there are any."""
        if self._place_K is None:
            return Activations.bare(self._read(rows))
        doc_N, place_N = rows // len(self._place_K), self._place_K[rows % len(self._place_K)]
        bare = Activations.bare(self._read(doc_N * self._n_places + place_N))
        return replace(bare, doc_N=doc_N.int(), position_N=place_N.int(), index_N=place_N.int())

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
            **({} if self._place_K is None else {"places": self._n_places, "positions": self.positions}),
        }

    def _check_finite(self, what: str) -> None:
        step = max(1, SCAN_ELEMENTS // self.d_in)
        for start in range(0, self._n_all, step):
            block = self._read(torch.arange(start, min(start + step, self._n_all)))
            if not bool(block.isfinite().all()):
                row, column = (~block.isfinite()).nonzero()[0].tolist()
                raise NotFiniteError(
                    f"{what} must be finite. Got {float(block[row, column])} at row {start + row}, column {column} "
                    "(counted from 0): remove or repair such rows."
                )


def _places(shape: tuple[int, ...], positions: str) -> Tensor | None:
    """(K,) places of every sequence that become rows; None for rows that have none. Raises CosaeError."""
    if len(shape) == 2:
        if positions != "all":
            raise CosaeError(
                f"positions choose places of arrays (N, T, d). Got an array {shape} and positions {positions!r}: leave "
                "them out."
            )
        return None
    if positions == "mean":
        raise CosaeError("positions mean takes a model that is run: average the array (N, T, d) over T beforehand.")
    index_ST = torch.arange(shape[1])[None]
    real_ST = torch.ones_like(index_ST, dtype=torch.bool)
    one = Sequences(index_ST, index_ST, index_ST, real_ST, index_ST == 0)  # the first place may be a class token
    return choose_positions(one, positions).rows_ST[0].nonzero().flatten()


def _check_pairs(n_rows: int, n_targets: int, what: str) -> None:
    if n_rows != n_targets:
        raise CosaeError(f"{what} must have a row for each of {n_rows} activations. Got {n_targets} rows instead.")


class ArraySource(_RowSource):
    """Endless chunks of train rows and one held-out set, from a file of N × d or N × T × d values.

    path           .safetensors, .npy or .parquet
    key            tensor or list column to read; needed only where the file holds several
    chunk_tokens   rows per chunk
    seed           seed of the split and of each epoch's order
    held_out_frac  share of rows kept out of training, 0 ≤ share < 1; whole blocks of `block_rows` =
                   min(256, N // 100) consecutive rows, at least one row
    allow_non_finite  leave rows that are not finite to the reader (cosae.activations.monitor)
    positions      which of T places become rows (cosae.activations.positions): cls is the first, tokens, patches and
                   frames are the others
    target         another such file: row i holds what a transcoder makes of row i of `path`

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
        positions: str = "all",
        target: str | os.PathLike[str] | None = None,
    ) -> None:
        check_range("held_out_frac", held_out_frac, "[0, 1)")
        self.path = Path(path)
        self._array, self.key, self.file_dtype = open_array(self.path, key)
        shape = tuple(int(size) for size in self._array.shape)
        self._array = self._array.reshape(-1, shape[-1])
        n_rows = shape[0] * (shape[1] if len(shape) == 3 else 1)
        if shape[0] == 1 and held_out_frac > 0:
            raise CosaeError(f"'{self.path}' has a single row: give more rows, or held_out_frac 0 for no split.")
        block_rows = max(1, min(MAX_BLOCK_ROWS, n_rows // 100))
        super().__init__(shape, block_rows, held_out_frac, chunk_tokens, seed, positions)
        if not allow_non_finite:
            self._check_finite(f"'{self.path}'" + (" as float32" if self.file_dtype == "float64" else ""))
        self.sha256 = file_digest(self.path)
        self._targets: ArraySource | None = None
        if target is not None:
            self._targets = ArraySource(target, None, held_out_frac=0.0, allow_non_finite=allow_non_finite)
            _check_pairs(self.n_rows, self._targets.n_rows, f"'{target}'")
            self.d_out = self._targets.d_in

    def _read_targets(self, rows: Tensor) -> Tensor:
        assert self._targets is not None
        return self._targets._read(rows)

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
            **({} if self._targets is None else {"target": {"d_out": self.d_out, "sha256": self._targets.sha256}}),
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
    """Endless chunks of train rows and one held-out set, from a tensor (N, D) or (N, T, D) in memory.

    Held-out rows are a seeded draw of single rows, or of whole sequences: pass rows in blocks of your own to a file and
    `ArraySource` where neighbours are alike. Raises CosaeError for anything but a finite float tensor of such a shape
    with N ≥ 2; `allow_non_finite` leaves rows that are not finite to the reader (cosae.activations.monitor).
    `target` (N, d_out) holds what a transcoder makes of each row.
    """

    def __init__(
        self,
        x_ND: Tensor,
        *,
        chunk_tokens: int = 65536,
        seed: int = 0,
        held_out_frac: float = 0.1,
        allow_non_finite: bool = False,
        positions: str = "all",
        target: Tensor | None = None,
        what: str = "activations",
    ) -> None:
        rows = isinstance(x_ND, Tensor) and x_ND.ndim in (2, 3) and x_ND.is_floating_point()
        if not rows or x_ND.shape[0] < 2 or 0 in x_ND.shape:
            got = f"{x_ND.dtype} {tuple(x_ND.shape)}" if isinstance(x_ND, Tensor) else type(x_ND).__name__
            raise CosaeError(f"{what} must be a float tensor of shape (N, d) with N of at least 2. Got {got} instead.")
        check_range("held_out_frac", held_out_frac, "(0, 1)")
        shape = tuple(x_ND.shape)
        self._x_ND = x_ND.detach().cpu().float().reshape(-1, shape[-1])
        super().__init__(shape, 1, held_out_frac, chunk_tokens, seed, positions)
        if not allow_non_finite:
            self._check_finite(f"{what} in float32")
        self.sha256 = hashlib.sha256(self._x_ND.contiguous().numpy().tobytes()).hexdigest()
        self._targets: TensorSource | None = None
        if target is not None:
            self._targets = TensorSource(target, allow_non_finite=allow_non_finite, what="targets")
            _check_pairs(self.n_rows, self._targets.n_rows, "the target")
            self.d_out = self._targets.d_in

    def describe(self) -> dict[str, Any]:
        """Where the activations come from, in plain values for a record, with the SHA-256 of the rows."""
        targets = self._targets
        paired = {} if targets is None else {"target": {"d_out": targets.d_in, "sha256": targets.sha256}}
        return {"source": "tensor", **super().describe(), **paired}

    def _read_targets(self, rows: Tensor) -> Tensor:
        assert self._targets is not None
        return self._targets._read(rows)

    def _read(self, rows: Tensor) -> Tensor:
        return self._x_ND[rows]
