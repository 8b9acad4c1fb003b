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
from cosae.text.pylib import Document
from cosae.text.worker import Encoded, Failed, encode
from cosae.text.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 64  # documents handed to the tokenizer together, which works on them in parallel
AT_ONCE_CHARS = 2**21  # and no more text than this, beyond one document
WAITING = 2  # batches under way for each worker: one being tokenised, one queued


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
    workers: Workers | None = None,
    keep_empty: bool = False,
) -> Iterator[TokenizedDocument]:
    """Token ids and character offsets of each document, lazily, in order.

    add_bos     put the tokenizer's BOS in front of every document (no other special token is ever added)
    max_chars   cut a document's text here first
    max_tokens  stop once this many tokens came out in all; the last document is cut to fit
    min_chars   pass over documents shorter than this
    workers     processes that do it; they may read some documents ahead, and change nothing else
    keep_empty  also give documents without a single token

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
    cut = (Document(d.name, d.text[:max_chars]) for d in documents if len(d.text) >= min_chars)
    tokenized = _tokenize(cut, tokenizer, bos_id if add_bos else None, workers)
    return _limited((d for d in tokenized if keep_empty or len(d.ids_T)), max_tokens)


def _limited(tokenized: Iterator[TokenizedDocument], max_tokens: int | None) -> Iterator[TokenizedDocument]:
    if max_tokens is None:
        yield from tokenized
        return
    left = max_tokens
    for name, ids_T, offset_T2 in tokenized:
        yield TokenizedDocument(name, ids_T[:left], offset_T2[:left])
        left -= min(left, len(ids_T))
        if left == 0:
            return


def _tokenize(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, bos_id: int | None, workers: Workers | None
) -> Iterator[TokenizedDocument]:
    for batch, answer in _answers(_batches(documents), tokenizer, workers):
        if isinstance(answer, tuple):
            index, reason = answer
            where = f"document {batch[index].name!r}" if index >= 0 else f"the documents from {batch[0].name!r} on"
            raise CosaeError(
                f"The tokenizer {type(tokenizer).__name__} failed on {where}: {reason}. Repair or leave out that text, "
                "or use another tokenizer."
            )
        for document, (ids, offsets) in zip(batch, answer, strict=True):
            if bos_id is not None:
                if len(ids) and ids[0] == bos_id:
                    warn_two_bos(tokenizer)
                    ids, offsets = ids[1:], offsets[1:]
                ids = np.concatenate([np.array([bos_id], dtype=np.int32), ids])
                offsets = np.concatenate([np.zeros((1, 2), dtype=np.int32), offsets])
            yield TokenizedDocument(document.name, ids, offsets)


def warn_two_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Says, once a process by default, that a BOS in front of a text's own is left out."""
    warnings.warn(
        f"Texts begin with {tokenizer.bos_token!r}, the BOS that every text gets: one of the two is kept.",
        CosaeWarning,
        stacklevel=1,
    )


def _answers(
    batches: Iterable[list[Document]], tokenizer: PreTrainedTokenizerBase, workers: Workers | None
) -> Iterator[tuple[list[Document], list[Encoded] | Failed]]:
    """Each batch with its answer, in order."""
    if workers is None:
        for batch in batches:
            yield batch, encode(tokenizer, [d.text for d in batch])
        return
    waiting: deque[tuple[list[Document], Future[list[Encoded] | Failed]]] = deque()
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
                    waiting.append((batch, workers.submit([d.text for d in batch])))
            if not waiting:
                break
            batch, future = waiting.popleft()
            yield batch, future.result()
        if broken is not None:
            raise broken
    finally:
        for _, future in waiting:
            future.cancel()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    n_chars = 0
    for document in documents:
        batch.append(document)
        n_chars += len(document.text)
        if len(batch) == AT_ONCE or n_chars >= AT_ONCE_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch
