"""A store of activations: neither the model nor the text is needed any more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cosae.activations.sample import Sample, SinkRule
from cosae.activations.store.reader import open_store
from cosae.activations.store.source import V01, StoreSource, check_pair, take_pair
from cosae.activations.store.statistics import noise_warning
from cosae.errors import CosaeError, short
from cosae.interop.public import PACKAGED, of_the_hub
from cosae.io.fetched.packages import MODELS, folder_of
from cosae.io.legacy import V01_ORDER
from cosae.io.values import from_plain, to_plain
from cosae.models.embedded import model_path
from cosae.models.load import open_tokenizer
from cosae.models.unembed import spelling
from cosae.recipe import DataConfig
from cosae.run.dataset.base import Dataset, DataUse, Sizes, Split, side_of, split_held_out, tokens_around
from cosae.run.dataset.model import ModelDataset
from cosae.run.plan.resources import Item
from cosae.text.concepts.table import CONCEPTS
from cosae.types import Activations

CAPTURED: tuple[str, ...] = (
    "model",
    "revision",
    "model_dtype",
    "attention",
    "corpus",
    "text_field",
    "suffixes",
    "txt_unit",
    "context",
)
CAPTURED += ("packing", "add_bos", "max_chars", "min_chars", "held_out_frac")
"""What a store says of its model and text, under the names of a recipe's data."""

SAMPLE_ROWS = 256
"""Consecutive train rows that are sampled together."""
ORDER_BYTES = 24
"""Of a block of a store, while an epoch's order is drawn."""


