"""Where a feature store's tokens come from: a model on text, or a store of activations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosae.activations.perturbation import Perturbation, apply
from cosae.activations.store.reader import Store
from cosae.browse.collect.chunks import SAMPLE_TOKENS, Chunk
from cosae.errors import CosaeError
from cosae.models.capture import capture
from cosae.models.sites import resolve_site
from cosae.models.unembed import residual_directions, spelling, unembedding
from cosae.recipe import DataConfig
from cosae.run.capture.text import CaptureText
from cosae.run.dataset.corpus import check_corpus
from cosae.run.dataset.model import batch_size, open_model
from cosae.text.concepts.table import CONCEPTS
from cosae.types import Activations, Sequences

CHUNK_TOKENS = 8192
NATURAL = Perturbation()
DESCRIBED = tuple((concept.name, concept.description) for concept in CONCEPTS)

Logits = Callable[[slice], Tensor]


class ModelText:
    """A model on the text of a recipe's data, training side, documents in a seeded order (a `Source`). Sequences that
    occur twice are read once. Raises CosaeError for what cannot be read."""

    model: str | None
    corpus: str | None
    site: str | None
    concepts: tuple[tuple[str, str], ...]

    def __init__(
        self, data: DataConfig, tokens: int, seed: int, device: str, perturbation: Perturbation = NATURAL
    ) -> None:
        check_corpus(data)
        self._perturbation = perturbation
        rows = max(1, CHUNK_TOKENS // data.context)
        self.data = data = replace(data, chunk_sequences=rows, n_workers=0, prefetch_chunks=0)
        self._seed, self._device = seed, device
        self.opened: tuple[Any, Any] = open_model(data, device)
        self.where = self._site = resolve_site(self.opened[0], data.site)
        self._written = self._site if data.target is None else resolve_site(self.opened[0], data.target)
        limit = getattr(self.opened[0].config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and data.context > limit:
            raise CosaeError(f"context must be at most {limit}, the model's own. Got {data.context} instead.")
        self.total, self.context = tokens, data.context
        self.model, self.site = data.model, self._site.name
        self.corpus = data.corpus if isinstance(data.corpus, str) else ", ".join(data.corpus)
        self.concepts = DESCRIBED if self.corpus == "pylib" else ()
        self.identity = identity_of_text(data, tokens, seed, perturbation)

    def chunks(self, skip: int) -> Iterator[Chunk]:
        """Chunks of whole sequences, until there are `total` tokens or the text ends."""
        model = self.opened[0]
        options: dict[str, Any] = {"batch_sequences": batch_size(self.data, model, self._site, "float32")}
        text = CaptureText(self.data, self.opened, self._seed, 0)
        seen: set[bytes] = set()
        first = first_sequence = number = 0
        with closing(text):
            # the rows that occur twice are not known before: more is asked for than will be read
            for part in text.parts("train", 2**62):
                sequences = self._cut(_new(part.sequences, seen), self.total - first)
                n = sequences.n_rows
                if not n:
                    continue
                if number >= skip:
                    found = capture(model, sequences, self._site, **options)[self._site.name]
                    found = apply(found, self._perturbation, number)
                    known: dict[str, Any] = {}
                    labels, labelled = part.labels(found) if first < SAMPLE_TOKENS else (None, None)
                    if labels is not None and labelled is not None:
                        bits = np.unpackbits(labels.numpy(), axis=1, count=len(CONCEPTS), bitorder="little")
                        known = {"labels_NC": bits.astype(bool), "labelled_N": labelled.numpy()}
                    yield Chunk(found, first, first_sequence, _names(sequences), **known)
                first, first_sequence, number = first + n, first_sequence + len(sequences), number + 1
                if first >= self.total:
                    return

    def _cut(self, sequences: Sequences, tokens: int) -> Sequences:
        """The first sequences, as many as have so many tokens."""
        before_S = sequences.rows_S.cumsum(0) - sequences.rows_S
        return sequences[: int((before_S < tokens).sum())]

    def spell(self, token: int) -> str | None:
        return None if self.opened[1] is None else spelling(self.opened[1], token)

    def logits(self, rows_FD: Tensor) -> Logits | None:
        direction_FD = residual_directions(self.opened[0], self._written, rows_FD)
        unembedding_VD = unembedding(self.opened[0])
        if direction_FD is None or unembedding_VD is None:
            return None
        return lambda some: direction_FD[some] @ unembedding_VD.T


def identity_of_text(data: DataConfig, tokens: int, seed: int, perturbation: Perturbation) -> dict[str, Any]:
    """What decides the tokens and activations of a pass, as far as it has a name."""
    named = ("model", "revision", "model_dtype", "site", "corpus", "context", "packing", "add_bos", "min_chars")
    known = {name: getattr(data, name) for name in (*named, "max_chars", "text_field", "txt_unit")}
    return {**known, "tokens": tokens, "seed": seed, **injected(perturbation)}


def injected(perturbation: Perturbation) -> dict[str, Any]:
    """What a perturbation adds to an identity."""
    return {} if perturbation.kind == "none" else {"inject": str(perturbation)}


def _new(sequences: Sequences, seen: set[bytes]) -> Sequences:
    """The sequences whose tokens were not among those seen, which they join."""
    rows = []
    for row, (ids_T, mask_T) in enumerate(zip(sequences.ids_ST, sequences.mask_ST, strict=True)):
        mark = hashlib.blake2b(ids_T[mask_T].numpy().tobytes(), digest_size=16).digest()
        if mark not in seen:
            seen.add(mark)
            rows.append(row)
    return sequences[torch.tensor(rows, dtype=torch.int64)]


def _names(sequences: Sequences) -> dict[int, str]:
    used = torch.unique(sequences.doc_ST[sequences.mask_ST]).tolist()
    return {number: sequences.doc_names[number - sequences.first_doc] for number in used}


class StoredRows:
    """Train rows of a store of activations, in its own order (a `Source`). Tokens are spelled where a model and its
    tokenizer are opened."""

    model: str | None
    corpus: str | None
    site: str | None
    concepts: tuple[tuple[str, str], ...]

    def __init__(
        self, store: Store, tokens: int, opened: tuple[Any, Any] | None, perturbation: Perturbation = NATURAL
    ) -> None:
        self._store, self._opened, self._perturbation = store, opened, perturbation
        request = store.record["request"]
        self.total = min(tokens, store.n_rows("train"))
        self.model, self.corpus = request.get("model"), _listed(request.get("corpus"))
        self.site = None if store.site is None else store.site.name
        self.context = int(request.get("context") or 0)
        self.concepts = tuple((name, dict(DESCRIBED).get(name, name)) for name in store.concepts or ())
        known = {"store": store.identity, "tokens": tokens, "spelled": opened is not None}
        self.identity = {**known, **injected(perturbation)}

    def chunks(self, skip: int) -> Iterator[Chunk]:
        """About CHUNK_TOKENS rows at a time, cut where a sequence begins."""
        names, border = self._store.documents("train"), len(self._store.documents("held_out"))
        first = first_sequence = number = 0
        while first < self.total:
            rows = torch.arange(first, min(first + CHUNK_TOKENS, self.total))
            found = self._store.take("train", rows)
            if (end := _whole(found)) and first + len(rows) < self.total:
                rows, found = rows[:end], found[:end]
            labels, labelled = (
                self._store.labels("train", rows) if self.concepts and first < SAMPLE_TOKENS else (None, None)
            )
            used = [doc for doc in torch.unique(found.doc_N).tolist() if doc >= border]
            documents = {doc: names[doc - border] for doc in used}
            found = apply(replace(found, x_ND=found.x_ND.float()), self._perturbation, number)
            chunk = Chunk(found, first, first_sequence, documents, labels, labelled)
            if number >= skip:
                yield chunk
            first, number = first + len(chunk), number + 1
            first_sequence += len(chunk.start_S1) - 1

    def spell(self, token: int) -> str | None:
        return None if self._opened is None or token < 0 else spelling(self._opened[1], token)

    def logits(self, rows_FD: Tensor) -> Logits | None:
        if self._opened is None or self._store.site is None:
            return None
        direction_FD = residual_directions(self._opened[0], self._store.site, rows_FD)
        unembedding_VD = unembedding(self._opened[0])
        if direction_FD is None or unembedding_VD is None:
            return None
        return lambda some: direction_FD[some] @ unembedding_VD.T


def _whole(found: Activations) -> int:
    """Where the last sequence of some rows begins, if not at their start."""
    begins = (found.position_N == 0).nonzero()[:, 0]
    return int(begins[-1]) if len(begins) else 0


def _listed(corpus: Any) -> str | None:
    return corpus if isinstance(corpus, str) or corpus is None else ", ".join(map(str, corpus))
