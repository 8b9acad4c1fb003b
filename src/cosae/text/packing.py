"""documents → token sequences.

Two packings. `packed`: documents one after the other, cut into full rows of `context` tokens; a document that
does not fit goes on in the next row, without a second BOS; only the very last row is padded. `document`: one
document a row, cut at `context`, padded on the right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from cosae.errors import CosaeError, check_choice, check_least
from cosae.text.tokenization import TokenizedDocument, whole
from cosae.types import Sequences

Packing = Literal["packed", "document"]


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

    names: list[str] = []
    for chunk in everything:
        names += chunk.doc_names[len(names) - chunk.first_doc :]

    tensors = ("ids_ST", "doc_ST", "index_ST", "mask_ST", "special_ST")
    joined: dict[str, Any] = {name: torch.cat([getattr(chunk, name) for chunk in everything]) for name in tensors}
    return Sequences(**joined, doc_names=tuple(names))


def iterate_sequences(
    tokenized: Iterable[TokenizedDocument],
    context: int,
    packing: Packing = "packed",
    *,
    pad_id: int,
    special_ids: Iterable[int] = (),
    rows_per_chunk: int = 1024,
    first_doc: int = 0,
    first_index: int = 0,
) -> Iterator[Sequences]:
    """The same rows as `sequences`, `rows_per_chunk` at a time, for corpora that do not fit or do not end.

    Document indices run on from chunk to chunk; each chunk's doc_names holds its own documents' names, the first of
    them that of document first_doc. What is held does not grow with what was read.

    first_doc    index of the first document
    first_index  index of its first token in the document's own list, where that was cut off in front

    Raises CosaeError at the call for a bad setting, and while reading for an empty corpus.
    """
    check_least("context", context, 2)
    check_choice("packing", packing, get_args(Packing))
    check_least("rows_per_chunk", rows_per_chunk, 1)
    special = np.unique(np.fromiter(special_ids, dtype=np.int64))
    return _Packer(context, packing == "packed", pad_id, special, first_doc).chunks(
        tokenized, rows_per_chunk, first_index
    )


class _Packer:
    """Rows under way: pieces of (id, document, index, special) places that do not make a chunk yet."""

    def __init__(self, context: int, packed: bool, pad_id: int, special: NDArray[np.int64], first_doc: int) -> None:
        self._context, self._packed, self._pad_id, self._special = context, packed, pad_id, special
        self._first_doc = first_doc  # of the names held
        self._names: list[str] = []
        self._places: list[NDArray[np.int64]] = []  # (4, t) pieces
        self._n_waiting = 0

    def chunks(
        self, tokenized: Iterable[TokenizedDocument], rows_per_chunk: int, first_index: int
    ) -> Iterator[Sequences]:
        chunk_tokens = rows_per_chunk * self._context
        empty = True
        new = True  # not a part of the document before
        for one in tokenized if self._packed else whole(tokenized):
            ids_T, more = one.ids_T, one.more
            empty = False
            if new:
                self._names.append(one.name)
            self._add(ids_T, one.special_T, first_index)
            new, first_index = not more, first_index + len(ids_T) if more else 0
            if self._n_waiting >= chunk_tokens:
                flat = np.concatenate(self._places, axis=1)
                n_full = self._n_waiting - self._n_waiting % chunk_tokens
                self._places, self._n_waiting = [flat[:, n_full:].copy()], self._n_waiting - n_full
                for start in range(0, n_full, chunk_tokens):
                    yield self._rows(flat[:, start : start + chunk_tokens])
        if empty:
            raise CosaeError(
                "The corpus must hold at least one token. Got none: the documents are empty, too short for min_chars, "
                "or all on the other side of the split."
            )
        if self._n_waiting:
            padding = np.tile([[self._pad_id], [-1], [-1], [0]], (1, -self._n_waiting % self._context))
            yield self._rows(np.concatenate([*self._places, padding], axis=1))

    def _add(self, ids_T: NDArray[np.int32], special_T: NDArray[np.bool_] | None, first_index: int) -> None:
        ids = ids_T if self._packed else ids_T[: self._context]
        place = np.empty((4, len(ids) if self._packed else self._context), dtype=np.int64)
        place[0, : len(ids)] = ids
        place[1, : len(ids)] = self._first_doc + len(self._names) - 1
        place[2, : len(ids)] = np.arange(first_index, first_index + len(ids))
        place[3, : len(ids)] = 0 if special_T is None else special_T[: len(ids)]
        place[:, len(ids) :] = [[self._pad_id], [-1], [-1], [0]]
        self._places.append(place)
        self._n_waiting += place.shape[1]

    def _rows(self, place: NDArray[np.int64]) -> Sequences:
        """(4, S * context) places → Sequences; names of documents before them are let go."""
        over = int(place[1, 0]) - self._first_doc
        del self._names[:over]
        self._first_doc += over
        ids, doc, index, special = (torch.from_numpy(np.ascontiguousarray(p)).reshape(-1, self._context) for p in place)
        return Sequences(
            ids_ST=ids,
            doc_ST=doc.int(),
            index_ST=index.int(),
            mask_ST=doc >= 0,
            special_ST=torch.isin(ids, torch.from_numpy(self._special)) | special.bool(),
            doc_names=tuple(self._names[: int(place[1].max()) - self._first_doc + 1]),
            first_doc=self._first_doc,
        )
