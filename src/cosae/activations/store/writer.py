"""Activations → a store on disk, shard after shard, so that a stop at any moment costs no more than one shard.

The journal gets a line a complete shard, flushed before the next one is started. Resuming an unfinished store ends in
the same bytes as never having stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cosae.activations.store.format import (
    CAPTURE,
    FORMAT,
    INDEX,
    JOURNAL,
    MAX_FLOAT16,
    SIDES,
    VERSION,
    ShardShape,
    ShardTag,
    store_dtype,
)
from cosae.activations.store.shards import Shard, ShardRows, write_shard
from cosae.activations.store.statistics import describe_rows, noise_warning
from cosae.errors import CosaeError, check_least
from cosae.io.atomic import write_text
from cosae.io.digest import value_digest
from cosae.io.records import read_record, write_record
from cosae.io.untrusted import parse_json
from cosae.shown import counted


class StoreWriter:
    """One site's store in the making.

    folder        where; new, empty, or an unfinished store of the same request
    request       plain values that decide what the store holds; with `d_in`, `dtype` and `shard_tokens` they are what
                  a later call must repeat to go on
    written_by    commit, packages and the like: written down, not compared
    d_in          width of the activations
    dtype         float32, bfloat16, float16 or int8
    shard_tokens  rows per shard
    concepts      names of the label bits; None where rows have no labels
    log           gets what was found where an unfinished store is resumed

    Raises CosaeError for a folder that holds something else, a store of another request (naming what differs), and
    settings out of range. `finished`: whether there is nothing left to do.
    """

    def __init__(
        self,
        folder: Path,
        request: Mapping[str, Any],
        written_by: Mapping[str, Any],
        *,
        d_in: int,
        dtype: str,
        shard_tokens: int,
        concepts: Sequence[str] | None = None,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        check_least("shard_tokens", shard_tokens, 1)
        self.folder, self.d_in, self.dtype, self.shard_tokens = folder, d_in, store_dtype(dtype), shard_tokens
        complete = {**request, "d_in": d_in, "dtype": self.dtype, "shard_tokens": shard_tokens}
        complete["concepts"] = None if concepts is None else list(concepts)
        self.label_bytes = -(-len(concepts or ()) // 8)
        self.request: dict[str, Any] = json.loads(json.dumps(complete))
        self._shards: dict[str, list[Shard]] = {side: [] for side in SIDES}
        self._waiting: dict[str, list[ShardRows]] = {side: [] for side in SIDES}
        self._log = log
        self.finished = (folder / INDEX).exists()
        self.written_by = [dict(written_by)]
        if self.finished:
            check_request(folder, read_record(folder / INDEX)["request"], self.request)
            self._sweep()
        elif (folder / CAPTURE).exists():
            self._resume(dict(written_by))
        else:
            self._begin()

    def n_rows(self, side: str) -> int:
        """Rows of a side in complete shards on disk."""
        return sum(shard.shape.rows for shard in self._shards[side])

    def append(self, side: str, first_row: int, rows: ShardRows) -> None:
        """Rows first_row, first_row + 1, … of a side. Those already written are passed over.

        Raises CosaeError for rows that are not finite or not representable, naming document and position, and where
        the disk refuses.
        """
        have = self.n_rows(side) + sum(len(part) for part in self._waiting[side])
        assert first_row <= have, "rows must come without gaps"
        if first_row + len(rows) <= have:
            return
        rows = rows[have - first_row :] if first_row < have else rows
        self._check(rows)
        assert self.label_bytes == (0 if rows.labels_NL is None else rows.labels_NL.shape[1])
        self._waiting[side].append(rows)
        while sum(len(part) for part in self._waiting[side]) >= self.shard_tokens:
            rows = ShardRows.cat(self._waiting[side])
            rest = rows[self.shard_tokens :]
            self._waiting[side] = [rest] if len(rest) else []
            self._write(side, rows[: self.shard_tokens])

    def end(self, side: str) -> None:
        """No more rows of a side: what waits becomes its last shard."""
        if self._waiting[side]:
            self._write(side, ShardRows.cat(self._waiting[side]))
            self._waiting[side] = []

    def finish(self, documents: Mapping[str, Sequence[str]]) -> None:
        """Write the index: from now on the store is one.

        documents: names by side; a row's document id is its place in those of the held-out side followed by those of
        the train side. Raises CosaeError where there is no train row, and where the disk refuses.
        """
        for side in SIDES:
            self.end(side)
        train, held_out = self.n_rows("train"), self.n_rows("held_out")
        if not train:
            raise CosaeError(f"{self.folder} would hold no train rows: the corpus is empty or --tokens too small.")
        statistics = describe_rows(lambda: (shard.map().column for shard in self._shards["train"]))
        statistics["rounding_noise"] = max((shard.noise or 0.0) for shard in self._shards["train"])
        if warning := noise_warning(statistics, self.dtype):
            self._log(f"{self.folder}: {warning}")
        record = {
            "format": FORMAT,
            "version": VERSION if any(s.shape.centred for side in SIDES for s in self._shards[side]) else 1,
            "request": self.request,
            "written_by": self.written_by,
            "rows": {"train": train, "held_out": held_out},
            "statistics": statistics,
            "documents": {side: list(documents[side]) for side in SIDES},
            "shards": [shard.entry() for side in SIDES for shard in self._shards[side]],
        }
        try:
            write_record(self.folder / INDEX, record)
        except OSError as error:
            raise self._refused(INDEX, error) from None
        self.finished = True
        self._sweep()

    def _begin(self) -> None:
        try:
            there = self.folder.exists()
            if there and not (self.folder.is_dir() and all(path.name[0] == "." for path in self.folder.iterdir())):
                raise CosaeError(f"{self.folder} is not empty and holds no store: choose another place.")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_record(self.folder / CAPTURE, {"request": self.request, "written_by": self.written_by})
        except OSError as error:
            raise CosaeError(f"{self.folder} cannot be written ({error.strerror}); choose another place.") from None

    def _resume(self, written_by: dict[str, Any]) -> None:
        """Take stock of an unfinished store: complete shards count, anything else is written again."""
        started = read_record(self.folder / CAPTURE)
        check_request(self.folder, started["request"], self.request)
        self.written_by = list(started["written_by"])
        listed = list(_read_journal(self.folder / JOURNAL))
        shape = ShardShape(0, self.d_in, self.dtype, self.label_bytes)
        for side in SIDES:
            for entry in (entry for entry in listed if entry["side"] == side):
                try:
                    shard = Shard.listed(self.folder, self._next_tag(side), entry, shape)
                    fault = shard.header_fault() or shard.content_fault()
                except (ValueError, TypeError):
                    fault = "the journal's entry does not fit"
                if fault is not None:
                    self._log(f"{self.folder / str(entry['file'])}: {fault}; it is written again")
                    break
                self._shards[side].append(shard)
        kept = [shard.entry() for side in SIDES for shard in self._shards[side]]
        try:
            # written again, so that the next line does not go on from a partial one
            write_text(self.folder / JOURNAL, "".join(json.dumps(entry) + "\n" for entry in kept))
            if not kept:
                self.written_by = [written_by]
            elif self.written_by[-1] != written_by:
                self.written_by.append(written_by)
                self._log(f"{self.folder} was started with another commit or other packages; both are written down")
            write_record(self.folder / CAPTURE, {"request": self.request, "written_by": self.written_by})
        except OSError as error:
            raise self._refused(JOURNAL, error) from None

    def _next_tag(self, side: str) -> ShardTag:
        return ShardTag(value_digest(self.request), side, len(self._shards[side]))

    def _write(self, side: str, rows: ShardRows) -> None:
        tag = self._next_tag(side)
        try:
            shard = write_shard(self.folder, tag, rows, self.dtype)
            with (self.folder / JOURNAL).open("a", encoding="ascii") as journal:
                journal.write(json.dumps(shard.entry()) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
        except (OSError, SafetensorError) as error:
            raise self._refused(tag.file, error) from None
        self._shards[side].append(shard)

    def _refused(self, file: str, error: Exception) -> CosaeError:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0].rstrip(".")
        rows = sum(self.n_rows(side) for side in SIDES)
        return CosaeError(
            f"{self.folder / file} could not be written ({why}); {counted(rows, 'token')} before it "
            f"{'is' if rows == 1 else 'are'} kept: make room and "
            "give the same command again to go on."
        )

    def _check(self, rows: ShardRows) -> None:
        found = rows.activations
        if found.x_ND.shape[1] != self.d_in:
            raise CosaeError(f"the store is for width {self.d_in}. Got {found.x_ND.shape[1]} instead.")
        largest_N = found.x_ND.abs().amax(-1).float()
        limit = MAX_FLOAT16 if self.dtype == "float16" else float("inf")
        bad = (~((largest_N <= limit) & largest_N.isfinite() & found.norm_N.isfinite())).nonzero().flatten()
        if not len(bad):
            return
        row = int(bad[0])
        value, remedy = float(largest_N[row]), "run the model in bfloat16 or float32"
        what = f"Got {value}"
        if largest_N[row].isfinite() and found.norm_N[row].isfinite():
            what = f"float16 ends at 65504, and the largest value is {value:.0f}"
            remedy = "store them in bfloat16 or float32"
        raise CosaeError(
            f"activations in a store must be finite as stored. {what} at document {int(found.doc_N[row])}, position "
            f"{int(found.position_N[row])} ({len(bad)} such rows): {remedy}."
        )

    def _sweep(self) -> None:
        """A finished store needs no journal."""
        for name in (JOURNAL, CAPTURE):
            (self.folder / name).unlink(missing_ok=True)


def check_request(folder: Path, started: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raises CosaeError, naming each value, where a store was started with other settings than those asked for."""
    names = sorted(started.keys() | asked.keys())
    pairs = [(name, started.get(name, "(absent)"), asked.get(name, "(absent)")) for name in names]
    differing = [f"{name} is {there!r} there, {here!r} here" for name, there, here in pairs if there != here]
    if differing:
        raise CosaeError(
            f"{folder} holds a store that was captured otherwise: {'; '.join(differing)}. Give the settings it was "
            "started with, or choose another place."
        )


def _read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Entries up to the first line that is not one: a partial line, left by a kill, is the last."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            entry = parse_json(line)
            known = {name: entry[name] for name in ("file", "side", "rows", "bytes", "sha256")}
            known |= {name: entry[name] for name in ("centred", "noise") if name in entry}
        except (ValueError, KeyError, TypeError):
            return
        yield known


def started_request(folder: Path) -> dict[str, Any]:
    """The request of a store, finished or not."""
    place = folder / (INDEX if (folder / INDEX).exists() else CAPTURE)
    return dict(read_record(place)["request"])


def rows_written(folder: Path) -> int:
    """Rows in the complete shards of a store, finished or not."""
    if (folder / INDEX).exists():
        return sum(int(n) for n in read_record(folder / INDEX)["rows"].values())
    return sum(int(entry["rows"]) for entry in _read_journal(folder / JOURNAL))
