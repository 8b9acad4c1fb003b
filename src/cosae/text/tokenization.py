"""Documents → token lists, here or in worker processes: the same lists in the same order."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cosae.errors import CosaeError, CosaeWarning
from cosae.text.pylib import Conversation, Document
from cosae.text.worker import Encoded, Failed, encode
from cosae.text.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 64  # documents handed to the tokenizer together, which works on them in parallel
AT_ONCE_CHARS = 2**20  # and no more text than this, beyond one piece
PIECE_CHARS = 2**19
"""Longer documents are tokenised a piece after the other, for a tokenizer takes some hundred bytes of memory for each
token that it has in hand."""
AROUND_CHARS = 1024
"""Read before and behind a piece, so that its own tokens are those of the whole document: no tokenizer looks further,
but in a run of so many characters without a space."""
WHOLE_CHARS = 2**18
"""Of longer documents only the first tokens are found, where no more are asked for."""
HEAD_CHARS = 16
"""Characters tokenised for each of those; where that makes too few, four times as many, and so on."""
WAITING = 2  # batches under way for each worker: one being tokenised, one queued


class TokenizedDocument(NamedTuple):
    """One document's own token list, or a part of it.

    name       the document's name
    ids_T      (T,) int32   token ids, BOS first when it was asked for
    offset_T2  (T, 2) int32   start and end of each token in the text, in characters; (0, 0) for the BOS
    more       the next one is not another document but goes on with this one
    special_T  (T,) bool   tokens that are special whatever their ids are; None: none
    """

    name: str
    ids_T: NDArray[np.int32]
    offset_T2: NDArray[np.int32]
    more: bool = False
    special_T: NDArray[np.bool_] | None = None

    def cut(self, first: int, end: int | None = None) -> TokenizedDocument:
        """Some of its tokens."""
        special_T = None if self.special_T is None else self.special_T[first:end]
        return self._replace(ids_T=self.ids_T[first:end], offset_T2=self.offset_T2[first:end], special_T=special_T)


class _Piece(NamedTuple):
    """Characters start … end of a document; tokens that begin there are its own. head: so many are wanted, no others of
    the document."""

    document: Document | Conversation
    start: int
    end: int
    head: int | None = None

    @property
    def text(self) -> str:
        """What the tokenizer gets."""
        return self.document.text[max(0, self.start - AROUND_CHARS) : self.end + AROUND_CHARS]

    @property
    def reaches_end(self) -> bool:
        return self.end >= len(self.document.text)

    def own(self, encoded: Encoded) -> Encoded:
        """The tokens that begin in the piece, with offsets in the document."""
        if self.start == 0 and self.reaches_end:
            return encoded
        ids_T, offset_T2 = encoded[0], encoded[1] + np.int32(max(0, self.start - AROUND_CHARS))
        own_T = (offset_T2[:, 0] >= self.start) & (offset_T2[:, 0] < self.end)
        return ids_T[own_T][: self.head], offset_T2[own_T][: self.head]


def tokenize_documents(
    documents: Iterable[Document | Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_bos: bool,
    max_chars: int | None = None,
    max_tokens: int | None = None,
    min_chars: int = 0,
    workers: Workers | None = None,
    keep_empty: bool = False,
    head: int | None = None,
    in_parts: bool = False,
) -> Iterator[TokenizedDocument]:
    """Token ids and character offsets of each document, lazily, in order.

    add_bos     put the tokenizer's BOS in front of every document (no other special token is ever added)
    max_chars   cut a document's text here first
    max_tokens  stop once this many tokens came out in all; the last document is cut to fit
    min_chars   pass over documents shorter than this
    workers     processes that do it; they may read some documents ahead, and change nothing else
    keep_empty  also give documents without a single token
    head        of documents longer than WHOLE_CHARS, give so many tokens, the first, and tokenise little more
    in_parts    give documents longer than PIECE_CHARS in several parts, each tokenised when it is asked for

    A special token's text that occurs inside a document (say "<|bos|>") is read by the tokenizer as it would
    be anywhere: as that token. A BOS that a text begins with is the one that is put there, not a second: a warning,
    once, says so. Raises CosaeError for a tokenizer without offsets, or without a BOS when one
    is asked for, and while reading for a document that the tokenizer fails on, naming it.
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
    cut = (d._replace(text=d.text[:max_chars]) for d in documents if len(d.text) >= min_chars)
    tokenized = _parts(_tokenize(_pieces(cut, head), tokenizer, workers), tokenizer, bos_id if add_bos else None)
    found = tokenized if in_parts else whole(tokenized)
    return _limited((d for d in found if keep_empty or len(d.ids_T)), max_tokens)


def whole(tokenized: Iterable[TokenizedDocument]) -> Iterator[TokenizedDocument]:
    """The same documents, those that come in parts put together."""
    parts: list[TokenizedDocument] = []
    for part in tokenized:
        parts.append(part)
        if not part.more:
            if len(parts) > 1:
                ids_T, offset_T2 = (np.concatenate(arrays) for arrays in zip(*(p[1:3] for p in parts), strict=True))
                marks = [p.special_T for p in parts if p.special_T is not None]
                part = TokenizedDocument(
                    part.name, ids_T, offset_T2, special_T=np.concatenate(marks) if marks else None
                )
            parts.clear()
            yield part


