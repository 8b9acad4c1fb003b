"""A language model on a corpus."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as TextSequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cosae.activations.cached import CachedSource
from cosae.activations.monitor import finite_rows
from cosae.activations.positions import choose_positions
from cosae.activations.sample import Sample, SinkRule
from cosae.activations.store.format import STORE_DTYPES
from cosae.activations.stream import Source
from cosae.errors import CosaeError
from cosae.io.fetched.packages import text_of
from cosae.models.batching import choose_batch
from cosae.models.capture import capture, capture_pair
from cosae.models.embedded import embedded_path
from cosae.models.load import load_model
from cosae.models.parts import vocabulary_of
from cosae.models.sites import resolve_site
from cosae.models.size import model_size
from cosae.models.sources import ModelSource, StreamedModelSource
from cosae.recipe import DataConfig
from cosae.run.dataset.base import Dataset, DataUse, Side, Sizes, Split, side_of, split_held_out, tokens_around
from cosae.run.dataset.corpus import CorpusText, adds_bos, around_texts, check_corpus, pad_id, streamed
from cosae.run.dataset.ids import IdCorpus
from cosae.run.plan.resources import Item
from cosae.text.concepts.labels import has_labels, label_activations, label_document
from cosae.text.encoders import surrounded
from cosae.text.mixture import parse_corpus
from cosae.text.packing import iterate_sequences
from cosae.text.pylib import Document
from cosae.text.tokenization import AT_ONCE_CHARS, TokenizedDocument, tokenize_documents
from cosae.types import Activations, Sequences, Site

MEDIA_AT_ONCE = 16
"""Images or sounds in a forward pass, where "auto" is asked for: how much memory one takes is not measured."""
TEXTS_AT_ONCE = 64
"""Labelled texts captured at once."""
POOL = 4
"""Train samples are drawn from documents of this many times the tokens wanted: more documents, less of each."""
TEXT_BYTES = 36
TOKENIZING_BYTES = 190
"""Of a character that the tokenizer has in hand, measured with BPE on English."""
AUTO_PASS_TOKENS = 4096
IDS_BYTES = 21
PYLIB_BYTES = 12_000_000


class ModelDataset(Dataset):
    """Activations of one site, captured as they are needed. The model is loaded when it is first run."""

    def __init__(self, config: DataConfig, use: DataUse) -> None:
        super().__init__(config, use)
        self._captured: dict[tuple[Side, int], tuple[Activations, dict[str, Any]]] = {}
        self.model_name = config.model
        self.has_concepts = [s.spec for s in parse_corpus(config.corpus)] == ["pylib"] and config.positions != "mean"
        check_corpus(config)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        with self.progress.phase("loading model"):
            return open_model(self.config, self.use.device)

    @property
    def model(self) -> Any:
        """The language model, frozen, on the device."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        """Raises CosaeError where the data came as token ids, for which none is loaded."""
        if self._loaded[1] is None:
            raise CosaeError(f"this needs the model's tokenizer, and the data are {self.config.inputs}.")
        return self._loaded[1]

    @cached_property
    def site(self) -> Site:  # type: ignore[override]
        return resolve_site(self.model, self.config.site)

    @cached_property
    def target(self) -> Site | None:  # type: ignore[override]
        return None if self.config.target is None else resolve_site(self.model, self.config.target)

    @cached_property
    def text(self) -> CorpusText:
        """The corpus through the tokenizer."""
        return corpus_of(self.config, self._loaded, self.use.seed)

    @cached_property
    def batch_sequences(self) -> int:
        """Sequences per forward pass: as given, or as many as fit."""
        return batch_size(self.config, self.model, self.site, self.use.store_dtype)

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "batch_sequences": self.batch_sequences,
            "store_dtype": getattr(torch, self.use.store_dtype),
            "allow_non_finite": self.config.non_finite == "drop",
            "on_rows": self.progress.rows,
        }

    @cached_property
    def source(self) -> Source:  # type: ignore[override]
        source: Source
        _ = self.model  # a phase of its own
        if self.text.streamed:
            options = {**self._options, "target": self.target}
            source = StreamedModelSource(self.model, self.text.text(), self.site, **options)
        else:
            with self.progress.phase("reading text"):
                packed = self.text.pack(self.text.tokenized("train", self.use.train_tokens))
            options = {**self._options, "chunk_sequences": self.config.chunk_sequences, "seed": self.use.seed}
            options["target"] = self.target
            source = ModelSource(self.model, packed, self.site, **options)
        return CachedSource(source, self.use.keep_tokens) if self.use.keep_tokens else source

    @property
    def warnings(self) -> list[str]:
        return [f"corpus {warning}" for warning in self.text.warnings] if "text" in self.__dict__ else []

    def resolved(self) -> DataConfig:
        return replace(self.config, batch_sequences=self.batch_sequences)

    def again(self, use: DataUse) -> Dataset:
        _ = self.source  # read once, for both
        return super().again(use)

    def spell(self, token: int) -> str | None:
        return None if self._loaded[1] is None else str(self.tokenizer.decode([token]))

    def around(self, doc: int, index: int, before: int, after: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        n_tokens = self.use.held_out_tokens + self.use.calibration_tokens
        if ("held_out", n_tokens) not in self._captured:
            return (), ()
        found, _ = self._captured["held_out", n_tokens]
        return tokens_around(found.doc_N, found.index_N, found.token_N, doc, index, before, after)

    def close(self) -> None:
        if "text" in self.__dict__:
            self.text.close()

    def sizes(self) -> Sizes:
        config = self.config
        name, how = str(model_place(config)), (config.model_dtype, config.revision, config.attention)
        size = model_size(name, config.site, *how)
        d_out = None if config.target is None else model_size(name, config.target, *how).d_in
        # measured where asked, against an eighth of the memory and at most so many tokens
        auto = config.batch_sequences == "auto"
        per_pass = AUTO_PASS_TOKENS if auto else int(config.batch_sequences) * config.context
        chunk = config.chunk_sequences * config.context
        value = max(4, STORE_DTYPES[config.model_dtype].itemsize)
        ahead = config.prefetch_chunks * chunk * (value * (size.d_in + (d_out or 0)) + IDS_BYTES)
        specs = [source.spec for source in parse_corpus(config.corpus)]
        text = sum(_bytes_of(spec) for spec in specs if not streamed(spec))
        # those wanted, or about all that the corpus has; few of a corpus that is streamed
        as_it_comes = len(specs) > 1 or streamed(specs[0])
        tokens = chunk if as_it_comes else min(self.use.train_tokens, text // 2)
        resident = (
            Item(f"the model ({config.model_dtype})", size.weight_bytes),
            *([Item("the text", text)] if text else ()),
            Item("the text as tokens", TEXT_BYTES * tokens),
            *([Item("chunks captured ahead", ahead)] if ahead else ()),
        )
        tokenized = TOKENIZING_BYTES * (AT_ONCE_CHARS if as_it_comes else min(text, AT_ONCE_CHARS))
        work = per_pass * (size.pass_bytes + config.context * size.attention_bytes)
        joined = config.site.split("+") if "+" in config.site else []
        widths = tuple(model_size(name, one, *how).d_in for one in joined)
        return Sizes(size.d_in, resident, chunk, max(work, tokenized), d_out, widths)

    def sample(self, split: Split, n_tokens: int, rule: SinkRule | None = None) -> Sample:
        side = side_of(split)
        if side == "held_out":
            n_tokens = self.use.held_out_tokens + self.use.calibration_tokens
        if (side, n_tokens) not in self._captured:
            self._captured[side, n_tokens] = self._capture(side, n_tokens)
        activations, known = self._captured[side, n_tokens]
        perturbed = self._perturbed(activations, split)
        if side == "held_out":
            rows = split_held_out(len(perturbed), split, self.use)
            perturbed = perturbed[rows]
            labels: dict[str, Any] = {
                name: known[name][rows.numpy()] for name in ("labels_NC", "labelled_N") if name in known
            }
            known = {**known, **labels}
        return Sample.of(perturbed, rule, **known)

    def sequences(self, side: Side, n_tokens: int) -> Sequences:
        """About n_tokens of one side as token sequences, drawn from many documents: those that `sample` captures.

        Raises CosaeError where only some places become rows.
        """
        if self.config.positions != "all":
            raise CosaeError(
                "this measurement puts every token's reconstruction into the model. Got data.positions "
                f"{self.config.positions!r}: measure with --set data.positions=all."
            )
        return self._draw(side, n_tokens)[1]

    @property
    def vocabulary(self) -> int:
        return vocabulary_of(self.model) if self._loaded[1] is None else len(self.tokenizer)

    def check_reads_texts(self) -> None:
        pass

    def read_texts(self, texts: TextSequence[str], context: int) -> Iterator[tuple[list[int], Activations]]:
        documents = (Document(str(row), text) for row, text in enumerate(texts))
        bos = adds_bos(self.config, self.tokenizer)
        tokenized = tokenize_documents(documents, self.tokenizer, add_bos=bos, head=context)
        if (around := around_texts(self.config, self.tokenizer)) is not None:
            tokenized = surrounded(tokenized, around, context)
        special: dict[str, Any] = {"pad_id": pad_id(self.tokenizer), "special_ids": self.tokenizer.all_special_ids}
        packed = iterate_sequences(tokenized, context, "document", rows_per_chunk=TEXTS_AT_ONCE, **special)
        for number, chunk in enumerate(packed):
            names = [chunk.doc_names[i - chunk.first_doc] for i in chunk.doc_ST[:, 0].tolist()]
            cut = choose_positions(chunk.columns(int(chunk.mask_ST.sum(1).max())), self.config.positions)
            found = capture(self.model, cut, self.site, batch_sequences=self.batch_sequences)[self.site.name]
            yield [int(name) for name in names], self._perturbed(found, "held_out", number)

    def _draw(self, side: Side, n_tokens: int) -> tuple[list[TokenizedDocument], Sequences]:
        """Tokenised documents, and about n_tokens of them in whole sequences."""
        if side == "train":
            tokenized = self.text.tokenized("train", POOL * n_tokens, salt="sample")
        else:
            tokenized = self.text.tokenized("held_out", n_tokens if self.text.streamed else None, drawn=n_tokens)
        everything = self.text.pack(tokenized)
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
        filled = everything.rows_S[order].cumsum(0)
        return tokenized, everything[order[: int((filled < n_tokens).sum()) + 1].sort().values]

    def _capture(self, side: Side, n_tokens: int) -> tuple[Activations, dict[str, Any]]:
        """About n_tokens of one side, unperturbed: sequences of many documents, and what a Sample says of them."""
        tokenized, packed = self._draw(side, n_tokens)
        options = {**self._options, "store_dtype": torch.float32} if self.use.device == "cpu" else self._options
        what = "held-out" if side == "held_out" else "training"
        with self.progress.phase(f"reading {what} activations", packed.n_rows):
            found = capture_pair(self.model, packed, self.site, self.target, **options)
        activations = finite_rows(found)
        used = {int(doc) for doc in torch.unique(activations.doc_N)}
        known: dict[str, Any] = {
            "documents": tuple(name for i, name in enumerate(packed.doc_names) if i in used),
            "n_dropped": len(found) - len(activations),
        }
        if self.has_concepts:
            texts = {one.name: one.text for one in self.text.documents("pylib", side, "sample")}
            labels = [
                label_document(texts[one.name], one.offset_T2, one.name) if i in used else None
                for i, one in enumerate(tokenized)
            ]
            known["labels_NC"] = label_activations(activations, labels)
            known["labelled_N"] = has_labels(activations, labels)
        return activations, known


def _bytes_of(spec: str) -> int:
    """Of a corpus' files."""
    path = Path(text_of(spec))
    files = (p for p in (path, *path.rglob("*")) if p.is_file())
    return PYLIB_BYTES if spec == "pylib" else sum(p.stat().st_size for p in files)


