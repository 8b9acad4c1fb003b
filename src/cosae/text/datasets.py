"""Hugging Face `datasets` → documents: streamed from the hub, streamed from local files, or saved to disk.

hf:DATASET[:CONFIG][:SPLIT]   a data set of the hub, streamed
hf:FOLDER[:CONFIG][:SPLIT]    a folder that `load_dataset` reads, streamed, or one that `save_to_disk` wrote
FOLDER                        one that `save_to_disk` wrote is known by its files
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError
from cosae.text.files import Reading, document_of
from cosae.text.pylib import Document
from cosae.text.worker import said


def is_saved_dataset(path: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    )


def read_dataset(spec: str, reading: Reading) -> Iterator[Document]:
    """Documents of a data set, in its own order. Raises CosaeError at the call for one that cannot be opened, and while
    reading for a row without text or whatever the data set itself raises, naming the row."""
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
        rows = _open_saved(datasets, name, rest[-1] if rest else None, spec)
    else:
        config = rest[0] if len(rest) == 2 else None
        rows = _try(spec, datasets.load_dataset, name, config, split=rest[-1] if rest else "train", streaming=True)
    return _documents(rows, spec, name, reading.text_field)


def _open_saved(datasets: Any, path: str, split: str | None, spec: str) -> Any:
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


def _documents(rows: Any, spec: str, name: str, text_field: str) -> Iterator[Document]:
    number = 0
    try:
        for row in rows:
            yield document_of(row, f"{spec}, row {number}", f"{name}:{number}", text_field)
            number += 1
    except CosaeError:
        raise
    except Exception as error:
        raise CosaeError(f"The data set {spec!r} failed at row {number}: {said(error)}.") from error
