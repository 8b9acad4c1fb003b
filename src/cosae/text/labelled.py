"""Labelled texts by name → texts and the class of each, as data for probing.

Any set with a text and a label in every row will do: labels are strings, whole numbers or booleans, and a class is
whatever label occurs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosae.errors import CosaeError, short
from cosae.io.fetched.packages import LABELLED, text_of
from cosae.io.untrusted import check_plain
from cosae.shown import counted
from cosae.text.rows import is_saved_dataset, open_dataset, read_jsonl, read_parquet, valid_text

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
                f"in {counted(len(listed), 'row')}: name the column that holds the class."
            )
        return cls(name, listed, classes, np.array([classes.index(label) for label in named], dtype=np.int64))


def read_labelled(spec: str, *, text: str = "text", label: str = "label", n_rows: int | None = None) -> LabelledTexts:
    """The labelled texts that `spec` names.

    spec          wiki:language or wiki:topic, once fetched; or as for `read_documents`: FILE.jsonl, FILE.parquet, a
                  FOLDER that `save_to_disk` wrote or hf:DATASET[:CONFIG][:SPLIT]
    text, label   the columns that hold them
    n_rows        read at most the first n_rows; all by default (a set sorted by label needs all)

    Raises CosaeError for a spec that names nothing, a row without text or label, and labels that make no classes.
    """
    if (place := text_of(spec, LABELLED)) != spec:
        return replace(read_labelled(place, n_rows=n_rows), name=spec)
    texts: list[str] = []
    labels: list[str | int | bool] = []
    for number, row in enumerate(itertools.islice(_read(spec, (text, label)), n_rows)):
        where = f"{spec}, row {number}"
        if not isinstance(row, dict) or text not in row or label not in row:
            keys = short(list(row)) if isinstance(row, dict) else type(row).__name__
            raise CosaeError(
                f"each row must hold a text under {text!r} and its class under {label!r}. Got {keys} at {where}: name "
                "the columns."
            )
        if not isinstance(row[text], str):
            raise CosaeError(f"the text of a row must be a string. Got {type(row[text]).__name__} at {where} instead.")
        texts.append(valid_text(row[text]))
        labels.append(row[label])
    name = spec.removeprefix("hf:") if spec.startswith("hf:") else Path(spec).stem
    return LabelledTexts.of(name, texts, labels)


def _named(label: Any, name: str) -> str:
    if isinstance(label, str | bool | int | np.integer):
        return str(label)
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    raise CosaeError(
        f"labels must be strings, whole numbers or booleans. Got {short(label)} in {name} instead: name the column "
        "that holds the class."
    )


def _in_order(labels: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(labels))


def _read(spec: str, columns: tuple[str, str]) -> Iterator[Any]:
    path = Path(spec)
    if spec.startswith("hf:") or is_saved_dataset(path):
        return (row for _, row in open_dataset(spec))
    check_plain(path)
    if not path.is_file() or path.suffix.lower() not in (".jsonl", ".parquet"):
        raise CosaeError(
            "labelled texts must be an existing .jsonl or .parquet file, a folder written by datasets' save_to_disk, "
            f"or 'hf:DATASET[:CONFIG][:SPLIT]'. Got {spec!r} instead."
        )
    if path.suffix.lower() == ".jsonl":
        return (row for _, row in read_jsonl(path, path.name))
    return read_parquet(path, path.name, columns)