def _limited(tokenized: Iterator[TokenizedDocument], max_tokens: int | None) -> Iterator[TokenizedDocument]:
    if max_tokens is None:
        yield from tokenized
        return
    left = max_tokens
    for one in tokenized:
        yield one.cut(0, left)._replace(more=one.more and len(one.ids_T) < left)
        left -= min(left, len(one.ids_T))
        if left == 0:
            return


def _parts(
    pieces: Iterable[tuple[_Piece, Encoded]], tokenizer: PreTrainedTokenizerBase, bos_id: int | None
) -> Iterator[TokenizedDocument]:
    """Pieces as parts of documents, BOS in front of the first; pieces without a token are left out."""
    held: TokenizedDocument | None = None
    for piece, (ids, offsets) in pieces:
        if bos_id is not None and piece.start == 0:
            if len(ids) and ids[0] == bos_id:
                warn_two_bos(tokenizer)
                ids, offsets = ids[1:], offsets[1:]
            ids = np.concatenate([np.array([bos_id], dtype=np.int32), ids])
            offsets = np.concatenate([np.zeros((1, 2), dtype=np.int32), offsets])
        if held is None or len(ids):
            if held is not None and len(held.ids_T):
                yield held._replace(more=True)
            held = TokenizedDocument(piece.document.name, ids, offsets, special_T=_unspoken(piece.document, offsets))
        if piece.reaches_end or piece.head is not None:
            yield held
            held = None


def _unspoken(document: Document | Conversation, offset_T2: NDArray[np.int32]) -> NDArray[np.bool_] | None:
    """(T,) tokens of a conversation that begin in nobody's content."""
    if isinstance(document, Document):
        return None
    inside = [(offset_T2[:, 0] >= start) & (offset_T2[:, 0] < end) for start, end in document.spoken]
    return ~np.any(inside, axis=0) if inside else np.ones(len(offset_T2), dtype=bool)


def _tokenize(
    pieces: Iterable[_Piece], tokenizer: PreTrainedTokenizerBase, workers: Workers | None
) -> Iterator[tuple[_Piece, Encoded]]:
    """Each piece with its own tokens."""
    for batch, answer in _answers(_batches(pieces), tokenizer, workers):
        for piece, encoded in zip(batch, _checked(answer, batch, tokenizer), strict=True):
            own = piece.own(encoded)
            while piece.head is not None and len(own[0]) < piece.head and not piece.reaches_end:
                piece = piece._replace(end=4 * piece.end)
                own = piece.own(_checked(encode(tokenizer, [piece.text]), [piece], tokenizer)[0])
            yield piece, own


def _checked(answer: list[Encoded] | Failed, batch: list[_Piece], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    if not isinstance(answer, tuple):
        return answer
    index, reason = answer
    names = [piece.document.name for piece in batch]
    where = f"document {names[index]!r}" if index >= 0 else f"the documents from {names[0]!r} on"
    raise CosaeError(
        f"The tokenizer {type(tokenizer).__name__} failed on {where}: {reason}. Repair or leave out that text, "
        "or use another tokenizer."
    )


def warn_two_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Says, once a process by default, that a BOS in front of a text's own is left out."""
    warnings.warn(
        f"Texts begin with {tokenizer.bos_token!r}, the BOS that every text gets: one of the two is kept.",
        CosaeWarning,
        stacklevel=1,
    )


def _answers(
    batches: Iterable[list[_Piece]], tokenizer: PreTrainedTokenizerBase, workers: Workers | None
) -> Iterator[tuple[list[_Piece], list[Encoded] | Failed]]:
    """Each batch with its answer, in order."""
    if workers is None:
        for batch in batches:
            yield batch, encode(tokenizer, [piece.text for piece in batch])
        return
    waiting: deque[tuple[list[_Piece], Future[list[Encoded] | Failed]]] = deque()
    reading = iter(batches)
    broken: Exception | None = None
    try:
        while True:
            while broken is None and len(waiting) < WAITING * workers.n_workers:
                try:
                    batch = next(reading)
                except StopIteration:
                    break
                except Exception as error:  # raised in its turn, after the documents before it
                    broken = error
                else:
                    waiting.append((batch, workers.submit([piece.text for piece in batch])))
            if not waiting:
                break
            batch, future = waiting.popleft()
            yield batch, future.result()
        if broken is not None:
            raise broken
    finally:
        for _, future in waiting:
            future.cancel()


def _pieces(documents: Iterable[Document | Conversation], head: int | None) -> Iterator[_Piece]:
    """Documents in pieces: cut after a line's end in the last half of a piece, else where it is full."""
    for document in documents:
        text, start = document.text, 0
        if head is not None and len(text) > WHOLE_CHARS:
            yield _Piece(document, 0, HEAD_CHARS * head, head)
            continue
        while len(text) - start > PIECE_CHARS:
            end = start + PIECE_CHARS
            end = text.rfind("\n", start + PIECE_CHARS // 2, end) + 1 or end
            yield _Piece(document, start, end)
            start = end
        yield _Piece(document, start, len(text))


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    n_chars = 0
    for piece in pieces:
        batch.append(piece)
        n_chars += piece.end - piece.start
        if len(batch) == AT_ONCE or n_chars >= AT_ONCE_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch
