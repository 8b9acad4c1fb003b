"""Where a feature store's places come from: a model on images or sound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from cosae.activations.perturbation import Perturbation, apply
from cosae.browse.collect.chunks import Chunk
from cosae.media.png import thumbnail
from cosae.models.capture import capture
from cosae.models.sites import resolve_site
from cosae.recipe import DataConfig
from cosae.run.dataset.corpus import check_corpus
from cosae.run.dataset.media import MediaCorpus
from cosae.run.dataset.model import batch_size, open_model
from cosae.run.explore.sources import NATURAL, identity_of_text
from cosae.types import Sequences


class ModelMedia:
    """A model on the images or sounds of a recipe's data, training side (a `Source`).

    A place's number stands for a token's id, and is spelled as where it is: row 2, column 3.

    layout    where places lie
    pictures  PNG of every image that was read, by the number of its sequence; none of sounds
    """

    def __init__(
        self, data: DataConfig, tokens: int, seed: int, device: str, perturbation: Perturbation = NATURAL
    ) -> None:
        self._perturbation = perturbation
        check_corpus(data)
        self.data = data = replace(data, positions="all", prefetch_chunks=0)
        self.opened: tuple[Any, Any] = open_model(data, device)
        self.where = resolve_site(self.opened[0], data.site)
        self._corpus = MediaCorpus(data, self.opened[0], data.site, seed)
        self.layout = self._corpus.layout
        self.total, self.context = tokens, self.layout.n_places
        self.model: str | None = data.model
        self.site: str | None = self.where.name
        self.corpus: str | None = data.corpus if isinstance(data.corpus, str) else ", ".join(data.corpus)
        self.concepts = tuple((concept.name, concept.description) for concept in self._corpus.concepts)
        self.identity = identity_of_text(data, tokens, seed, perturbation)
        self.pictures: dict[int, bytes] = {}

    def chunks(self, skip: int) -> Iterator[Chunk]:
        """Chunks of whole images or sounds, until there are `total` places or no more of them."""
        batch = batch_size(self.data, self.opened[0], self.where, "float32")
        first = first_sequence = 0
        for number, sequences in enumerate(self._corpus.chunks("train")):
            self._note(sequences, first_sequence)
            if number >= skip:
                found = capture(self.opened[0], sequences, self.where, batch_sequences=batch)[self.where.name]
                found = apply(replace(found, token_N=found.index_N), self._perturbation, number)
                known: dict[str, Any] = {}
                if self.concepts:
                    names, start = sequences.doc_names, sequences.first_doc
                    known["labels_NC"], known["labelled_N"] = self._corpus.label(found, names, start)
                names_of = {sequences.first_doc + i: name for i, name in enumerate(sequences.doc_names)}
                yield Chunk(found, first, first_sequence, names_of, **known)
            first, first_sequence = first + sequences.n_rows, first_sequence + len(sequences)
            if first >= self.total:
                return

    def spell(self, token: int) -> str | None:
        return self.layout.place(token)

    def logits(self, rows_FD: Any) -> None:
        """Places are no words."""

    def _note(self, sequences: Sequences, first: int) -> None:
        pixels = (sequences.inputs or {}).get("pixel_values")
        if pixels is not None and pixels.ndim == 4 and pixels.shape[1] in (1, 3):
            self.pictures |= {first + row: thumbnail(one) for row, one in enumerate(pixels)}
