"""A corpus of images or sound, through a model's processor, as sequences of places."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cosae.activations.positions import choose_positions
from cosae.errors import CosaeError
from cosae.media import digits
from cosae.media.decode import load_processor, pixels_of, sound_of, waveform
from cosae.media.files import Medium, in_own_order, read_media
from cosae.models.layout import Layout, layout_of
from cosae.models.load import place_of
from cosae.models.sites import resolve_site
from cosae.recipe import DataConfig
from cosae.run.dataset.base import Side
from cosae.text.concepts.table import Concept
from cosae.text.mixture import parse_corpus
from cosae.types import Activations, Sequences

WINDOW_SECONDS = 10.0
"""Sound is cut into windows of so many seconds, where the model's processor has no length of its own."""
LEAST_SECONDS = 0.1
"""Shorter ends of a sound are left out."""


class MediaCorpus:
    """What a recipe's images or sounds give to a model, each once or over and over.

    concepts  of its labels; () where there are none
    Raises CosaeError for a mixture, and for what names nothing or has no processor.
    """

    def __init__(self, data: DataConfig, model: Any, site: str, seed: int) -> None:
        sources = parse_corpus(data.corpus)
        if len(sources) > 1:
            raise CosaeError(f"{data.inputs} come from one corpus, not from a mixture. Got {len(sources)} instead.")
        self._data, self._model, self._seed = data, model, seed
        self.spec, self._site = sources[0].spec, resolve_site(model, site)
        self.kind: Any = data.inputs
        self.concepts: tuple[Concept, ...] = digits.CONCEPTS if self.spec == "digits" else ()
        self._layouts: dict[Any, Layout] = {}

    @property
    def warnings(self) -> list[str]:
        what = "is read in its own order, so that a batch holds one kind of it if it is sorted: shuffle it first"
        return [f"{self.spec} {what}"] if in_own_order(self.spec) else []

    def chunks(self, side: Side) -> Iterator[Sequences]:
        """One side, once: `chunk_sequences` of them at a time."""
        data = self._data
        media = read_media(self.spec, self.kind, data.field, self._seed)
        chosen = (medium for medium in media if medium.side(data.held_out_frac) == side)
        made = self._of_images(chosen) if self.kind == "images" else self._of_sound(chosen)
        empty = True
        for sequences in made:
            empty = False
            yield choose_positions(sequences, data.positions)
        if empty:
            which = f"the {'held-out' if side == 'held_out' else 'train'} side (held_out_frac {data.held_out_frac})"
            raise CosaeError(f"the corpus {self.spec} leaves none of its {self.kind} for {which}: give more of them.")

    @cached_property
    def layout(self) -> Layout:
        """Where the places of the first of them lie."""
        next(self.chunks("train"))
        return next(iter(self._layouts.values()))

    def label(self, rows: Activations, names: Sequence[str], first: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """(N, C) labels of captured rows by the names of what they are of, and (N,) which are known: all."""
        number_N = [int(names[doc - first].split()[1].rstrip(":")) for doc in rows.doc_N.tolist()]
        pixels, classes = digits.pixels()[:, 0], digits.classes()
        known = {number: digits.label_patches(pixels[number], int(classes[number])) for number in {*number_N}}
        place_N = rows.index_N.clamp(min=0).tolist()  # a mean over an image has the image's own labels
        labels_NC = np.stack([known[n][place] for n, place in zip(number_N, place_N, strict=True)])
        return labels_NC, np.ones(len(rows), dtype=bool)

    @cached_property
    def _processor(self) -> Any:
        if self.spec == "digits":
            return None
        return load_processor(place_of(self._data.model), self.kind, self._data.revision)

    def _of_images(self, media: Iterable[Medium]) -> Iterator[Sequences]:
        first = 0
        for some in _batched(media, self._data.chunk_sequences):
            ready = isinstance(some[0].content, np.ndarray) and some[0].content.dtype.kind == "f"
            inputs = pixels_of(some, None if ready else self._processor)
            layout = self._layout(inputs)
            yield layout.sequences(inputs, [medium.name for medium in some], first)
            first += len(some)

    def _of_sound(self, media: Iterable[Medium]) -> Iterator[Sequences]:
        """Windows of sounds; those of one length go together."""
        processor = self._processor
        rate = int(processor.sampling_rate)
        padded = getattr(processor, "n_samples", None)  # Whisper's: every window has its length
        longest = int(padded or WINDOW_SECONDS * rate)
        first = 0
        for some in _batched(_windows(media, rate, longest), self._data.chunk_sequences):
            for length in sorted({len(samples) for _, samples in some}, reverse=True):
                same = [(name, samples) for name, samples in some if len(samples) == length]
                inputs = sound_of([samples for _, samples in same], processor)
                layout = self._layout(inputs, (padded or length) / rate)
                n_real = round(layout.n_places * length / (padded or length))
                yield layout.sequences(inputs, [name for name, _ in same], first, [max(1, n_real)] * len(same))
                first += len(same)

    def _layout(self, inputs: dict[str, torch.Tensor], seconds: float | None = None) -> Layout:
        shape = tuple((name, tuple(value.shape[1:])) for name, value in inputs.items())
        if shape not in self._layouts:
            self._layouts[shape] = layout_of(self._model, self._site, inputs, seconds)
        return self._layouts[shape]


def _windows(media: Iterable[Medium], rate: int, longest: int) -> Iterator[tuple[str, Any]]:
    for medium in media:
        samples = waveform(medium, rate)
        for start in range(0, len(samples), longest):
            window = samples[start : start + longest]
            if len(window) >= LEAST_SECONDS * rate:
                yield f"{medium.name} {start / rate:.0f} s" if len(samples) > longest else medium.name, window


def _batched(things: Iterable[Any], n: int) -> Iterator[list[Any]]:
    going = iter(things)
    while some := list(itertools.islice(going, n)):
        yield some
