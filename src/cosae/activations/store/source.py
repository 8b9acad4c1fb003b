"""A store's train rows as endless chunks, each epoch in an order of its own.

The shards are permuted and taken some at a time; the blocks of consecutive rows of such a group are permuted; a chunk
is as many of them as fit, its rows permuted once more. A store of up to 64 shards, 4 GiB and 8 million rows is one
group of blocks of one row: a full shuffle. Of a larger one a block has about a page of the disk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosae.activations.monitor import MARKS, NormReference
from cosae.activations.store.format import SIDES, ShardShape
from cosae.activations.store.reader import MAPPED_SHARDS, Store
from cosae.errors import CosaeError, check_least
from cosae.io.generators import seeded
from cosae.types import Activations

CHUNK_BYTES = 64 * 2**20
"""A chunk holds this much in float32, but 1024 to 65 536 rows."""
FULL_BYTES, FULL_ROWS = 4 * 2**30, 2**23
"""Up to this, rows are permuted one by one: reading and checking a store of this size leaves it in the disk cache."""
PAGE_BYTES, MOST_BLOCKS = 4096, 2**22
"""A block of a larger store: at least a page, and not so small that their order takes much memory."""


class Mixing(NamedTuple):
    """Consecutive rows that stay together until they are in a chunk, and shards that are mixed into one another."""

    block_rows: int
    shards: int


V01 = Mixing(256, 8)


def mixing_of(store: Store) -> Mixing:
    """How a store's train rows are shuffled: a function of its size alone."""
    rows = store.n_rows("train")
    row_bytes = ShardShape(1, store.d_in, store.dtype, -(-len(store.concepts or ()) // 8)).row_bytes()
    if rows <= FULL_ROWS and rows * row_bytes <= FULL_BYTES:
        return Mixing(1, MAPPED_SHARDS)
    return Mixing(max(1, PAGE_BYTES // row_bytes, -(-rows // MOST_BLOCKS)), MAPPED_SHARDS)


def check_pair(store: Store, target: Store) -> None:
    """Raises CosaeError for two stores that are not of the same tokens, in the same order."""
    own = ("site", "d_in", "dtype", "shard_tokens")
    pair = [{k: v for k, v in one.record["request"].items() if k not in own} for one in (store, target)]
    differing = sorted(k for k in pair[0].keys() | pair[1].keys() if pair[0].get(k) != pair[1].get(k))
    if store.folder == target.folder:
        raise CosaeError(f"the target must be another store than the input's, {store.folder}.")
    if differing or any(store.n_rows(side) != target.n_rows(side) for side in SIDES):
        what = f" (they differ in {', '.join(differing)})" if differing else ""
        raise CosaeError(
            f"{store.folder} and {target.folder} do not hold the same tokens{what}: capture both sites with one "
            "command, cosae capture --site A B."
        )


def take_pair(store: Store, target: Store | None, side: str, row_N: Tensor) -> Activations:
    """Rows of a store, with those of the target's store beside them."""
    found = store.take(side, row_N)
    return found if target is None else replace(found, y_ND=target.take(side, row_N).x_ND)


class StoreSource:
    """Endless chunks of a store's train rows, each epoch in an order of its own.

    seed          of the orders
    chunk_tokens  rows per chunk, whole blocks; None takes CHUNK_BYTES of float32
    mixing        how rows are shuffled; by default as the store's size allows
    target        a second store, of another site and the same tokens (`check_pair`): what a transcoder learns

    Any chunk can be made again to the bit, by another process too. Raises what `Store` raises.
    """

    def __init__(
        self,
        store: Store,
        *,
        seed: int = 0,
        chunk_tokens: int | None = None,
        mixing: Mixing | None = None,
        target: Store | None = None,
    ) -> None:
        if chunk_tokens is None:
            chunk_tokens = min(max(CHUNK_BYTES // (4 * store.d_in), 1024), 65536)
        check_least("chunk_tokens", chunk_tokens, 1)
        self.store, self.seed, self.d_in = store, seed, store.d_in
        self.target, self.d_out = target, None if target is None else target.d_in
        self.mixing = mixing or mixing_of(store)
        self._chunk_blocks = max(1, chunk_tokens // self.mixing.block_rows)
        self._bounds = torch.tensor([0, *itertools.accumulate(store.shard_rows("train"))])
        self.n_blocks = sum(-(-rows // self.mixing.block_rows) for rows in store.shard_rows("train"))
        self._order: tuple[int, Tensor] | None = None

    @property
    def chunk_tokens(self) -> int:
        """Rows of a chunk; the last of an epoch may have fewer."""
        return self._chunk_blocks * self.mixing.block_rows

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
            first_B = self._epoch(epoch)[chunk * self._chunk_blocks : (chunk + 1) * self._chunk_blocks]
            end_B = self._bounds[torch.searchsorted(self._bounds, first_B, right=True)]  # of the block's shard
            row_BR = first_B[:, None] + torch.arange(self.mixing.block_rows)
            row_N = row_BR[row_BR < end_B[:, None]]
            order = torch.randperm(len(row_N), generator=seeded("store rows", self.seed, number))
            yield take_pair(self.store, self.target, "train", row_N[order])

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
            "block_rows": self.mixing.block_rows,
            "mix_shards": self.mixing.shards,
            "order_seed": self.seed,
            **({} if self.target is None else {"target": self.target.identity}),
        }

    def _epoch(self, epoch: int) -> Tensor:
        """(n_blocks,) int64: first row of each block of one epoch, in its order."""
        if self._order is None or self._order[0] != epoch:
            generator = seeded("store blocks", self.seed, epoch)
            shards = torch.randperm(len(self._bounds) - 1, generator=generator).tolist()
            groups = []
            for first in range(0, len(shards), self.mixing.shards):
                group = [self._blocks_of(s) for s in shards[first : first + self.mixing.shards]]
                first_B = torch.cat(group)
                groups.append(first_B[torch.randperm(len(first_B), generator=generator)])
            self._order = epoch, torch.cat(groups)
        return self._order[1]

    def _blocks_of(self, shard: int) -> Tensor:
        """First row of each of a shard's blocks."""
        return torch.arange(int(self._bounds[shard]), int(self._bounds[shard + 1]), self.mixing.block_rows)
