"""Rows of .jsonl and .parquet files and of Hugging Face data sets, as mappings, one at a time.

What their specs mean: cosae.text.documents.read_documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cosae.errors import CosaeError, short
from cosae.io.untrusted import check_plain, one_line, one_sentence, parse_json
from cosae.text.worker import said

MAX_LINE_BYTES = 2**28


def read_jsonl(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    """Each line's number, from 1, and its value; blank lines are passed over. Raises CosaeError naming the line."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            if line.strip():
                try:
                    if len(line) > MAX_LINE_BYTES:
                        raise ValueError(f"it has more than {MAX_LINE_BYTES} bytes")
                    value = parse_json(line, finite=False)
                except ValueError as error:
                    said = one_line(error)
                    raise CosaeError(f"each line must be JSON. Got {name}, line {number}: {said}.") from None
                yield number, value


def read_parquet(
    path: Path, name: str, columns: Sequence[str], extra: Sequence[str] = (), advice: str = "name the columns"
) -> Iterator[dict[str, Any]]:
    """Rows of the columns, and of the extra ones that are there. Raises CosaeError for a file without a column."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise CosaeError("Reading .parquet needs pyarrow: pip install 'cosae[lm]'.") from None
    with one_sentence(f"{name} must be a whole Parquet file"):
        file = parquet.ParquetFile(path)
        there = file.schema_arrow.names
        if not set(columns) <= set(there):
            wanted = " and ".join(map(repr, columns))
            raise CosaeError(
                f"{name} must have the column {wanted}. Got the columns {short(sorted(there))} instead: {advice}."
            )
        chosen = [c for c in dict.fromkeys((*columns, *extra)) if c in there]
        for batch in file.iter_batches(batch_size=256, columns=chosen):
            yield from batch.to_pylist()


def is_saved_dataset(path: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    )


def open_dataset(
    spec: str, order_key: Sequence[int] | None = None, encoded: str | None = None
) -> Iterator[tuple[int, Any]]:
    """Each row's number, from 0, and the row. order_key: seeds of another order than its own, for a data set on disk.
    encoded: a column whose images or sounds are given as the bytes of their files.

    Raises CosaeError at the call for one that cannot be opened, and while reading for whatever the data set itself
    raises, naming the row.
    """
    name, *rest = spec.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise CosaeError(f"A hub corpus must be 'hf:DATASET[:CONFIG][:SPLIT]'. Got {spec!r} instead.")
    try:
        import datasets
    except ImportError:
        raise CosaeError(
            f"Reading {spec!r} must go through the datasets package, which is not installed: pip install 'cosae[lm]'."
        ) from None
    if is_saved_dataset(Path(name)):
        rows = _encoded(_open_saved(datasets, name, rest[-1] if rest else None, spec), encoded)
        order = np.arange(len(rows))
        if order_key is not None:
            order = np.random.default_rng(list(order_key)).permutation(order)
        return _rows(_sound(rows, order), spec, order)
    config = rest[0] if len(rest) == 2 else None
    rows = _try(spec, datasets.load_dataset, name, config, split=rest[-1] if rest else "train", streaming=True)
    return _rows(_encoded(rows, encoded), spec)


def _encoded(rows: Any, column: str | None) -> Any:
    if column is None:
        return rows
    feature: Any = (rows.features or {}).get(column)
    return rows.cast_column(column, type(feature)(decode=False)) if hasattr(feature, "decode") else rows


def _open_saved(datasets: Any, path: str, split: str | None, spec: str) -> Any:
    check_plain(Path(path), "**/*")
    rows = _try(spec, datasets.load_from_disk, path)
    if isinstance(rows, dict):  # a DatasetDict
        if (split or "train") not in rows:
            raise CosaeError(
                f"The data set {spec!r} must have the split {split or 'train'!r}. It has {', '.join(rows)}: name one, "
                f"as in 'hf:{path}:{next(iter(rows), 'SPLIT')}'."
            )
        return rows[split or "train"]
    if split is not None:
        raise CosaeError(f"The data set {spec!r} was saved without splits: leave ':{split}' out.")
    return rows


def _try(spec: str, load: Any, *args: Any, **options: Any) -> Any:
    try:
        return load(*args, **options)
    except Exception as error:  # the hub's and the disk's many ways to fail, in one sentence
        raise CosaeError(f"The data set {spec!r} cannot be opened: {said(error)}.") from error


def _sound(rows: Any, order: Iterable[int]) -> Iterator[Any]:
    """Rows of a data set on disk by their numbers. Files are mapped as they are, and a damaged one may point anywhere:
    each batch of rows is checked before the first of it is read."""
    batches = rows.data.to_batches() if rows._indices is None else [rows.data.table]
    ends, checked = np.cumsum([len(batch) for batch in batches]), set[int]()
    for number in order:
        at = int(np.searchsorted(ends, number, side="right")) if rows._indices is None else 0
        if at not in checked:
            batches[at].validate(full=True)
            checked.add(at)
        yield rows[int(number)]


def _rows(rows: Any, spec: str, numbers: Iterable[int] | None = None) -> Iterator[tuple[int, Any]]:
    reading = iter(rows)
    for number in itertools.count() if numbers is None else numbers:
        try:
            row = next(reading)
        except StopIteration:
            return
        except Exception as error:
            raise CosaeError(f"The data set {spec!r} failed at row {number}: {said(error)}.") from error
        yield int(number), row


def valid_text(text: str) -> str:
    """The text with replacement marks for half surrogate pairs, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
