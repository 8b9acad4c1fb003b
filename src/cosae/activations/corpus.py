"""documents → token sequences.

Enters: documents (name, text) as `read_documents` gives them, and a fast tokenizer.
Leaves: `types.Sequences`, every token knowing its document and its place in it.

Two packings. `packed`: documents one after the other, cut into full rows of `context` tokens; a document that
does not fit goes on in the next row, without a second BOS; only the very last row is padded. `document`: one
document a row, cut at `context`, padded on the right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cosae.activations.documents import TEXT_SUFFIXES, read_documents, split_of
from cosae.activations.pylib import Document
from cosae.types import CosaeError, Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "TEXT_SUFFIXES",
    "Document",
    "Packing",
    "TokenizedDocument",
    "iterate_sequences",
    "read_documents",
    "sequences",
    "split_of",
    "tokenize_documents",
]

Packing = Literal["packed", "document"]

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
        for document, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
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
