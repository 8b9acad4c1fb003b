"""Activations on disk, opened: a finished store, and the endless stream of chunks that training reads from it.

    STORE/index.json → sizes and headers of all shards checked → a shard's SHA-256 checked the first time it is read

What is not as it was written is named and refused before a row of it is handed out. Order of an epoch: the shards are
permuted and taken `MIX_SHARDS` at a time; the blocks of `BLOCK_ROWS` consecutive rows of such a group are permuted;
a chunk is as many of them as fit, its rows permuted once more. Reading touches only mapped memory and lets go of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cosae.activations.monitor import MARKS, NormReference
from cosae.activations.store.records import read_record
from cosae.activations.store.rounding import STORE_DTYPES, restore_rows
from cosae.activations.store.shards import COLUMNS, MappedShard, ShardShape, ShardTag, find_fault
from cosae.activations.store.writer import CAPTURE, FORMAT, INDEX, SIDES, VERSION
from cosae.errors import CosaeError, check_least
from cosae.io.digest import file_digest, value_digest
from cosae.io.generators import seeded
from cosae.types import Activations, Site

BLOCK_ROWS = 256
MIX_SHARDS = 8
CHUNK_BYTES = 64 * 2**20
"""A chunk holds this much in float32, but 1024 to 65 536 rows."""


class Piece(NamedTuple):
    """Rows first … last − 1 of shard number `shard` of a side."""

    shard: int
    first: int
    last: int


class Store:
    """A finished store of one site, opened. Raises CosaeError for a folder that is none, an index that is damaged,
    and a shard that is missing, cut short or another's, naming it.

    check       False leaves the shards for `faults` to look at
    record      what index.json says
    d_in, dtype width of the rows and how they are stored
    site        where in the model they were read; None where the store does not say
    concepts    names of the label bits; None where rows have no labels
    """

    def __init__(self, folder: str | Path, check: bool = True) -> None:
        self.folder = Path(folder)
        self.record = _read_index(self.folder)
        try:
            request = self.record["request"]
            self.d_in, self.dtype = int(request["d_in"]), str(request["dtype"])
            self.concepts: tuple[str, ...] | None = None if request["concepts"] is None else tuple(request["concepts"])
            self.site = Site(**request["site"]) if request.get("site") else None
            self._shards: dict[str, list[dict[str, Any]]] = {
                side: [entry for entry in self.record["shards"] if entry["side"] == side] for side in SIDES
            }
            for side in SIDES:
                assert self.n_rows(side) == sum(self.shard_rows(side))
                assert all(self._entry_is_plain(side, number) for number in range(len(self._shards[side])))
            assert self.record["statistics"]["rows"] == self.n_rows("train")
            assert self.dtype in STORE_DTYPES
        except (KeyError, TypeError, ValueError, AssertionError):
            raise CosaeError(f"{self.folder / INDEX} is no index that cosae wrote: its fields do not fit.") from None
        self.identity = value_digest(self.record)
        self._tag = value_digest(request)
        self._sound: set[tuple[str, int]] = set()
        self._mapped: dict[tuple[str, int], MappedShard] = {}
        for side in SIDES if check else ():
            for number in range(len(self._shards[side])):
                if fault := self._fault(side, number):
                    raise self._damaged(side, number, fault)

    @property
    def statistics(self) -> dict[str, Any]:
        """Mean, variance, norms and sinks of the train rows (cosae.activations.store.statistics)."""
        return dict(self.record["statistics"])

    def n_rows(self, side: str) -> int:
        """Rows of a side, "train" or "held_out"."""
        return int(self.record["rows"][side])

    def documents(self, side: str) -> list[str]:
        """Names of a side's documents."""
        names: list[str] = self.record["documents"][side]
        return names

    def shard_rows(self, side: str) -> list[int]:
        """Rows of each shard of a side."""
        return [int(entry["rows"]) for entry in self._shards[side]]

    def read(self, side: str, pieces: Sequence[Piece]) -> Activations:
        """The rows of `pieces`, in their order, copied out of the mapped files; int8 rows become float32.

        Raises CosaeError, naming the shard, where one is not what was written.
        """
        n = sum(piece.last - piece.first for piece in pieces)
        kind = STORE_DTYPES[self.dtype]
        stored_ND = torch.empty(n, self.d_in, dtype=kind)
        columns = {"norm": torch.empty(n), "special": torch.empty(n, dtype=torch.bool)}
        columns |= {name: torch.empty(n, dtype=torch.int32) for name in ("token", "document", "position", "index")}
        if self.dtype == "int8":
            columns["scale"] = torch.empty(n)
        bits_ND = stored_ND.view(torch.int16).numpy() if kind == torch.bfloat16 else stored_ND.numpy()
        into = {"x": bits_ND} | {name: column.numpy() for name, column in columns.items()}
        done = 0
        for shard, first, last in pieces:
            found = self._open(side, shard).column
            for name, target in into.items():
                target[done : done + last - first] = found[name][first:last]
            done += last - first
        for mapped in self._mapped.values():
            mapped.let_go()
        x_ND = restore_rows(stored_ND, columns.get("scale"))
        return Activations(x_ND=x_ND, **{field: columns[name] for name, field in COLUMNS.items()})

    def take(self, side: str, row_N: Tensor) -> Activations:
        """Rows by their numbers within a side, ascending."""
        return self.read(side, self._pieces(side, row_N))

    def labels(self, side: str, row_N: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(N, C) and (N,) bool: concept labels of rows (by number, ascending), and whether they could be labelled."""
        if self.concepts is None:
            raise CosaeError(f"{self.folder} holds no concept labels: its corpus has none.")
        parts = [
            (column["labels"][piece.first : piece.last], column["labelled"][piece.first : piece.last])
            for piece in self._pieces(side, row_N)
            for column in (self._open(side, piece.shard).column,)
        ]
        packed_NL = np.concatenate([labels for labels, _ in parts])
        labels_NC = np.unpackbits(packed_NL, axis=1, count=len(self.concepts), bitorder="little").astype(bool)
        return labels_NC, np.concatenate([labelled for _, labelled in parts])

    def _entry_is_plain(self, side: str, number: int) -> bool:
        entry = self._shards[side][number]
        sizes = isinstance(entry["rows"], int) and isinstance(entry["bytes"], int) and entry["rows"] > 0
        return sizes and entry["file"] == ShardTag("", side, number).file and isinstance(entry["sha256"], str)

    def faults(self) -> Iterator[str]:
        """One sentence for each shard that is not what was written, after reading every byte."""
        for side in SIDES:
            for number, entry in enumerate(self._shards[side]):
                fault = self._fault(side, number) or self._content_fault(side, number) or self._odd_rows(side, number)
                if fault:
                    yield f"{self.folder / entry['file']}: {fault}"

    def _pieces(self, side: str, row_N: Tensor) -> list[Piece]:
        """Stretches of consecutive rows within a shard that make up ascending row numbers."""
        rows = row_N.numpy()
        firsts = np.cumsum([0, *self.shard_rows(side)])
        shard_N = np.searchsorted(firsts, rows, side="right") - 1
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(shard_N) != 0)) + 1
        bounds = itertools.pairwise([0, *breaks.tolist(), len(rows)]) if len(rows) else []
        return [
            Piece(s := int(shard_N[a]), int(rows[a] - firsts[s]), int(rows[b - 1] - firsts[s]) + 1) for a, b in bounds
        ]

    def _open(self, side: str, number: int) -> MappedShard:
        """A shard, mapped; the first time, every byte of it is checked."""
        key = (side, number)
        if key in self._mapped:
            return self._mapped[key]
        if key not in self._sound:
            if fault := self._content_fault(side, number):
                raise self._damaged(side, number, fault)
            self._sound.add(key)
        elif fault := self._fault(side, number):
            raise self._damaged(side, number, fault)
        while len(self._mapped) >= MIX_SHARDS:
            del self._mapped[next(iter(self._mapped))]
        entry = self._shards[side][number]
        self._mapped[key] = MappedShard(self.folder / entry["file"], self._shape_of(side, number))
        return self._mapped[key]

    def _shape_of(self, side: str, number: int) -> ShardShape:
        return ShardShape(self._shards[side][number]["rows"], self.d_in, self.dtype, -(-len(self.concepts or ()) // 8))

    def _fault(self, side: str, number: int) -> str | None:
        entry = self._shards[side][number]
        return find_fault(self.folder, ShardTag(self._tag, side, number), self._shape_of(side, number), entry["bytes"])

    def _content_fault(self, side: str, number: int) -> str | None:
        entry = self._shards[side][number]
        try:
            same = file_digest(self.folder / entry["file"]) == entry["sha256"]
        except OSError as error:
            return f"it cannot be read ({error.strerror})"
        return None if same else "its checksum is not the one that was written: bits of it have changed"

    def _odd_rows(self, side: str, number: int) -> str | None:
        """A document of the other side would break the split."""
        path = self.folder / self._shards[side][number]["file"]
        document_N = MappedShard(path, self._shape_of(side, number)).column["document"]
        border = len(self.documents("held_out"))
        first, last = (0, border) if side == "held_out" else (border, border + len(self.documents("train")))
        odd = document_N[(document_N >= 0) & ((document_N < first) | (document_N >= last))]
        return f"document {odd[0]} is not one of the {side} side" if len(odd) else None

    def _damaged(self, side: str, number: int, fault: str) -> CosaeError:
        path = self.folder / self._shards[side][number]["file"]
        return CosaeError(f"{path} is damaged: {fault}. Put back a copy of it, or capture the store again.")


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

    @property
    def statistics(self) -> dict[str, Any]:
        """The store's own."""
        return self.store.statistics

    def norm_reference(self) -> NormReference:
        """Norm quantiles of all train rows, against which a stream holds what it reads."""
        found = dict(self.statistics["norm"]["quantiles"])
        return NormReference(tuple(float(found[mark]) for mark in MARKS), int(self.statistics["rows"]), "the store")

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
                group_N2 = torch.cat(
                    [_blocks_of(shard, self._rows[shard]) for shard in shards[first : first + MIX_SHARDS]]
                )
                groups.append(group_N2[torch.randperm(len(group_N2), generator=generator)])
            self._order = epoch, torch.cat(groups)
        return self._order[1]


def find_stores(folder: str | Path) -> list[Path]:
    """The folder itself where it holds a store, finished or not, else the stores directly below it, by name."""
    folder = Path(folder)

    def holds(place: Path) -> bool:
        return (place / INDEX).exists() or (place / CAPTURE).exists()

    if holds(folder) or not folder.is_dir():
        return [folder] if holds(folder) else []
    return sorted(place for place in folder.iterdir() if place.is_dir() and holds(place))


def open_store(folder: str | Path, site: str | None = None) -> Store:
    """The store in a folder, or of one site where the folder holds one for each of several sites.

    site: any of a site's names; needed only where there are several. Raises CosaeError as `Store` does, and for a
    site that is not there or not named.
    """
    places = find_stores(folder)
    if not places:
        raise CosaeError(f"{folder} holds no store (no {INDEX} in it or below it); make one with `cosae capture`.")
    if len(places) == 1:
        return Store(places[0])
    names = ", ".join(place.name for place in places)
    if site is None:
        raise CosaeError(f"{folder} holds a store for each of several sites ({names}): name one of these folders.")
    for place in places:
        if place.name == site or (place / INDEX).exists():
            store = Store(place)
            if store.site is not None and site in (store.site.name, store.site.hook_name, store.site.module_path):
                return store
    raise CosaeError(f"{folder} holds no store for the site {site!r}; it has {names}.")


def _blocks_of(shard: int, rows: int) -> Tensor:
    """(n, 2) int64: the shard and the first row of each of its blocks."""
    first_N = torch.arange(0, rows, BLOCK_ROWS)
    return torch.stack([torch.full_like(first_N, shard), first_N], 1)


def _read_index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).exists():
        if (folder / CAPTURE).exists():
            raise CosaeError(f"{folder} is a store that is not finished: give its `cosae capture` command again.")
        raise CosaeError(f"{folder} holds no store (no {INDEX}); make one with `cosae capture`.")
    record = read_record(folder / INDEX)
    if record.get("format") != FORMAT:
        raise CosaeError(f"{folder / INDEX} is not the index of a store: its format is {record.get('format')!r}.")
    if record["version"] > VERSION:
        raise CosaeError(f"{folder} was written by a later cosae (version {record['version']}): upgrade cosae.")
    return record
