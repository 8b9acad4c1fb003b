"""A recipe's data, opened: an endless training source, and samples of either split for calibration and evaluation.

Training, calibration and the choice of probing latents see the train split; every reported number is measured on the
held-out split, which is disjoint from it by construction (by file name, document text or block of rows).
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from cosae.activations import perturbation as perturbations
from cosae.activations.arrays import ArraySource, TensorSource
from cosae.activations.cached import CachedSource
from cosae.activations.monitor import finite_rows
from cosae.activations.stream import Source
from cosae.activations.synthetic import SyntheticSource
from cosae.errors import CosaeError
from cosae.recipe import DataConfig, EvaluationConfig, Recipe
from cosae.run.dataset.corpus import CorpusText, Side, check_corpus
from cosae.text.mixture import parse_corpus
from cosae.text.tokenization import TokenizedDocument
from cosae.types import Activations, Codes, Sequences

Split = Literal["train", "held_out", "calibration"]
"""`calibration` is a part of the held-out side that no number is measured on: other tokens of the same documents, so
that thresholds meet the same kinds of text that they are judged on."""
POOL = 4
"""Train samples are drawn from documents of this many times the tokens wanted: more documents, less of each."""


@dataclass(frozen=True)
class Sample:
    """Activations of one split, perturbation on, no filter; and what is known about them.

    labels_NC  (N, C) bool numpy concept labels, None where the corpus has none
    truth      true codes of a synthetic world, None elsewhere
    documents  names of the documents
    n_dropped  tokens left out because they were not finite (data.non_finite=drop)
    """

    activations: Activations
    labels_NC: Any = None
    labelled_N: Any = None
    truth: Codes | None = None
    documents: tuple[str, ...] = ()
    n_dropped: int = 0


class Data(Protocol):
    """What a run needs of its data."""

    has_concepts: bool

    @property
    def source(self) -> Source: ...
    def sample(self, split: Split, n_tokens: int) -> Sample: ...


def open_data(recipe: Recipe, tensor: Tensor | None = None, keep_tokens: int = 0) -> Data:
    """Open what the recipe names, or `tensor` (N, D) instead. Raises CosaeError for whatever cannot be read.

    keep_tokens: captured training tokens to keep in memory for another run on the same data (`ModelData.again`).
    """
    data = recipe.data
    given = {"a store": data.store, "a file of activations": data.activations, "a synthetic world": data.world}
    named = [name for name, value in given.items() if value is not None]
    if tensor is not None:
        if named:
            raise CosaeError(f"a run on a tensor takes its activations from nowhere else: drop {named[0]}.")
        return ArrayData(recipe, tensor)
    if len(named) > 1:
        raise CosaeError(f"a run takes activations from {' or '.join(named)}, not from both: drop one.")
    if data.store is not None:
        from cosae.run.dataset.store import StoreData

        return StoreData(recipe)
    if data.world is not None:
        return WorldData(recipe)
    if data.activations is not None:
        return ArrayData(recipe)
    return ModelData(recipe, keep_tokens)


class WorldData:
    """A synthetic world: known features, a chosen norm perturbation."""

    has_concepts = False

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.data.world is not None
        self._recipe = recipe
        self.source = SyntheticSource(recipe.data.world)

    @property
    def feature_FD(self) -> Tensor:
        """(G, D) the true features."""
        return self.source.feature_FD

    def sample(self, split: Split, n_tokens: int) -> Sample:
        side = _side(split)
        activations, truth = self.source.sample(n_tokens, side, index=int(split == "calibration"))
        return Sample(perturbations.apply(activations, self._recipe.sample_perturbation(split), 0, side), truth=truth)


class ArrayData:
    """Vectors from a file or from memory."""

    has_concepts = False

    def __init__(self, recipe: Recipe, tensor: Tensor | None = None) -> None:
        data = recipe.data
        self._recipe = recipe
        seed, held_out_frac = recipe.training.seed, data.held_out_frac
        if not 0 < held_out_frac < 1:
            raise CosaeError(
                "held_out_frac must lie between 0 and 1, neither of them: thresholds are calibrated on rows kept out "
                f"of training. Got {held_out_frac} instead."
            )
        options: dict[str, Any] = {
            "seed": seed,
            "held_out_frac": held_out_frac,
            "allow_non_finite": data.non_finite == "drop",
        }
        self.source: ArraySource | TensorSource
        if tensor is not None:
            self.source = TensorSource(tensor, **options)
        else:
            assert data.activations is not None
            self.source = ArraySource(data.activations, data.activations_key, **options)

    def sample(self, split: Split, n_tokens: int) -> Sample:
        if split != "train":
            activations = self.source.held_out()
            activations = activations[split_held_out(len(activations), split, self._recipe.evaluation)]
        else:
            parts, have = [], 0
            for chunk in itertools.islice(self.source.chunks(), self.source.chunks_per_epoch):
                parts.append(chunk)
                have += len(chunk)
                if have >= n_tokens:
                    break
            activations = Activations.cat(parts)[:n_tokens]
        finite = finite_rows(activations)
        perturbation = self._recipe.sample_perturbation(split)
        return Sample(
            perturbations.apply(finite, perturbation, 0, _side(split)), n_dropped=len(activations) - len(finite)
        )


class ModelData:
    """A language model on a corpus."""

    def __init__(self, recipe: Recipe, keep_tokens: int = 0) -> None:
        from cosae.models.sites import resolve_site
        from cosae.models.sources import ModelSource, StreamedModelSource

        self._recipe = recipe
        self._samples: dict[tuple[str, int], Sample] = {}
        data = recipe.data
        self.has_concepts = [source.spec for source in parse_corpus(data.corpus)] == ["pylib"]
        check_corpus(data)
        self.model, self.tokenizer = open_model(data, recipe.device)
        self.site = resolve_site(self.model, data.site)
        self.text = CorpusText(data, self.tokenizer, recipe.training.seed)
        self.batch_sequences = batch_size(data, self.model, self.site, recipe.training.store_dtype)
        options: dict[str, Any] = {
            "batch_sequences": self.batch_sequences,
            "store_dtype": getattr(torch, recipe.training.store_dtype),
            "allow_non_finite": data.non_finite == "drop",
        }
        if self.text.streamed:
            self.source: Source = StreamedModelSource(self.model, self.text.text(), self.site, **options)
        else:
            training = recipe.training
            wanted = training.steps * training.batch_tokens + training.buffer_tokens + recipe.filter.window_tokens
            packed = self.text.pack(self.text.tokenized("train", wanted))
            self.source = ModelSource(
                self.model, packed, self.site, chunk_sequences=data.chunk_sequences, seed=training.seed, **options
            )
        if keep_tokens:
            self.source = CachedSource(self.source, keep_tokens)

    @property
    def recipe(self) -> Recipe:
        """The recipe these data were opened for."""
        return self._recipe

    def again(self, recipe: Recipe) -> ModelData:
        """The same data for another run that differs in arms or perturbation only: nothing is captured twice."""
        mine, theirs = (replace(r.training, checkpoint_every=0) for r in (self._recipe, recipe))
        if self._recipe.data != recipe.data or mine != theirs:
            raise CosaeError("two runs share captured activations only where data and training are the same.")
        twin = copy.copy(self)
        twin._recipe = recipe
        return twin

    def sample(self, split: Split, n_tokens: int) -> Sample:
        """The sample with the run's perturbation on it."""
        side, wanted = _side(split), self._recipe.evaluation
        if side == "held_out":
            n_tokens = wanted.held_out_tokens + wanted.calibration_tokens
        if (side, n_tokens) not in self._samples:
            self._samples[side, n_tokens] = self._capture(side, n_tokens)
        whole = self._samples[side, n_tokens]
        activations = perturbations.apply(whole.activations, self._recipe.sample_perturbation(split), 0, side)
        if side == "train":
            return replace(whole, activations=activations)
        rows = split_held_out(len(activations), split, wanted)
        labels_NC, labelled_N = whole.labels_NC, whole.labelled_N
        return Sample(
            activations[rows],
            None if labels_NC is None else labels_NC[rows.numpy()],
            None if labelled_N is None else labelled_N[rows.numpy()],
            documents=whole.documents,
            n_dropped=whole.n_dropped,
        )

    def sequences(self, side: Side, n_tokens: int) -> Sequences:
        """About n_tokens of one side as token sequences, drawn from many documents: those that `sample` captures."""
        return self._draw(side, n_tokens)[1]

    def _draw(self, side: Side, n_tokens: int) -> tuple[list[TokenizedDocument], Sequences]:
        """Tokenised documents, and about n_tokens of them in whole sequences."""
        if side == "train":
            tokenized = self.text.tokenized("train", POOL * n_tokens, salt="sample")
        else:
            tokenized = self.text.tokenized("held_out", n_tokens if self.text.streamed else None)
        everything = self.text.pack(tokenized)
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
        filled = everything.mask_ST.sum(1)[order].cumsum(0)
        return tokenized, everything[order[: int((filled < n_tokens).sum()) + 1].sort().values]

    def _capture(self, side: Side, n_tokens: int) -> Sample:
        """About n_tokens of one side: whole sequences drawn from many documents, with their labels."""
        from cosae.models.capture import capture

        tokenized, packed = self._draw(side, n_tokens)
        dtype = torch.float32 if self._recipe.device == "cpu" else getattr(torch, self._recipe.training.store_dtype)
        found = capture(
            self.model,
            packed,
            self.site,
            batch_sequences=self.batch_sequences,
            store_dtype=dtype,
            allow_non_finite=self._recipe.data.non_finite == "drop",
        )
        activations = finite_rows(found[self.site.name])
        n_dropped = len(found[self.site.name]) - len(activations)
        used = {int(doc) for doc in torch.unique(activations.doc_N)}
        names = tuple(name for i, name in enumerate(packed.doc_names) if i in used)
        if not self.has_concepts:
            return Sample(activations, documents=names, n_dropped=n_dropped)
        from cosae.text.concepts.labels import has_labels, label_activations, label_document

        texts = dict(self.text.documents("pylib", side, "sample"))
        labels = [
            label_document(texts[one.name], one.offset_T2, one.name) if i in used else None
            for i, one in enumerate(tokenized)
        ]
        return Sample(
            activations,
            labels_NC=label_activations(activations, labels),
            labelled_N=has_labels(activations, labels),
            documents=names,
            n_dropped=n_dropped,
        )


