"""Labelled texts by name → texts and the class of each, as data for probing.

Enters: a .jsonl or .parquet file, a folder written by `datasets`' save_to_disk, or "hf:DATASET[:CONFIG][:SPLIT]".
Leaves: `LabelledTexts`. Any set with a text and a label in every row will do: labels are strings, whole numbers or
booleans, and a class is whatever label occurs.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosae.errors import CosaeError

MOST_CLASSES = 200
"""More distinct labels than this are no classes (a score, an id): refused."""


@dataclass(frozen=True)
class LabelledTexts:
    """Texts of one data set and the class of each.

    classes   names of the classes, sorted: numbers by size, everything else as text
    class_N   (N,) int64 index into classes
    """

    name: str
    texts: tuple[str, ...]
    classes: tuple[str, ...]
    class_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def of(cls, name: str, texts: Iterable[str], labels: Iterable[str | int | bool]) -> LabelledTexts:
        """From texts and as many labels. Raises CosaeError where they differ in number, or make no classes."""
        listed, named = tuple(texts), [_named(label, name) for label in labels]
        if len(listed) != len(named):
            raise CosaeError(f"{name} must have one label for each text. Got {len(listed)} and {len(named)} instead.")
        classes = _in_order(set(named))
        if not 2 <= len(classes) <= MOST_CLASSES:
            raise CosaeError(
                f"{name} must have between 2 and {MOST_CLASSES} different labels to be probed. Got {len(classes)} "
                f"in {len(listed)} rows: name the column that holds the class."
            )
        place = {label: i for i, label in enumerate(classes)}
        return cls(name, listed, classes, np.array([place[label] for label in named], dtype=np.int64))


def read_labelled(spec: str, *, text: str = "text", label: str = "label", n_rows: int | None = None) -> LabelledTexts:
    """The labelled texts that `spec` names.

    spec is one of
        FILE.jsonl      one object a line
        FILE.parquet    one row a text
        FOLDER          a data set or one split of it, written by `datasets`' save_to_disk (of several splits: train)
        hf:DATASET[:CONFIG][:SPLIT]   streamed from the Hugging Face hub; SPLIT is train if unsaid
    text, label   the columns that hold them
    n_rows        read at most the first n_rows; all by default (a set sorted by label needs all)

    Raises CosaeError for a spec that names nothing, a row without text or label, and labels that make no classes.
    """
    read = _read_hub(spec) if spec.startswith("hf:") else _read_path(Path(spec), (text, label))
    texts: list[str] = []
    labels: list[str | int | bool] = []
    for number, row in enumerate(itertools.islice(read, n_rows)):
        where = f"{spec}, row {number}"
        if not isinstance(row, dict) or text not in row or label not in row:
            keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise CosaeError(
                f"each row must hold a text under {text!r} and its class under {label!r}. Got {keys} at {where}: name "
                "the columns."
            )
        if not isinstance(row[text], str):
            raise CosaeError(f"the text of a row must be a string. Got {type(row[text]).__name__} at {where} instead.")
        # JSON can spell half a surrogate pair, which no tokenizer takes
        texts.append(row[text].encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        labels.append(row[label])
    name = spec.removeprefix("hf:") if spec.startswith("hf:") else Path(spec).stem
    return LabelledTexts.of(name, texts, labels)


def _named(label: Any, name: str) -> str:
    if isinstance(label, str | bool | int | np.integer):
        return str(label)
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    raise CosaeError(
        f"labels must be strings, whole numbers or booleans. Got {label!r} in {name} instead: name the column that "
        "holds the class."
    )


def _in_order(labels: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(labels))


def _read_path(path: Path, columns: tuple[str, str]) -> Iterator[Any]:
    if path.is_dir():
        return _read_saved(path)
    if not path.is_file():
        raise CosaeError(
            "labelled texts must be an existing .jsonl or .parquet file, a folder written by datasets' save_to_disk, "
            f"or 'hf:DATASET[:CONFIG][:SPLIT]'. Got {str(path)!r}, which does not exist, instead."
        )
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".parquet"):
        raise CosaeError(f"a file of labelled texts must be .jsonl or .parquet. Got {path.name!r} instead.")
    return _read_jsonl(path) if suffix == ".jsonl" else _read_parquet(path, columns)


def _read_jsonl(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise CosaeError(
                        f"each line must be one JSON object. Got {path.name}, line {number}: {error}."
                    ) from None


def _read_parquet(path: Path, columns: tuple[str, str]) -> Iterator[Any]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise CosaeError("reading .parquet needs pyarrow: pip install 'cosae[lm]'.") from None
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise CosaeError(f"{path.name} must be a Parquet file. Got {error}.") from None
    there = [column for column in columns if column in file.schema_arrow.names]
    if len(there) < 2:
        names = ", ".join(file.schema_arrow.names)
        raise CosaeError(
            f"{path.name} must have the columns {' and '.join(columns)}. It has {names}: name the columns."
        )
    for batch in file.iter_batches(batch_size=256, columns=there):
        yield from batch.to_pylist()


def _read_saved(path: Path) -> Iterator[Any]:
    datasets = _datasets(str(path))
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # many ways to be no data set, in one sentence
        raise CosaeError(
            f"{path} must be a folder written by datasets' save_to_disk. Got {type(error).__name__}."
        ) from None
    if hasattr(found, "column_names") and isinstance(found.column_names, dict):  # several splits
        if "train" not in found:
            raise CosaeError(f"{path} holds the splits {', '.join(found)}: give the folder of one of them.")
        found = found["train"]
    return iter(found)


def _read_hub(spec: str) -> Iterator[Any]:
    name, *rest = spec.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise CosaeError(f"a hub set must be 'hf:DATASET[:CONFIG][:SPLIT]'. Got {spec!r} instead.")
    datasets = _datasets(spec)
    try:
        rows = datasets.load_dataset(
            name, rest[0] if len(rest) == 2 else None, split=rest[-1] if rest else "train", streaming=True
        )
    except Exception as error:  # the hub's many ways to fail, in one sentence
        raise CosaeError(f"the hub must be able to stream {spec!r}. Got {type(error).__name__}: {error}") from error
    return iter(rows)


def _datasets(spec: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise CosaeError(f"reading {spec!r} needs the datasets package: pip install 'cosae[lm]'.") from None
    return datasets