def batch_size(data: DataConfig, model: Any, sites: Any, store_dtype: str) -> int:
    """Sequences per forward pass: as given, or as many as fit."""
    if data.batch_sequences != "auto":
        return data.batch_sequences
    if data.inputs in ("images", "audio"):
        return MEDIA_AT_ONCE
    return choose_batch(model, sites, data.context, getattr(torch, store_dtype))


def open_model(data: DataConfig, device: str) -> tuple[Any, Any]:
    """The model and tokenizer a recipe names, frozen, on `device`; no tokenizer where its corpus needs none."""
    reads = data.inputs in ("text", "chat")
    return load_model(model_place(data), data.model_dtype, device, data.revision, data.attention, with_tokenizer=reads)


def model_place(data: DataConfig) -> str | Path:
    """What `load_model` takes of the model that a recipe names."""
    return embedded_path(data.model) or data.model


def corpus_of(data: DataConfig, opened: tuple[Any, Any], seed: int, held_out: bool = True) -> CorpusText:
    """A recipe's text, or its ready token ids. Raises CosaeError for a model that reads no text."""
    model, tokenizer = opened
    if data.inputs == "ids":
        return IdCorpus(data, model, seed, held_out)
    if tokenizer is None:
        raise CosaeError(
            f"{type(model).__name__} reads no text: give --inputs images, audio or ids, and such a corpus."
        )
    return CorpusText(data, tokenizer, seed, held_out)
