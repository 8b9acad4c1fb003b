"""A feature store's files, written into a folder that somebody else puts in place.

with staged(out) as folder:
    for place, sae in enumerate(saes):
        write_features(folder / f"sae{place}", columns)
        with ExampleWriter(folder / f"sae{place}") as examples:
            examples.add(rows)  # once for each GROUP_FEATURES features, in order
    write_vocabulary(folder, spelled)
    finish(folder, record)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from cosae.browse.store.format import (
    FEATURES,
    FILE_FEATURES,
    FORMAT,
    GROUP_FEATURES,
    PICTURE_ROWS,
    PICTURES,
    RECORD,
    TABLE_ROWS,
    VERSION,
    VOCABULARY,
    Columns,
    RowWriter,
    write_rows,
)
from cosae.io.digest import file_digest
from cosae.io.records import write_record


def write_features(folder: Path, columns: Columns) -> None:
    """An SAE's numbers and short lists, (F,) or (F, n) each."""
    folder.mkdir(exist_ok=True)
    some = {name: value for name, value in columns.items() if value.size}  # no matches where there is no other SAE
    write_rows(folder / FEATURES, some, TABLE_ROWS)


def write_vocabulary(folder: Path, spelled: Mapping[int, str]) -> None:
    """Texts of token ids; a lone half of a surrogate pair, which UTF-8 has no place for, becomes U+FFFD."""
    texts = [text.encode("utf-8", "replace").decode() for text in spelled.values()]
    columns = {"id": np.fromiter(spelled, np.int64, len(spelled)), "text": np.array(texts, dtype=object)}
    if not len(texts):
        columns["text"] = np.array([""], dtype=object)
        columns["id"] = np.array([-1])
    write_rows(folder / VOCABULARY, columns, max(len(texts), 1))


def write_pictures(folder: Path, pictures: Mapping[int, bytes]) -> None:
    """PNG of images by the number of their sequence."""
    numbers = np.fromiter(pictures, np.int64, len(pictures))
    data = np.array([*pictures.values(), b""], dtype=object)[:-1]
    write_rows(folder / PICTURES, {"sequence": numbers, "png": data}, PICTURE_ROWS)


class ExampleWriter:
    """An SAE's examples. `add` takes those of the next GROUP_FEATURES features, sorted by feature; there may be none,
    but its columns must be there: feature, group, interval, at, sequence, position (n,), document (n,) of str, and
    ids, value, r, kappa, flags (n, W)."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._first = folder, 0
        self._writer: RowWriter | None = None

    def __enter__(self) -> Self:
        return self

    def add(self, rows: Columns) -> None:
        if self._first % FILE_FEATURES == 0:
            self._close()
            self._writer = RowWriter(self._folder / f"examples-{self._first // FILE_FEATURES}.parquet").__enter__()
        assert self._writer is not None
        self._writer.add(rows)
        self._first += GROUP_FEATURES

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.__exit__()

    def __exit__(self, *_: object) -> None:
        self._close()


def finish(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record, with size and SHA-256 of every file there is. Raises OSError."""
    names = sorted(path for path in folder.rglob("*.parquet"))
    files = {path.relative_to(folder).as_posix(): [path.stat().st_size, file_digest(path)] for path in names}
    write_record(folder / RECORD, {"format": FORMAT, "version": VERSION, **record, "files": files})
