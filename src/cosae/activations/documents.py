"""A corpus by name → documents of one of its splits.

Enters: "pylib", a folder, a .txt, .jsonl or .parquet file, or "hf:DATASET[:CONFIG][:SPLIT]".
Leaves: documents (name, text), lazily. A document's side is a function of the document alone, so train and
held-out are disjoint by construction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from cosae.activations import pylib
from cosae.activations.pylib import Document, Split
from cosae.types import CosaeError

_TEXT_SUFFIXES = """
    .c .cc .cfg .cpp .css .csv .go .h .hpp .html .ini .java .js .json .kt .lua .md .php .pl .py .pyi .r .rb
    .rs .rst .scala .sh .sql .swift .tex .toml .ts .tsv .txt .xml .yaml .yml
"""
TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())
"""What a folder is searched for; other files in it are passed over."""


def split_of(document: Document, held_out_frac: float = 0.1, seed: int = 0) -> Split:
    """The side of any document, by a hash of its text: equal texts never fall on both sides."""
    head = hashlib.sha256(f"{seed}:".encode() + document.text.encode()).digest()[:8]
    return "held_out" if int.from_bytes(head, "big") < held_out_frac * 2**64 else "train"


def read_documents(
    spec: str,
    split: Split | Literal["all"] = "all",
    *,
    held_out_frac: float = 0.1,
    seed: int = 0,
    include_tests: bool = False,
) -> Iterator[Document]:
    """Documents of one split of a corpus, lazily.

    spec is one of
        pylib           the standard library of this Python; its split is pylib's own, by file name
        FOLDER          every text or source file below it, sorted by name
        FILE.txt        one document
        FILE.jsonl      one document a line: text under "text", name under "name" or "id" if there
        FILE.parquet    one document a row, likewise
        hf:DATASET[:CONFIG][:SPLIT]   streamed from the Hugging Face hub, likewise; SPLIT is train if unsaid

    Corpora other than pylib split by `split_of(document, held_out_frac, seed)`. Raises CosaeError at the
    call for a spec that names nothing, and while reading for a row without text or a split that turns out
    empty.
    """
    if split not in ("train", "held_out", "all"):
        raise CosaeError(f"split must be 'train', 'held_out' or 'all'. Got {split!r} instead.")
    if not 0 <= held_out_frac <= 1:
        raise CosaeError(f"held_out_frac must be between 0 and 1. Got {held_out_frac} instead.")
    if spec == "pylib":
        return iter(pylib.documents(split, include_tests))
    read = _read_hub(spec) if spec.startswith("hf:") else _read_path(Path(spec))
    return _chosen(read, spec, split, held_out_frac, seed)


def _chosen(
    documents: Iterator[Document], spec: str, split: str, held_out_frac: float, seed: int
) -> Iterator[Document]:
    """Documents of one split; an error where there are none."""
    n_read = n_chosen = 0
    for document in documents:
        n_read += 1
        if split in ("all", split_of(document, held_out_frac, seed)):
            n_chosen += 1
            yield document
    if not n_chosen:
        raise CosaeError(
            f"The corpus {spec} must hold at least one document in its {split!r} split. Got {n_read} "
            "documents, none of them there: name another corpus or change held_out_frac."
        )


def _read_path(path: Path) -> Iterator[Document]:
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise CosaeError(
            "The corpus must be 'pylib', an existing folder or .txt, .jsonl or .parquet file, or "
            f"'hf:DATASET[:CONFIG][:SPLIT]'. Got {str(path)!r}, which does not exist, instead."
        )
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise CosaeError(f"A corpus file must be .txt, .jsonl or .parquet. Got {path.name!r} instead.")
    return readers[path.suffix.lower()](path)


def _read_folder(folder: Path) -> Iterator[Document]:
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file())
    if not paths:
        raise CosaeError(
            f"A corpus folder must hold at least one text or source file. Got {str(folder)!r}, which has "
            f"none of {' '.join(sorted(TEXT_SUFFIXES))}, instead."
        )
    for path in paths:
        try:
            yield Document(path.relative_to(folder).as_posix(), path.read_text("utf-8"))
        except UnicodeDecodeError:
            continue  # a folder may hold a stray binary under a text file's name


def _read_text(path: Path) -> Iterator[Document]:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CosaeError(f"A corpus file must be UTF-8 text. Got {path.name!r}: {error}.") from None
    yield Document(path.name, text)


def _read_jsonl(path: Path) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path.name}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CosaeError(f"Each line must be one JSON object. Got {where}: {error}.") from None
            yield _document_of(row, where, f"{path.name}:{number}")


def _read_parquet(path: Path) -> Iterator[Document]:
    from pyarrow import ArrowInvalid, parquet

    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise CosaeError(f"A .parquet corpus must be a Parquet file. Got {path.name!r}: {error}.") from None
    columns = [c for c in ("text", "name", "id") if c in file.schema_arrow.names]
    number = 0
    for batch in file.iter_batches(batch_size=256, columns=columns):
        for row in batch.to_pylist():
            yield _document_of(row, f"{path.name}, row {number}", f"{path.name}:{number}")
            number += 1


def _read_hub(spec: str) -> Iterator[Document]:
    """hf:DATASET[:CONFIG][:SPLIT], streamed."""
    name, *rest = spec.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise CosaeError(f"A hub corpus must be 'hf:DATASET[:CONFIG][:SPLIT]'. Got {spec!r} instead.")
    config = rest[0] if len(rest) == 2 else None
    hub_split = rest[-1] if rest else "train"
    try:
        import datasets
    except ImportError:
        raise CosaeError(
            f"Reading {spec!r} must go through the datasets package, which is not installed: pip install 'cosae[lm]'."
        ) from None
    try:
        rows = datasets.load_dataset(name, config, split=hub_split, streaming=True)
    except Exception as error:  # the hub's many ways to fail, in one sentence
        raise CosaeError(f"The hub must be able to stream {spec!r}. Got {type(error).__name__}: {error}") from error
    return (_document_of(row, f"{spec}, row {i}", f"{name}:{i}") for i, row in enumerate(rows))


def _document_of(row: object, where: str, name: str) -> Document:
    """A row's text under "text"; its name under "name" or "id", else the place it was read from."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        keys = f"the keys {sorted(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        raise CosaeError(f'Each row must hold its text as a string under "text". Got {keys} at {where} instead.')
    given = next((row[k] for k in ("name", "id") if isinstance(row.get(k), str | int)), name)
    # JSON can spell half a surrogate pair, which no tokenizer takes.
    text = row["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Document(str(given), text)
