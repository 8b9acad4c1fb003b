"""text → tokens.

Enters: documents (name, text) from the embedded corpus, a folder, a file, or the Hugging Face hub.
Leaves: `types.Sequences`, every token knowing its document and its place in it.

Two packings. `packed`: documents one after the other, cut into full rows of `context` tokens; a document that
does not fit goes on in the next row, without a second BOS; only the very last row is padded. `document`: one
document a row, cut at `context`, padded on the right.

Train and held-out are disjoint by construction: a document's side is a function of the document alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cosae.activations import pylib
from cosae.activations.pylib import Document, Split
from cosae.types import CosaeError, Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Packing = Literal["packed", "document"]

_TEXT_SUFFIXES = """
    .c .cc .cfg .cpp .css .csv .go .h .hpp .html .ini .java .js .json .kt .lua .md .php .pl .py .pyi .r .rb
    .rs .rst .scala .sh .sql .swift .tex .toml .ts .tsv .txt .xml .yaml .yml
"""
TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())
"""What a folder is searched for; other files in it are passed over."""

_TOKENIZE_AT_ONCE = 64  # documents handed to the tokenizer together, which works on them in parallel


class TokenizedDocument(NamedTuple):
    """One document's own token list.

    name       the document's name
    ids_T      (T,) int32   token ids, BOS first when it was asked for
    offset_T2  (T, 2) int32   start and end of each token in the text, in characters; (0, 0) for the BOS
    """

    name: str
    ids_T: NDArray[np.int32]
    offset_T2: NDArray[np.int32]


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


def tokenize_documents(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_bos: bool,
    max_chars: int | None = None,
    max_tokens: int | None = None,
    min_chars: int = 0,
) -> Iterator[TokenizedDocument]:
    """Token ids and character offsets of each document, lazily, in order.

    add_bos     put the tokenizer's BOS in front of every document (no other special token is ever added)
    max_chars   cut a document's text here first
    max_tokens  stop once this many tokens came out in all; the last document is cut to fit
    min_chars   pass over documents shorter than this

    A special token's text that occurs inside a document (say "<|bos|>") is read by the tokenizer as it would
    be anywhere: as that token. Raises CosaeError for a tokenizer without offsets, or without a BOS when one
    is asked for.
    """
    if not tokenizer.is_fast:
        raise CosaeError(
            "The tokenizer must be a fast one, because only those report character offsets. "
            f"Got {type(tokenizer).__name__} instead."
        )
    bos_id = tokenizer.bos_token_id
    if add_bos and bos_id is None:
        raise CosaeError(
            "add_bos must be False for a tokenizer without a BOS token. "
            f"Got {type(tokenizer).__name__}, whose bos_token is None, instead."
        )
    return _tokenize(documents, tokenizer, bos_id if add_bos else None, max_chars, max_tokens, min_chars)


def sequences(
    tokenized: Iterable[TokenizedDocument],
    context: int,
    packing: Packing = "packed",
    *,
    pad_id: int,
    special_ids: Iterable[int] = (),
) -> Sequences:
    """All of a finite corpus as one `Sequences` of (S, context).

    pad_id       fills the places where mask_ST is False
    special_ids  the tokenizer's special ids (`tokenizer.all_special_ids`)

    Raises CosaeError for an empty corpus.
    """
    everything = list(iterate_sequences(tokenized, context, packing, pad_id=pad_id, special_ids=special_ids))
    if len(everything) == 1:
        return everything[0]

    def joined(name: str) -> torch.Tensor:
        return torch.cat([getattr(chunk, name) for chunk in everything])

    return Sequences(
        ids_ST=joined("ids_ST"),
        doc_ST=joined("doc_ST"),
        index_ST=joined("index_ST"),
        mask_ST=joined("mask_ST"),
        special_ST=joined("special_ST"),
        doc_names=everything[-1].doc_names,
    )


def iterate_sequences(
    tokenized: Iterable[TokenizedDocument],
    context: int,
    packing: Packing = "packed",
    *,
    pad_id: int,
    special_ids: Iterable[int] = (),
    rows_per_chunk: int = 1024,
) -> Iterator[Sequences]:
    """The same rows as `sequences`, `rows_per_chunk` at a time, for corpora that do not fit or do not end.

    Document indices run on from chunk to chunk; each chunk's doc_names holds every name met so far.
    Raises CosaeError at the call for a bad setting, and while reading for an empty corpus.
    """
    if context < 2:
        raise CosaeError(f"context must be at least 2 tokens. Got {context} instead.")
    if packing not in ("packed", "document"):
        raise CosaeError(f"packing must be 'packed' or 'document'. Got {packing!r} instead.")
    if rows_per_chunk < 1:
        raise CosaeError(f"rows_per_chunk must be at least 1. Got {rows_per_chunk} instead.")
    special = np.unique(np.fromiter(special_ids, dtype=np.int64))
    return _iterate(tokenized, context, packing == "packed", pad_id, special, rows_per_chunk)


def _iterate(
    tokenized: Iterable[TokenizedDocument],
    context: int,
    packed: bool,
    pad_id: int,
    special: NDArray[np.int64],
    rows_per_chunk: int,
) -> Iterator[Sequences]:
    names: list[str] = []
    places: list[NDArray[np.int64]] = []  # (3, t) pieces: id, document, index within the document
    n_waiting = 0
    chunk_tokens = rows_per_chunk * context
    for name, ids_T, _ in tokenized:
        ids = ids_T if packed else ids_T[:context]
        place = np.empty((3, len(ids) if packed else context), dtype=np.int64)
        place[0, : len(ids)], place[1, : len(ids)], place[2, : len(ids)] = (
            ids,
            len(names),
            np.arange(len(ids)),
        )
        place[:, len(ids) :] = [[pad_id], [-1], [-1]]
        names.append(name)
        places.append(place)
        n_waiting += place.shape[1]
        if n_waiting >= chunk_tokens:
            flat = np.concatenate(places, axis=1)
            n_full = n_waiting - n_waiting % chunk_tokens
            for start in range(0, n_full, chunk_tokens):
                yield _rows(flat[:, start : start + chunk_tokens], context, special, names)
            places, n_waiting = [flat[:, n_full:]], n_waiting - n_full
    if not names:
        raise CosaeError(
            "The corpus must hold at least one token. Got none: the documents are empty, too short for "
            "min_chars, or all on the other side of the split."
        )
    if n_waiting:
        padding = np.tile([[pad_id], [-1], [-1]], (1, -n_waiting % context))
        yield _rows(np.concatenate([*places, padding], axis=1), context, special, names)


def _rows(place: NDArray[np.int64], context: int, special: NDArray[np.int64], names: list[str]) -> Sequences:
    """(3, S * context) places → Sequences."""
    ids, doc, index = (torch.from_numpy(np.ascontiguousarray(p)).reshape(-1, context) for p in place)
    mask_ST = doc >= 0
    return Sequences(
        ids_ST=ids,
        doc_ST=doc.int(),
        index_ST=index.int(),
        mask_ST=mask_ST,
        special_ST=torch.isin(ids, torch.from_numpy(special)),
        doc_names=tuple(names),
    )


def _tokenize(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    bos_id: int | None,
    max_chars: int | None,
    max_tokens: int | None,
    min_chars: int,
) -> Iterator[TokenizedDocument]:
    n_first = 0 if bos_id is None else 1
    left = max_tokens
    for batch in _batches((d for d in documents if len(d.text) >= min_chars), _TOKENIZE_AT_ONCE):
        encoded = tokenizer(
            [d.text if max_chars is None else d.text[:max_chars] for d in batch],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # nothing is too long here: rows are cut later
        )
        for document, ids, offsets in zip(
            batch, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            ids_T = np.empty(len(ids) + n_first, dtype=np.int32)
            offset_T2 = np.zeros((len(ids_T), 2), dtype=np.int32)
            if bos_id is not None:
                ids_T[0] = bos_id
            if ids:
                ids_T[n_first:] = ids
                offset_T2[n_first:] = offsets
            if left is not None:
                ids_T, offset_T2 = ids_T[:left], offset_T2[:left]
                left -= len(ids_T)
            if len(ids_T):
                yield TokenizedDocument(document.name, ids_T, offset_T2)
            if left == 0:
                return


def _batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


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
            f"Reading {spec!r} must go through the datasets package, which is not installed: "
            "pip install 'cosae[lm]'."
        ) from None
    try:
        rows = datasets.load_dataset(name, config, split=hub_split, streaming=True)
    except Exception as error:  # the hub's many ways to fail, in one sentence
        raise CosaeError(
            f"The hub must be able to stream {spec!r}. Got {type(error).__name__}: {error}"
        ) from error
    return (_document_of(row, f"{spec}, row {i}", f"{name}:{i}") for i, row in enumerate(rows))


def _document_of(row: object, where: str, name: str) -> Document:
    """A row's text under "text"; its name under "name" or "id", else the place it was read from."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        keys = f"the keys {sorted(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        raise CosaeError(
            f'Each row must hold its text as a string under "text". Got {keys} at {where} instead.'
        )
    given = next((row[k] for k in ("name", "id") if isinstance(row.get(k), str | int)), name)
    # JSON can spell half a surrogate pair, which no tokenizer takes.
    text = row["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Document(str(given), text)
