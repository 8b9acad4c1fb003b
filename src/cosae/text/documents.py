"""A corpus by name → documents (name, text) of one of its splits, lazily.

A document's side is a function of its text alone, so train and held-out are disjoint by construction: whatever the
order, the place, or what else is read beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

from cosae.errors import CosaeError, check_choice, check_range
from cosae.io.fetched.packages import CORPORA, text_of
from cosae.shown import counted
from cosae.text import pylib
from cosae.text.files import Reading, Tally, document_of, read_path
from cosae.text.pylib import Document, Split
from cosae.text.rows import is_saved_dataset, open_dataset


def split_of(document: Document, held_out_frac: float = 0.1, seed: int = 0) -> Split:
    """The side of any document, by a hash of its text: equal texts never fall on both sides."""
    head = hashlib.sha256(f"{seed}:".encode() + document.text.encode()).digest()[:8]
    return "held_out" if int.from_bytes(head, "big") < held_out_frac * 2**64 else "train"


@cache
def pylib_sides(max_chars: int | None = None) -> Mapping[bytes, Split]:
    """SHA-256 of each text of the embedded corpus, cut as asked → its side, for corpora that are read beside it."""
    sides: dict[bytes, Split] = {}
    for split in ("train", "held_out"):  # where cutting makes two texts one, held out wins
        for document in _cut(iter(pylib.documents(split)), max_chars):
            sides[_key(document)] = split
    return sides


def read_documents(
    spec: str,
    split: Split | Literal["all"] = "all",
    *,
    held_out_frac: float = 0.1,
    seed: int = 0,
    include_tests: bool = False,
    reading: Reading | None = None,
    sides: Mapping[bytes, Split] | None = None,
    order_key: Sequence[int] | None = None,
    tally: Tally | None = None,
) -> Iterator[Document]:
    """Documents of one split of a corpus, lazily.

    spec is one of
        pylib           the standard library of this Python; its split is pylib's own, by file name
        FOLDER          every text or source file below it, sorted by name; or a data set written by `save_to_disk`
        FILE.txt        one document, or its paragraphs or lines (`Reading.txt_unit`)
        FILE.jsonl      one document a line: text under "text", name under "name" or "id" if there
        FILE.parquet    one document a row, likewise
        wiki:en, wiki:fr, wiki:es   introductions of Wikipedia, once `cosae fetch wiki` brought them
        hf:DATASET[:CONFIG][:SPLIT]   streamed from the Hugging Face hub, likewise; SPLIT is train if unsaid; DATASET
                        may be a local folder
    reading  where rows have their text, which files of a folder count, where documents are cut
    sides    texts (by SHA-256) whose side is known: what is read beside `pylib` takes its sides
    order_key  seeds of another order of a folder's files, or of the rows of a data set on disk: sorted, any stretch of
               it would be one corner
    tally    filled while reading

    Documents with nothing but white space are passed over. Corpora other than pylib split by
    `split_of(document, held_out_frac, seed)`, on the text as `reading.max_chars` leaves it. Raises CosaeError at the
    call for a spec that names nothing, and while reading for a row without text or a split that turns out empty.
    """
    check_choice("split", split, ("train", "held_out", "all"))
    check_range("held_out_frac", held_out_frac, "[0, 1]")
    reading, tally = reading or Reading(), tally or Tally()
    if spec == "pylib":
        return _cut(iter(pylib.documents(split, include_tests)), reading.max_chars)
    place = text_of(spec, CORPORA)
    if place != spec:
        reading = replace(reading, text_field="text")  # its own files, whatever those beside it are like
    if spec.startswith("hf:") or is_saved_dataset(Path(spec)):
        name = spec.removeprefix("hf:").split(":")[0]
        rows = open_dataset(spec, order_key)
        read: Iterator[Document] = (document_of(row, f"{spec}, row {n}", f"{name}:{n}", reading) for n, row in rows)
    else:
        read = read_path(Path(place), reading, tally, order_key)
    cut = _cut(read, reading.max_chars)

    def chosen() -> Iterator[Document]:
        for document in cut:
            tally.read += 1
            if not document.text or document.text.isspace():
                tally.blank += 1
                continue
            known = sides.get(_key(document)) if sides else None
            if split in ("all", known or split_of(document, held_out_frac, seed)):
                tally.chosen += 1
                yield document
        if not tally.chosen:
            raise _empty(spec, split, tally)

    return chosen()


def _cut(documents: Iterator[Document], max_chars: int | None) -> Iterator[Document]:
    return (d._replace(text=d.text[:max_chars]) for d in documents)


def _key(document: Document) -> bytes:
    return hashlib.sha256(document.text.encode()).digest()


def _empty(spec: str, split: str, tally: Tally) -> CosaeError:
    read = counted(tally.read, "document")
    passed = f", passed over {tally.warning}" if tally.warning else ""
    if tally.read == tally.blank:
        return CosaeError(
            f"The corpus {spec} must hold at least one document with text. Got {read}, none with "
            f"text{passed}: name another corpus."
        )
    return CosaeError(
        f"The corpus {spec} must hold at least one document in its {split!r} split. Got {read}, "
        f"none of them there{passed}: give more documents (a .txt file is one, unless data.txt_unit is paragraph "
        "or line) or change data.held_out_frac."
    )
