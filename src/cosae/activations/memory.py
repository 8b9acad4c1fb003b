"""Sources that live in memory: a tensor of vectors, and chunks of another source kept for a second reading."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cosae.activations.stream import Source
from cosae.errors import CosaeError
from cosae.io.generators import epoch_order, seeded
from cosae.types import Activations


class TensorSource:
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
        if not 0 < held_out_frac < 1:
            raise CosaeError(f"held_out_frac must lie between 0 and 1, neither of them. Got {held_out_frac} instead.")
        self._x_ND = x_ND.detach().cpu().float()
        bad = (~torch.isfinite(self._x_ND)).nonzero()
        if len(bad) and not allow_non_finite:
            row, column = (int(i) for i in bad[0])
            raise CosaeError(
                f"activations must be finite in float32. Got {float(self._x_ND[row, column])} at row {row}, "
                f"column {column}: mend those rows, or leave them out with data.non_finite=drop."
            )
        self.d_in = int(x_ND.shape[1])
        self.chunk_tokens = chunk_tokens
        self.seed = seed
        order = torch.randperm(len(x_ND), generator=seeded("split", seed))
        n_held_out = min(max(1, round(held_out_frac * len(x_ND))), len(x_ND) - 1)
        self.sha256 = hashlib.sha256(self._x_ND.contiguous().numpy().tobytes()).hexdigest()
        self._held_out_rows = order[:n_held_out].sort().values
        self._train_rows = order[n_held_out:].sort().values

    @property
    def chunks_per_epoch(self) -> int:
        return math.ceil(len(self._train_rows) / self.chunk_tokens)

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        """Chunk `start`, `start + 1`, ... without end, in an order of each epoch's own."""
        for number in itertools.count(start):
            epoch, chunk = divmod(number, self.chunks_per_epoch)
            order = epoch_order(len(self._train_rows), self.seed, epoch)
            rows = order[chunk * self.chunk_tokens : (chunk + 1) * self.chunk_tokens]
            yield Activations.bare(self._x_ND[self._train_rows[rows]])

    def held_out(self) -> Activations:
        """The rows kept out of training."""
        return Activations.bare(self._x_ND[self._held_out_rows])

    def describe(self) -> dict[str, Any]:
        """Plain values for a record, with the SHA-256 of the rows."""
        return {
            "source": "tensor",
            "sha256": self.sha256,
            "n_rows": len(self._x_ND),
            "d_in": self.d_in,
            "n_tokens": len(self._train_rows),
            "n_held_out": len(self._held_out_rows),
            "chunk_tokens": self.chunk_tokens,
            "seed": self.seed,
        }


class CachedSource:
    """Another source whose first `limit_tokens` tokens are kept, so that a second run need not compute them again."""

    def __init__(self, source: Source, limit_tokens: int) -> None:
        self._source = source
        self._limit = limit_tokens
        self._kept: list[Activations] = []
        self._n_kept = 0
        self.d_in = source.d_in

    def document_name(self, doc: int) -> str | None:
        """The wrapped source's name of document `doc`, None where it knows none."""
        named: Callable[[int], str | None] | None = getattr(self._source, "document_name", None)
        return None if named is None else named(doc)

    def describe(self) -> dict[str, Any]:
        """The wrapped source's own record: keeping chunks changes nothing."""
        return self._source.describe()

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        """As the wrapped source's."""
        for number in itertools.count(start):
            if number >= len(self._kept):
                break
            yield self._kept[number]
        for number, chunk in enumerate(self._source.chunks(max(start, len(self._kept))), max(start, len(self._kept))):
            if number == len(self._kept) and self._n_kept + len(chunk) <= self._limit:
                self._kept.append(chunk)
                self._n_kept += len(chunk)
            yield chunk
