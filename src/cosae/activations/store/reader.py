"""A finished store, opened.

    STORE/index.json → sizes and headers of all shards checked → a shard's SHA-256 checked the first time it is read

What is not as it was written is named and refused before a row of it is handed out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosae.activations.store.format import (
    CAPTURE,
    COLUMNS,
    FORMAT,
    INDEX,
    SIDES,
    STORE_DTYPES,
    VERSION,
    ShardShape,
    ShardTag,
    restore_rows,
    store_dtype,
)
from cosae.activations.store.shards import MappedShard, Shard
from cosae.errors import CosaeError, short
from cosae.io.digest import value_digest
from cosae.io.kind import which_is
from cosae.io.records import read_record
from cosae.types import Activations, Site

MAPPED_SHARDS = 64
"""Shards mapped at once, and mixed into one another by `StoreSource`."""

Rows = NDArray[np.int64]


class Store:
    """A finished store of one site, opened. Raises CosaeError for a folder that is none, an index that is damaged,
    and a shard that is missing, cut short or another's, naming it.

    check       False leaves the shards for `faults` to look at
    record      what index.json says
    d_in, dtype width of the rows and how they are stored
    site        where in the model they were read; None where the store does not know
    concepts    names of the label bits; None where rows have no labels
    centred     whether rows of any shard are stored relative to an offset
    """

    def __init__(self, folder: str | Path, check: bool = True) -> None:
        self.folder = Path(folder)
        self.record = _read_index(self.folder)
        try:
            request = self.record["request"]
            self.d_in, self.dtype = int(request["d_in"]), store_dtype(str(request["dtype"]))
            self.concepts: tuple[str, ...] | None = None if request["concepts"] is None else tuple(request["concepts"])
            self.site = Site(**request["site"]) if request.get("site") else None
            self._shards: dict[str, list[Shard]] = {side: self._list_shards(side) for side in SIDES}
            assert all(self.n_rows(side) == sum(self.shard_rows(side)) for side in SIDES)
            assert self.record["statistics"]["rows"] == self.n_rows("train")
            assert all(isinstance(name, str) for side in SIDES for name in self.documents(side))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, AssertionError):
            raise CosaeError(f"{self.folder / INDEX} is no index that cosae wrote: its fields do not fit.") from None
        self.centred = any(shard.shape.centred for side in SIDES for shard in self._shards[side])
        self.identity = value_digest(self.record)
        self._checked: set[Shard] = set()
        self._mapped: dict[Shard, MappedShard] = {}
        for side in SIDES if check else ():
            for shard in self._shards[side]:
                _refuse(shard, shard.header_fault())

    def _list_shards(self, side: str) -> list[Shard]:
        store, entries = value_digest(self.record["request"]), self.record["shards"]
        shape = ShardShape(0, self.d_in, self.dtype, -(-len(self.concepts or ()) // 8))
        mine = [entry for entry in entries if entry["side"] == side]
        return [Shard.listed(self.folder, ShardTag(store, side, n), entry, shape) for n, entry in enumerate(mine)]

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
        return [shard.shape.rows for shard in self._shards[side]]

    def take(self, side: str, row_N: Tensor) -> Activations:
        """Rows by their numbers within a side, in any order, copied out of the mapped files; rows of int8 and of
        centred stores become float32.

        Raises CosaeError, naming the shard, where one is not what was written.
        """
        n, kind = len(row_N), STORE_DTYPES[self.dtype]
        stored_ND = torch.empty(n, self.d_in, dtype=kind)
        columns = {"norm": torch.empty(n), "special": torch.empty(n, dtype=torch.bool)}
        columns |= {name: torch.empty(n, dtype=torch.int32) for name in ("token", "document", "position", "index")}
        if self.dtype == "int8":
            columns["scale"] = torch.empty(n)
        bits_ND = stored_ND.view(torch.int16).numpy() if kind == torch.bfloat16 else stored_ND.numpy()
        into = {"x": bits_ND} | {name: column.numpy() for name, column in columns.items()}
        offsets: list[tuple[Tensor, Tensor]] = []
        for mapped, place_K, local_K in self._by_shard(side, row_N):
            found = mapped.column
            for name, target in into.items():
                target[place_K] = found[name][local_K]
            if "offset" in found:
                offsets.append((torch.from_numpy(place_K), torch.from_numpy(found["offset"].copy())))
        for mapped in self._mapped.values():
            mapped.release()
        x_ND = restore_rows(stored_ND, columns.get("scale"))
        if self.centred:
            x_ND = x_ND.float()
        for places, offset_D in offsets:
            x_ND[places] += offset_D
        return Activations(x_ND=x_ND, **{field: columns[name] for name, field in COLUMNS.items()})

    def _by_shard(self, side: str, row_N: Tensor) -> Iterator[tuple[MappedShard, Rows, Rows]]:
        """Each shard that has some of the rows: their places among row_N, and their numbers within it, ascending: the
        disk is read forwards."""
        rows = row_N.numpy()
        order_N = np.argsort(rows, kind="stable")
        firsts = np.cumsum([0, *self.shard_rows(side)])
        ends = np.searchsorted(rows[order_N], firsts)
        for s, (a, b) in enumerate(itertools.pairwise(ends.tolist())):
            if a < b:
                place_K = order_N[a:b]
                yield self._open(self._shards[side][s]), place_K, rows[place_K] - firsts[s]

    def labels(self, side: str, row_N: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(N, C) and (N,) bool: concept labels of rows (by number), and whether they could be labelled."""
        if self.concepts is None:
            raise CosaeError(f"{self.folder} holds no concept labels: its corpus has none.")
        packed_NL = np.empty((len(row_N), -(-len(self.concepts) // 8)), dtype=np.uint8)
        labelled_N = np.empty(len(row_N), dtype=bool)
        for mapped, place_K, local_K in self._by_shard(side, row_N):
            packed_NL[place_K] = mapped.column["labels"][local_K]
            labelled_N[place_K] = mapped.column["labelled"][local_K]
        labels_NC = np.unpackbits(packed_NL, axis=1, count=len(self.concepts), bitorder="little").astype(bool)
        return labels_NC, labelled_N

    def faults(self) -> Iterator[str]:
        """One sentence for each shard that is not what was written, after reading every byte."""
        for side in SIDES:
            for shard in self._shards[side]:
                fault = shard.header_fault() or shard.content_fault() or self._wrong_side(shard)
                if fault:
                    yield f"{shard.path}: {fault}"

    def _wrong_side(self, shard: Shard) -> str | None:
        """A document of the other side would break the split."""
        document_N, side = shard.map().column["document"], shard.tag.side
        border = len(self.documents("held_out"))
        first, last = (0, border) if side == "held_out" else (border, border + len(self.documents("train")))
        wrong = document_N[(document_N >= 0) & ((document_N < first) | (document_N >= last))]
        return f"document {wrong[0]} is not one of the {side} side" if len(wrong) else None

    def _open(self, shard: Shard) -> MappedShard:
        """A shard, mapped; the first time, every byte of it is checked."""
        if shard not in self._mapped:
            _refuse(shard, shard.header_fault() if shard in self._checked else shard.content_fault())
            self._checked.add(shard)
            while len(self._mapped) >= MAPPED_SHARDS:
                del self._mapped[next(iter(self._mapped))]
            self._mapped[shard] = shard.map()
        return self._mapped[shard]


def _refuse(shard: Shard, fault: str | None) -> None:
    if fault is not None:
        raise CosaeError(f"{shard.path} is damaged: {fault}. Put back a copy of it, or capture the store again.")


def find_stores(folder: str | Path) -> list[Path]:
    """The folder itself where it holds a store, finished or not, else the stores directly below it, by name."""
    folder = Path(folder)

    def holds(place: Path) -> bool:
        return (place / INDEX).exists() or (place / CAPTURE).exists()

    if holds(folder):
        return [folder]
    return sorted(place for place in folder.glob("*") if place.is_dir() and holds(place))


def open_store(folder: str | Path, site: str | None = None) -> Store:
    """The store in a folder, or of one site where the folder holds one for each of several sites.

    site: any of a site's names; needed only where there are several. Raises CosaeError as `Store` does, and for a
    site that is not there, or not named where there are several.
    """
    places = find_stores(folder)
    if not places:
        what = f"{folder}{which_is(Path(folder))}"
        raise CosaeError(f"{what} holds no store (no {INDEX} in it or below it); make one with `cosae capture`.")
    names = ", ".join(place.name for place in places)
    if len(places) == 1:
        store = Store(places[0])
        if site is None or (store.site is not None and store.site.is_named(site)):
            return store
        holds = "no site that it knows" if store.site is None else store.site.name
        raise CosaeError(f"{folder} is a store of {holds}, not of {site}: drop the site, or give another store.")
    if site is None:
        raise CosaeError(f"{folder} holds a store for each of several sites ({names}): name one of these folders.")
    for place in places:
        if place.name == site or (place / INDEX).exists():
            store = Store(place)
            if store.site is not None and store.site.is_named(site):
                return store
    raise CosaeError(f"{folder} holds no store for the site {site!r}; it has {names}.")


def _read_index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).exists():
        if (folder / CAPTURE).exists():
            raise CosaeError(f"{folder} is a store that is not finished: give its `cosae capture` command again.")
        raise CosaeError(f"{folder} holds no store (no {INDEX}); make one with `cosae capture`.")
    record = read_record(folder / INDEX)
    if record.get("format") != FORMAT:
        raise CosaeError(f"{folder / INDEX} is not the index of a store: its format is {short(record.get('format'))}.")
    version = record.get("version")
    if type(version) is not int or version < 1:
        raise CosaeError(f"{folder / INDEX} is no index that cosae wrote: its version is {short(version)}.")
    if version > VERSION:
        raise CosaeError(f"{folder} was written by a later cosae (version {short(version)}): upgrade cosae.")
    return record