class StoreDataset(Dataset):
    """The store that `config.store` names.

    Held-out and calibration tokens are the store's held-out rows, drawn as those of a live capture are; probing has
    labels where the store was captured from the embedded corpus under the same list of concepts. Raises CosaeError for
    a store that cannot be read, is damaged, is of another site than the configuration names, or has no held-out rows.
    """

    def __init__(self, config: DataConfig, use: DataUse) -> None:
        super().__init__(config, use)
        assert config.store is not None
        named = None if config.site == DataConfig.site else config.site
        self.store = open_store(config.store, config.store_site or named)
        self.site = self.store.site
        if named is not None and (self.site is None or not self.site.is_named(named)):
            what = f"{self.store.folder} is a store of {config.store_site}, not of {named}"
            raise CosaeError(f"{what}: drop data.site, which the store knows.")
        request, asked, usual = self.store.record["request"], to_plain(config), to_plain(DataConfig())
        for name in CAPTURED:
            if asked[name] not in (usual[name], request.get(name, asked[name])):
                what = f"{self.store.folder} was captured with {name} {request[name]!r}, not {asked[name]!r}"
                raise CosaeError(f"{what}: drop data.{name}, which the store knows.")
        self.model_name = self.store.record["request"].get("model")
        if not self.store.n_rows("held_out"):
            what = f"{self.store.folder} has no held-out rows, on which thresholds are calibrated"
            raise CosaeError(f"{what}: capture a store with --held-out-tokens above 0.")
        pair = None if config.target is None else open_store(config.store, config.target)
        if pair is not None:
            check_pair(self.store, pair)
            self.target = pair.site
        mixing = V01 if config.order == V01_ORDER else None
        self.source: StoreSource = StoreSource(self.store, seed=use.seed, mixing=mixing, target=pair)
        self.has_concepts = self.store.concepts == tuple(concept.name for concept in CONCEPTS)

    @property
    def warnings(self) -> list[str]:
        warning = noise_warning(self.store.statistics, self.store.dtype)
        return [] if warning is None else [f"store {self.store.folder.name}: {warning}."]

    def resolved(self) -> DataConfig:
        """The configuration with the model, site and text that the store was captured from."""
        request = self.store.record["request"]
        known = {name: request[name] for name in CAPTURED if request.get(name) is not None}
        known |= {} if self.site is None else {"site": self.site.name}
        return from_plain(DataConfig, {**to_plain(self.config), **known}, str(self.store.folder))

    def sizes(self) -> Sizes:
        order = Item("the order of the store's rows", ORDER_BYTES * self.source.n_blocks)
        return Sizes(self.source.d_in, (order,), self.source.chunk_tokens, d_out=self.d_out)

    def sample(self, split: Split, n_tokens: int, rule: SinkRule | None = None) -> Sample:
        side = side_of(split)
        held_out = self.store.n_rows("held_out")
        row_N = self._spread(n_tokens) if side == "train" else split_held_out(held_out, split, self.use)
        found = take_pair(self.store, self.source.target, side, row_N)
        first = len(self.store.documents("held_out")) if side == "train" else 0
        names = self.store.documents(side)
        documents = tuple(names[i - first] for i in torch.unique(found.doc_N).tolist() if i >= 0)
        labels_NC, labelled_N = self.store.labels(side, row_N) if self.has_concepts else (None, None)
        return Sample.of(
            self._perturbed(found, split), rule, labels_NC=labels_NC, labelled_N=labelled_N, documents=documents
        )

    def check_reads_texts(self) -> None:
        _ = self._reader

    def read_texts(self, texts: Sequence[str], context: int) -> Iterator[tuple[list[int], Activations]]:
        return self._reader.read_texts(texts, context)

    @property
    def vocabulary(self) -> int:
        return self._reader.vocabulary

    def spell(self, token: int) -> str | None:
        return None if self._tokenizer is None else spelling(self._tokenizer, token)

    def around(self, doc: int, index: int, before: int, after: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tokens_around(*self._held_out_tokens, doc, index, before, after)

    @cached_property
    def _tokenizer(self) -> Any:
        """Of the model that the store was captured from, where that is on this machine for sure: packaged, or fetched.
        None for others."""
        name = self.store.record["request"].get("model")
        here = name == "embedded" or (name in MODELS and folder_of(name).is_dir())
        return open_tokenizer(model_path() if name == "embedded" else name) if here else None

    @cached_property
    def _held_out_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Document, index and id of every held-out token."""
        parts = []
        for rows in torch.split(torch.arange(self.store.n_rows("held_out")), 8192):
            found = self.store.take("held_out", rows)
            parts.append((found.doc_N, found.index_N, found.token_N))
        doc_N, index_N, token_N = (torch.cat(column) for column in zip(*parts, strict=True))
        return doc_N, index_N, token_N

    @cached_property
    def _reader(self) -> ModelDataset:
        """The model that the store was captured from, loaded when it reads.

        Raises CosaeError where it is a place on this machine that the recipe does not name: a store may come from a
        stranger.
        """
        data = self.resolved()
        if data.model not in (*PACKAGED["model"], self.config.model) and not of_the_hub(data.model):
            what = f"{self.store.folder} was captured from the model {short(data.model)}, a place on this machine"
            raise CosaeError(f"{what}: to let it read labelled texts, name it as data.model in a recipe file.")
        reader = ModelDataset(replace(data, store=None, store_site=None, corpus=DataConfig.corpus), self.use)
        reader.progress = self.progress
        return reader

    def close(self) -> None:
        for name in ("_reader", "_tokenizer", "_held_out_tokens"):
            self.__dict__.pop(name, None)

    def _spread(self, n_tokens: int) -> Tensor:
        """Ascending numbers of about n_tokens train rows: whole blocks drawn from all over the store."""
        n = self.store.n_rows("train")
        first_N = torch.arange(0, n, SAMPLE_ROWS)
        order = torch.randperm(len(first_N), generator=torch.Generator().manual_seed(0))
        chosen_N = first_N[order[: -(-n_tokens // SAMPLE_ROWS)].sort().values]
        row_N = (chosen_N[:, None] + torch.arange(SAMPLE_ROWS)).flatten()
        return row_N[row_N < n]
