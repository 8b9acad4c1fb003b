"""A corpus of images or sound as `capture` reads it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from cosae.io.values import to_plain
from cosae.recipe import DataConfig
from cosae.run.capture.text import CaptureText, Labels, Part
from cosae.run.dataset.base import Side
from cosae.run.dataset.media import MediaCorpus
from cosae.types import Activations


def open_corpus(
    data: DataConfig, opened: tuple[Any, Any], site: str, seed: int, held_out_tokens: int
) -> CaptureText | CaptureMedia:
    """A recipe's corpus, of whatever kind, for one capture."""
    if data.inputs in ("images", "audio"):
        return CaptureMedia(data, opened[0], site, seed, held_out_tokens)
    return CaptureText(data, opened, seed, held_out_tokens)


class CaptureMedia:
    """The sides of a recipe's images or sounds, each once; fields as of `CaptureText`."""

    def __init__(self, data: DataConfig, model: Any, site: str, seed: int, held_out_tokens: int) -> None:
        self.corpus = MediaCorpus(data, model, site, seed)
        self._held_out_tokens = held_out_tokens
        self.n_rows: dict[str, int] = {"held_out": 0, "train": 0}
        self._names: dict[str, list[str]] = {"held_out": [], "train": []}
        self.concepts = tuple(concept.name for concept in self.corpus.concepts) or None

    @property
    def warnings(self) -> list[str]:
        return self.corpus.warnings

    @property
    def record(self) -> dict[str, Any]:
        """Where the places of a row lie."""
        return {"layout": to_plain(self.corpus.layout)}

    def close(self) -> None:
        """Nothing works in the background."""

    def names(self, side: Side) -> tuple[str, ...]:
        return tuple(self._names[side])

    def parts(self, side: Side, n_rows: int) -> Iterator[Part]:
        wanted = n_rows if side == "train" else self._held_out_tokens
        self.n_rows[side], self._names[side] = 0, []
        first = len(self._names["held_out"]) if side == "train" else 0
        if not wanted:
            return
        for chunk in self.corpus.chunks(side):
            n = min(chunk.n_rows, wanted - self.n_rows[side]) if side == "train" else chunk.n_rows
            self._names[side] += chunk.doc_names
            self.n_rows[side] += n
            yield Part(chunk, n, first, partial(self._label, chunk.doc_names, chunk.first_doc))
            if self.n_rows[side] >= wanted:
                return

    def _label(self, names: tuple[str, ...], first: int, rows: Activations) -> Labels:
        if self.concepts is None:
            return None, None
        labels_NC, labelled_N = self.corpus.label(rows, names, first)
        return torch.from_numpy(np.packbits(labels_NC, axis=1, bitorder="little")), torch.from_numpy(labelled_N)
