"""A corpus as `capture` reads it: each side once, part by part, with what labels its tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from cosae.activations.store.format import SIDES
from cosae.recipe import DataConfig
from cosae.run.dataset.base import Side
from cosae.run.dataset.model import corpus_of
from cosae.text.tokenization import TokenizedDocument
from cosae.types import Activations, Sequences

Labels = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class Part:
    """Some sequences of one side, for one or a few forward passes.

    n_rows          how many of their real tokens are wanted, the first ones
    first_document  what is added to their document numbers to number documents across both sides
    labels          (N, L) uint8 packed labels and (N,) bool of captured rows; None both where there are no concepts
    """

    sequences: Sequences
    n_rows: int
    first_document: int
    labels: Callable[[Activations], Labels] = field(repr=False)


class CaptureText:
    """The sides of a recipe's corpus through a tokenizer. Nothing of the train side is held but names.

    corpus    the text itself
    concepts  names of the label bits; None where the corpus has no concepts
    n_rows    rows by side, as far as its parts were taken
    """

    def __init__(self, data: DataConfig, opened: tuple[Any, Any], seed: int, held_out_tokens: int) -> None:
        self._data, self._held_out_tokens = data, held_out_tokens
        self.corpus = corpus_of(data, opened, seed, held_out=held_out_tokens > 0)
        self.n_rows: dict[str, int] = {"held_out": 0, "train": 0}
        self._train_names: list[str] = []
        self.concepts: tuple[str, ...] | None = None
        if self.corpus.specs == ("pylib",) and data.positions != "mean":
            from cosae.text.concepts.labels import CONCEPTS

            self.concepts = tuple(concept.name for concept in CONCEPTS)

    @property
    def warnings(self) -> list[str]:
        """What a person should be told of what was read so far."""
        return self.corpus.warnings

    @property
    def record(self) -> dict[str, Any]:
        """What a store's record says of it beside the recipe."""
        return {"add_bos": self.corpus.add_bos}

    def close(self) -> None:
        self.corpus.close()

    def names(self, side: Side) -> tuple[str, ...]:
        """Names of the side's documents, as far as its parts were taken."""
        return tuple(self._train_names) if side == "train" else self._held_out[1]

    def parts(self, side: Side, n_rows: int) -> Iterator[Part]:
        """The side from its beginning; n_rows of the train side, of the other whole sequences with at least as many as
        were asked for."""
        self.n_rows[side] = 0
        yield from self._train(n_rows) if side == "train" else self._drawn()

    def _train(self, n_rows: int) -> Iterator[Part]:
        self._train_names = []
        read: dict[int, TokenizedDocument] = {}

        def note(tokenized: Iterable[TokenizedDocument]) -> Iterator[TokenizedDocument]:
            more = False
            for one in tokenized:
                if not more:
                    read[len(names)] = one
                    names.append(one.name)
                more = one.more
                yield one

        names: list[str] = []
        first_document = len(self._held_out[1])
        for chunk in self.corpus.pack_each(note(self.corpus.each("train"))):
            used = torch.unique(chunk.doc_ST[chunk.mask_ST]).tolist()
            for number in [number for number in read if number < used[0]]:
                del read[number]
            n = min(chunk.n_rows, n_rows - self.n_rows["train"])
            yield Part(chunk, n, first_document, partial(self._label, "train", dict(read)))
            self.n_rows["train"] += n
            self._train_names = names[: used[-1] + 1]
            if self.n_rows["train"] >= n_rows:
                return

    def _drawn(self) -> Iterator[Part]:
        packed, _, read = self._held_out
        step = self._data.chunk_sequences
        for first in range(0, len(packed), step):
            chunk = packed[first : first + step]
            n = chunk.n_rows
            yield Part(chunk, n, 0, partial(self._label, "held_out", read))
            self.n_rows["held_out"] += n

    @cached_property
    def _held_out(self) -> tuple[Sequences, tuple[str, ...], dict[int, TokenizedDocument]]:
        """Sequences drawn from all held-out documents, as a live run draws them; names, and tokens by number."""
        if not self._held_out_tokens:
            nothing = torch.zeros(0, self._data.context, dtype=torch.int64)
            return Sequences(nothing, nothing, nothing, nothing.bool(), nothing.bool()), (), {}
        wanted = self._held_out_tokens
        listed = self.corpus.tokenized("held_out", wanted if self.corpus.streamed else None, drawn=wanted)
        packed = self.corpus.pack(listed)
        order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(0))
        filled = packed.rows_S[order].cumsum(0)
        chosen = packed[order[: int((filled < self._held_out_tokens).sum()) + 1].sort().values]
        return chosen, packed.doc_names, dict(enumerate(listed))

    @cached_property
    def _texts(self) -> dict[str, str]:
        """Text by document name, of a corpus with concepts."""
        both = itertools.chain(*(self.corpus.documents("pylib", side, "train") for side in SIDES))
        return {document.name: document.text for document in both}

    def _label(self, side: Side, read: dict[int, TokenizedDocument], rows: Activations) -> Labels:
        if self.concepts is None:
            return None, None
        from cosae.text.concepts.labels import has_labels, label_activations, label_document

        used = torch.unique(rows.doc_N).tolist()
        labels = [
            label_document(self._texts[read[i].name], read[i].offset_T2, read[i].name) if i in used else None
            for i in range(max(used) + 1)
        ]
        packed_NL = np.packbits(label_activations(rows, labels), axis=1, bitorder="little")
        return torch.from_numpy(packed_NL), torch.from_numpy(has_labels(rows, labels))
