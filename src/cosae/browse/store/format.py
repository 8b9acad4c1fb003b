"""A feature store's files, as they are written and read back.

    store.json                 the record: the pass, norms, SAEs, pairings, concepts, bytes and SHA-256 of every file
    vocabulary.parquet         id, text of every token id that occurs
    sae0/features.parquet      a row a feature, sorted by id: numbers (F,) and short lists (F, n)
    sae0/examples-0.parquet    a row an example, features ascending; a file holds FILE_FEATURES features, a row group
                               GROUP_FEATURES of them, so that one feature is one short read
    sae0/codes.parquet         token, value: codes of the sample by feature; features.parquet says where each begins
    texts.parquet              id, sequence, pair (counts for all SAEs, no sink) of the sample: the first tokens
    pictures.parquet           sequence, png of images; only where the pass was over images
    sae0/explanations.json     what `cosae explain` found, a record of its own

Missing numbers are NaN, missing ids −1. Pages carry checksums that are verified as they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosae.errors import CosaeError

Array = NDArray[Any]
Columns = Mapping[str, Array]

FORMAT, VERSION = "cosae-features", 1
RECORD, VOCABULARY, FEATURES, EXPLANATIONS = "store.json", "vocabulary.parquet", "features.parquet", "explanations.json"
PICTURES, PICTURE_ROWS = "pictures.parquet", 256
TEXTS, CODES, CODE_ROWS = "texts.parquet", "codes.parquet", 65_536
FILE_FEATURES, GROUP_FEATURES, TABLE_ROWS = 4096, 16, 256
SINK, COUNTED, REAL = 1, 2, 4
"""Bits of an example's flags."""
BINS_OCTAVE, SHOWN_BINS, FINE_BINS = 4, 64, 16
"""Of a histogram of |value|: bins in which values double, and how many bins; FINE_BINS: in an octave of histogram_top,
the highest bin in which anything fell."""
KAPPA_ONE = 32767
"""κ is kept as a sixteen-bit fraction of this: exact to 1.5e-5."""


def parquet() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet. Raises CosaeError without them."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise CosaeError(
            "the feature browser keeps Parquet files, which need pyarrow: pip install 'cosae[browse]'."
        ) from None
    return pa, pq


def example_file(feature: int) -> str:
    """Name of the file that holds a feature's examples."""
    return f"examples-{feature // FILE_FEATURES}.parquet"


def _arrow(pa: Any, columns: Columns) -> Any:
    """One-dimensional arrays as they are, (N, n) as lists of a fixed size."""
    fields = {}
    for name, value in columns.items():
        flat = pa.array(np.ascontiguousarray(value).reshape(-1))
        fields[name] = flat if value.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, value.shape[1])
    return pa.table(fields)


class RowWriter:
    """A Parquet file written a row group at a time; a context manager. All groups have the same columns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: Any = None

    def __enter__(self) -> RowWriter:
        return self

    def add(self, columns: Columns) -> None:
        """One row group. Raises OSError."""
        pa, pq = parquet()
        table = _arrow(pa, columns)
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._path, table.schema, compression="zstd", write_page_checksum=True, use_dictionary=False
            )
        self._writer.write_table(table, row_group_size=max(table.num_rows, 1))

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


def write_rows(path: Path, columns: Columns, rows_per_group: int) -> None:
    """A whole file, so many rows a group."""
    n = len(next(iter(columns.values())))
    with RowWriter(path) as writer:
        for first in range(0, max(n, 1), rows_per_group):
            writer.add({name: value[first : first + rows_per_group] for name, value in columns.items()})


class RowReader:
    """A Parquet file of the store, its footer read once. Not for several threads at once."""

    def __init__(self, path: Path) -> None:
        _, pq = parquet()
        self._path = path
        self._last: tuple[int, dict[str, Array]] | None = None
        with _readable(path):
            self._file = pq.ParquetFile(path, memory_map=False, page_checksum_verification=True)

    def group(self, number: int) -> dict[str, Array]:
        """One row group, by column; the last one is kept. Raises CosaeError for a file that is damaged, as `all`."""
        if self._last is None or self._last[0] != number:
            with _readable(self._path):
                self._last = number, _numpy(self._file.read_row_group(number, use_threads=False))
        return self._last[1]

    def all(self, columns: list[str] | None = None) -> dict[str, Array]:
        """The whole file, by column."""
        pa, _ = parquet()
        with _readable(self._path):
            found = {name: value.copy() for name, value in _numpy(self._file.read(columns, use_threads=False)).items()}
        pa.default_memory_pool().release_unused()  # it would keep as much again
        return found

    def close(self) -> None:
        self._file.close()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    pa, _ = parquet()
    try:
        yield
    except (OSError, pa.ArrowException):
        raise CosaeError(f"{path} is damaged or gone: build the store again.") from None


def _numpy(table: Any) -> dict[str, Array]:
    pa, _ = parquet()
    found = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        is_list = pa.types.is_fixed_size_list(column.type)
        flat = (column.flatten() if is_list else column).to_numpy(zero_copy_only=False)
        found[name] = flat.reshape(-1, column.type.list_size) if is_list else flat
    return found
