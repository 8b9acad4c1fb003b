"""A model on images or sound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from cosae.activations.cached import CachedSource
from cosae.activations.monitor import finite_rows
from cosae.activations.stream import Source
from cosae.errors import CosaeError
from cosae.io.values import to_plain
from cosae.models.capture import capture
from cosae.models.size import model_size
from cosae.models.sources import StreamedModelSource
from cosae.recipe import DataConfig
from cosae.run.dataset.base import DataUse, Side, Sizes
from cosae.run.dataset.media import MediaCorpus
from cosae.run.dataset.model import ModelDataset, batch_size, model_place
from cosae.run.plan.resources import Item
from cosae.types import Activations, Sequences

TYPICAL_PLACES = 256
"""Of an image or a window of sound, before a model has seen one."""


class MediaDataset(ModelDataset):
    """Activations of one site on images or sound, captured as they are needed."""

    def __init__(self, config: DataConfig, use: DataUse) -> None:
        super().__init__(config, use)
        self.has_concepts = config.corpus == "digits"

    @cached_property
    def media(self) -> MediaCorpus:
        """The corpus through the model's processor."""
        return MediaCorpus(self.config, self.model, self.config.site, self.use.seed)

    @property
    def concepts(self) -> Any:
        return self.media.concepts

    @cached_property
    def source(self) -> Source:  # type: ignore[override]
        made = StreamedModelSource(self.model, lambda: self.media.chunks("train"), self.site, **self._options)
        return CachedSource(made, self.use.keep_tokens) if self.use.keep_tokens else made

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "layout": to_plain(self.media.layout), "positions": self.config.positions}

    @property
    def warnings(self) -> list[str]:
        return [f"corpus {warning}" for warning in self.media.warnings] if "media" in self.__dict__ else []

    def close(self) -> None:
        pass

    def spell(self, token: int) -> str | None:
        return None

    def sizes(self) -> Sizes:
        config = self.config
        name = model_place(config)
        size = model_size(str(name), config.site, config.model_dtype, config.revision, config.attention)
        chunk = config.chunk_sequences * TYPICAL_PLACES
        work = batch_size(config, None, None, "") * TYPICAL_PLACES * size.pass_bytes
        return Sizes(size.d_in, (Item(f"the model ({config.model_dtype})", size.weight_bytes),), chunk, work)

    def sequences(self, side: Side, n_tokens: int) -> Sequences:
        raise CosaeError(f"this measurement runs a language model on text; these data are {self.config.inputs}.")

    @property
    def vocabulary(self) -> int:
        raise CosaeError(f"these data are {self.config.inputs}, which have no token ids.")

    def check_reads_texts(self) -> None:
        raise CosaeError(f"labelled texts need a model that reads text; this one reads {self.config.inputs}.")

    def read_texts(self, texts: Sequence[str], context: int) -> Iterator[tuple[list[int], Activations]]:
        self.check_reads_texts()
        yield from ()

    def _capture(self, side: Side, n_tokens: int) -> tuple[Activations, dict[str, Any]]:
        """About n_tokens of one side, unperturbed, in whole images or sounds, and what a Sample says of them."""
        options = {**self._options, "store_dtype": torch.float32} if self.use.device == "cpu" else self._options
        parts: list[Activations] = []
        names: list[str] = []
        what = "held-out" if side == "held_out" else "training"
        with self.progress.phase(f"reading {what} activations", n_tokens):
            for chunk in self.media.chunks(side):
                parts.append(capture(self.model, chunk, self.site, **options)[self.site.name])
                names.extend(chunk.doc_names)
                if sum(map(len, parts)) >= n_tokens:
                    break
        found = Activations.cat(parts)
        activations = finite_rows(found)
        known: dict[str, Any] = {"documents": tuple(names), "n_dropped": len(found) - len(activations)}
        if self.has_concepts:
            known["labels_NC"], known["labelled_N"] = self.media.label(activations, names, 0)
        return activations, known
