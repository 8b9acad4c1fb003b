"""A store's train rows as endless chunks, each epoch in an order of its own.

The shards are permuted and taken `MIX_SHARDS` at a time; the blocks of `BLOCK_ROWS` consecutive rows of such a group
are permuted; a chunk is as many of them as fit, its rows permuted once more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cosae.activations.monitor import MARKS, NormReference
from cosae.activations.store.reader import MIX_SHARDS, Piece, Store
from cosae.errors import check_least
from cosae.io.generators import seeded
from cosae.types import Activations

BLOCK_ROWS = 256
CHUNK_BYTES = 64 * 2**20
"""A chunk holds this much in float32, but 1024 to 65 536 rows."""


class StoreSource:
    """Endless chunks of a store's train rows, each epoch in an order of its own.

    seed          of the orders
    chunk_tokens  rows per chunk, whole blocks of 256; None takes CHUNK_BYTES of float32

    Any chunk can be made again to the bit, by another process too. Raises what `Store` raises.
    """

    def __init__(self, store: Store, *, seed: int = 0, chunk_tokens: int | None = None) -> None:
        if chunk_tokens is None:
            chunk_tokens = min(max(CHUNK_BYTES // (4 * store.d_in), 1024), 65536)
        check_least("chunk_tokens", chunk_tokens, 1)
        self.store, self.seed, self.d_in = store, seed, store.d_in
        self._chunk_blocks = max(1, chunk_tokens // BLOCK_ROWS)
        self._rows = store.shard_rows("train")
        self.n_blocks = sum(-(-rows // BLOCK_ROWS) for rows in self._rows)
        self._order: tuple[int, Tensor] | None = None

    @property
    def chunk_tokens(self) -> int:
        """Rows of a chunk; the last of an epoch may have fewer."""
        return self._chunk_blocks * BLOCK_ROWS

    @property
    def chunks_per_epoch(self) -> int:
        return math.ceil(self.n_blocks / self._chunk_blocks)

    def norm_reference(self) -> NormReference:
        """Norm quantiles of all train rows, against which a stream holds what it reads."""
        known = self.store.statistics
        found = dict(known["norm"]["quantiles"])
        return NormReference(tuple(float(found[mark]) for mark in MARKS), int(known["rows"]), "the store")

    def document_name(self, doc: int) -> str | None:
        """The name of document `doc` of the train rows' `doc_N`."""
        place = doc - len(self.store.documents("held_out"))
        names = self.store.documents("train")
        return names[place] if 0 <= place < len(names) else None

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        """Chunk `start`, `start + 1`, ... without end."""
        for number in itertools.count(start):
            epoch, chunk = divmod(number, self.chunks_per_epoch)
            blocks_N2 = self._epoch(epoch)[chunk * self._chunk_blocks : (chunk + 1) * self._chunk_blocks]
            pieces = [Piece(s, first, min(first + BLOCK_ROWS, self._rows[s])) for s, first in blocks_N2.tolist()]
            rows = self.store.read("train", pieces)
            order = torch.randperm(len(rows), generator=seeded("store rows", self.seed, number))
            yield Activations(**{name: column.index_select(0, order) for name, column in vars(rows).items()})

    def describe(self) -> dict[str, Any]:
        """Where the activations come from, in plain values; the store by its digest, not by its place."""
        request = {k: v for k, v in self.store.record["request"].items() if k != "concepts"}
        return {
            "source": "store",
            "store": self.store.identity,
            **request,
            "n_tokens": self.store.n_rows("train"),
            "n_held_out": self.store.n_rows("held_out"),
            "chunk_blocks": self._chunk_blocks,
            "block_rows": BLOCK_ROWS,
            "mix_shards": MIX_SHARDS,
            "order_seed": self.seed,
        }

    def _epoch(self, epoch: int) -> Tensor:
        """(n_blocks, 2) int64: shard and first row of the blocks of one epoch, in its order."""
        if self._order is None or self._order[0] != epoch:
            generator = seeded("store blocks", self.seed, epoch)
            shards = torch.randperm(len(self._rows), generator=generator).tolist()
            groups = []
            for first in range(0, len(shards), MIX_SHARDS):
                group_N2 = torch.cat([_blocks_of(s, self._rows[s]) for s in shards[first : first + MIX_SHARDS]])
                groups.append(group_N2[torch.randperm(len(group_N2), generator=generator)])
            self._order = epoch, torch.cat(groups)
        return self._order[1]


def _blocks_of(shard: int, rows: int) -> Tensor:
    """(n, 2) int64: the shard and the first row of each of its blocks."""
    first_N = torch.arange(0, rows, BLOCK_ROWS)
    return torch.stack([torch.full_like(first_N, shard), first_N], 1)