def split_held_out(n_tokens: int, split: Split, wanted: EvaluationConfig) -> Tensor:
    """Token numbers, ascending, of one of two disjoint draws from n_tokens held-out tokens: a seeded permutation.

    Where both do not fit they shrink in proportion; a single token serves both.
    """
    first, second = wanted.held_out_tokens, wanted.calibration_tokens
    if first + second > n_tokens:
        first = min(max(1, round(n_tokens * first / (first + second))), max(n_tokens - 1, 1))
        second = n_tokens - first
    order = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(0))
    chosen = order[:first] if split != "calibration" or second == 0 else order[first : first + second]
    return chosen.sort().values


def _side(split: Split) -> Side:
    return "train" if split == "train" else "held_out"


def batch_size(data: DataConfig, model: Any, sites: Any, store_dtype: str) -> int:
    """Sequences per forward pass: as given, or as many as fit."""
    if data.batch_sequences != "auto":
        return data.batch_sequences
    from cosae.models.batching import choose_batch

    return choose_batch(model, sites, data.context, getattr(torch, store_dtype))


def open_model(data: DataConfig, device: str) -> tuple[Any, Any]:
    """The model and tokenizer a recipe names, frozen, on `device`."""
    from cosae.models.load import load_model

    name: str | Path = data.model
    if data.model == "embedded":
        from cosae.models.embedded import model_path

        name = model_path()
    return load_model(name, data.model_dtype, device, data.revision, data.attention)
