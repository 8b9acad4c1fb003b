"""A recipe's data, opened once: what training, planning, evaluation and audit ask it.

Training, calibration and the choice of probing latents see the train split; every reported number is measured on the
held-out split, which is disjoint from it by construction (by file name, document text or block of rows).
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Sequence as TextSequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from cosae.activations import perturbation as perturbations
from cosae.activations.perturbation import Perturbation
from cosae.activations.sample import Sample, SinkRule
from cosae.activations.stream import Source, width_out
from cosae.errors import CosaeError
from cosae.io.progress import SILENT, Progress
from cosae.recipe import DataConfig, Recipe
from cosae.run.plan.resources import Item
from cosae.text.concepts.table import CONCEPTS, Concept
from cosae.types import Activations, Sequences, Site

Split = Literal["train", "held_out", "calibration"]
"""`calibration` is a part of the held-out side that no number is measured on: other tokens of the same documents, so
that thresholds meet the same kinds of text that they are measured on."""
Side = Literal["train", "held_out"]

NO_READER = "labelled texts need a language model that reads them, which these data lack: drop evaluation.texts."
NO_MODEL = "this measurement runs the model itself: give --model and --site, not --activations or --store."


@dataclass(frozen=True)
class DataUse:
    """What a dataset is opened for: everything that decides its samples and is not in its DataConfig.

    train_tokens        tokens that training will read; 0 where nothing is trained
    held_out_tokens, calibration_tokens   the two disjoint draws of the held-out side
    perturbations       what is put on the samples of each split, nothing where there is no entry
    keep_tokens         captured training tokens to keep in memory for another run on the same data
    """

    seed: int = 0
    device: str = "cpu"
    store_dtype: str = "float32"
    train_tokens: int = 0
    held_out_tokens: int = 131_072
    calibration_tokens: int = 1
    perturbations: Mapping[str, Perturbation] = field(default_factory=dict)
    keep_tokens: int = 0

    @classmethod
    def of(cls, recipe: Recipe, keep_tokens: int = 0) -> DataUse:
        """What a run of the recipe needs of its data."""
        training, evaluation = recipe.training, recipe.evaluation
        to_come = training.parts[0][1] * training.batch_tokens  # an extended run goes on with the text it has
        return cls(
            seed=training.seed,
            device=recipe.device,
            store_dtype=training.store_dtype,
            train_tokens=to_come + training.buffer_tokens + recipe.filter.window_tokens,
            held_out_tokens=evaluation.held_out_tokens,
            calibration_tokens=evaluation.calibration_tokens,
            perturbations={s: recipe.sample_perturbation(s) for s in ("train", "held_out", "calibration")},
            keep_tokens=keep_tokens,
        )


@dataclass(frozen=True)
class Sizes:
    """What a plan needs to know of the data: width, bytes that stay, rows of a chunk, bytes of making one; width of the
    targets, None where there are none."""

    d_in: int
    resident: tuple[Item, ...]
    chunk_rows: int
    chunk_work: int = 0
    d_out: int | None = None
    site_widths: tuple[int, ...] = ()


class Dataset(ABC):
    """Activations of one origin. Opening it reads configurations and headers only; the rest comes when it is asked for.

    A context manager: `close` ends what works in the background.

    config, use     what it is, and what for
    source          the endless training source
    has_concepts    whether rows carry the labels of `concepts`
    site            where a model is read, None elsewhere; model_name likewise
    target          the site of transcoders' targets, None where there are none
    progress        told what is loaded and read
    """

    has_concepts: bool = False
    site: Site | None = None
    target: Site | None = None
    model_name: str | None = None
    source: Source
    progress: Progress = SILENT

    def __init__(self, config: DataConfig, use: DataUse) -> None:
        self.config, self.use = config, use

    @property
    def concepts(self) -> Sequence[Concept]:
        """What the labels of rows are of."""
        return CONCEPTS

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.source.d_in

    @property
    def d_out(self) -> int | None:
        """Width of the targets; None where there are none."""
        return width_out(self.source)

    @property
    def site_widths(self) -> tuple[int, ...]:
        """Widths of the sites that the activations join; none where there is one."""
        widths: tuple[int, ...] = getattr(self.source, "site_widths", ())
        return widths

    @property
    def warnings(self) -> list[str]:
        """What a person should be told of what was read so far."""
        return []

    @abstractmethod
    def sizes(self) -> Sizes:
        """What it takes, from configurations and headers. Raises CosaeError where they cannot be read."""

    @abstractmethod
    def sample(self, split: Split, n_tokens: int, rule: SinkRule | None = None) -> Sample:
        """About n_tokens of the train split, or the draw of the held-out side that the dataset was opened for.

        rule: what makes a token a sink; by default ten times the sample's own median norm.
        """

    def describe(self) -> dict[str, Any]:
        """Plain values for a record."""
        return self.source.describe()

    def resolved(self) -> DataConfig:
        """The configuration with what was measured in the place of "auto"."""
        return self.config

    def again(self, use: DataUse) -> Dataset:
        """The same data for another use that differs in perturbations only: nothing is read twice."""
        if replace(use, perturbations=self.use.perturbations, keep_tokens=self.use.keep_tokens) != self.use:
            raise CosaeError("two runs share captured activations only where their seeds and sizes are the same.")
        twin = copy.copy(self)
        twin.use = use
        return twin

    def sequences(self, side: Side, n_tokens: int) -> Sequences:
        """Token sequences of one side, those that `sample` captures. Raises CosaeError where no model is run."""
        raise CosaeError(NO_MODEL)

    def read_texts(self, texts: TextSequence[str], context: int) -> Iterator[tuple[list[int], Activations]]:
        """Some texts at a time: their numbers, those with a token, and the activations of their first `context` tokens;
        doc_N counts such texts from the first. Raises CosaeError where no model is run.
        """
        raise CosaeError(NO_MODEL)

    def check_reads_texts(self) -> None:
        """Raises CosaeError where `read_texts` would, before anything is loaded."""
        raise CosaeError(NO_READER)

    @property
    def model(self) -> Any:
        """The language model, frozen. Raises CosaeError where none is run."""
        raise CosaeError(NO_MODEL)

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        raise CosaeError(NO_MODEL)

    def spell(self, token: int) -> str | None:
        """The text of a token id, where there is a tokenizer."""
        return None

    def around(self, doc: int, index: int, before: int, after: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of the tokens before and after a token of the held-out sample; nothing where they are not at hand."""
        return (), ()

    def close(self) -> None:  # noqa: B027  most datasets have nothing to end
        """End whatever still works in the background; a later request starts it again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _perturbed(self, activations: Activations, split: Split, chunk: int = 0) -> Activations:
        perturbation = self.use.perturbations.get(split, Perturbation())
        return perturbations.apply(activations, perturbation, chunk, side_of(split))


def side_of(split: Split) -> Side:
    """The side of the data that a split is drawn from."""
    return "train" if split == "train" else "held_out"


def split_held_out(n_tokens: int, split: Split, use: DataUse) -> Tensor:
    """Token numbers, ascending, of one of two disjoint draws from n_tokens held-out tokens: a seeded permutation.

    Where both do not fit they shrink in proportion; a single token serves both.
    """
    first, second = use.held_out_tokens, use.calibration_tokens
    if first + second > n_tokens:
        first = min(max(1, round(n_tokens * first / (first + second))), max(n_tokens - 1, 1))
        second = n_tokens - first
    order = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(0))
    chosen = order[:first] if split != "calibration" or second == 0 else order[first : first + second]
    return chosen.sort().values


def tokens_around(
    doc_N: Tensor, index_N: Tensor, token_N: Tensor, doc: int, index: int, before: int, after: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of the tokens before and after one of a document, as far as they are there without a gap."""
    near_N = (doc_N == doc) & (index_N >= index - before) & (index_N <= index + after)
    known = dict(zip(index_N[near_N].tolist(), token_N[near_N].tolist(), strict=True))

    def run(step: int, most: int) -> list[int]:
        places = range(index + step, index + step * (most + 1), step)
        return [known[place] for place in itertools.takewhile(known.__contains__, places)]

    return tuple(reversed(run(-1, before))), tuple(run(1, after))
