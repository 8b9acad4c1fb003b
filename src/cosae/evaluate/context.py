"""What a measurement is asked on: SAEs by arm and the data they read, each token encoded once for each SAE."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from cosae.activations.sample import Sample, SinkRule
from cosae.evaluate.encoded import EncodedPass, encode_sample
from cosae.evaluate.norms.counterfactual import MedianPass, at_median
from cosae.evaluate.statistics import RESAMPLES
from cosae.io.progress import SILENT, Progress
from cosae.sae.model import SAE
from cosae.text.concepts.table import Concept
from cosae.text.labelled import LabelledTexts
from cosae.types import Activations, Sequences, Site

Side = Literal["train", "held_out"]
SIDES: tuple[Side, Side] = ("train", "held_out")
POOLED_CONTEXT = 128
"""Tokens of a labelled text that are read."""


class Data(Protocol):
    """What measurements ask of a dataset (cosae.run.dataset); all but the sample needs a model."""

    @property
    def has_concepts(self) -> bool: ...
    @property
    def concepts(self) -> Sequence[Concept]: ...
    @property
    def model(self) -> Any: ...
    @property
    def site(self) -> Site | None: ...
    @property
    def target(self) -> Site | None: ...
    @property
    def vocabulary(self) -> int: ...
    def sample(self, split: Side, n_tokens: int, rule: SinkRule | None = None) -> Sample: ...
    def sequences(self, side: Side, n_tokens: int) -> Sequences: ...
    def read_texts(self, texts: Sequence[str], context: int) -> Iterator[tuple[list[int], Activations]]: ...


@dataclass(frozen=True)
class TextProbes:
    """Labelled sets, and how they are read and probed.

    sets      none for the exact token-level concepts of the embedded corpus
    context   first tokens of a text that are read
    pooling   mean over tokens, or last
    max_texts texts of one question, train and test together
    max_classes  classes of a set that are asked about, those with most texts; all by default
    seeds     splits drawn
    read_time whether each SAE is also read without its codes' growth with the norm
    untrained whether an untrained SAE of the first arm's make stands beside them
    """

    sets: Sequence[LabelledTexts] = ()
    context: int = POOLED_CONTEXT
    pooling: str = "mean"
    max_texts: int = 2000
    max_classes: int | None = None
    seeds: int = 3
    read_time: bool = True
    untrained: bool = True


@dataclass
class Context:
    """SAEs of one site, calibrated, and what to ask them on.

    arms       the SAEs of each arm: several are of several seeds
    data       where samples come from, their perturbation on
    tokens     tokens of the held-out sample
    probe_tokens  tokens of the train sample; as many as are held out by default
    rule       what makes a token a sink; the held-out sample's median is then held against both samples
    features   those that causal ablates; the eight that fire most by default
    tops       latents of a probe; () is the measurement's own choice
    untrained  an untrained SAE, the floor of token probing
    baseline   the arm that the others are compared with; the first by default
    progress   told of what takes long
    """

    arms: Mapping[str, Sequence[SAE]]
    data: Data
    tokens: int
    probe_tokens: int | None = None
    rule: SinkRule = field(default_factory=SinkRule)
    seed: int = 0
    resamples: int = RESAMPLES
    min_positives: int | None = None
    features: Sequence[int] = ()
    tops: Sequence[int] = ()
    texts: TextProbes = field(default_factory=TextProbes)
    untrained: SAE | None = None
    baseline: str | None = None
    progress: Progress = SILENT
    _samples: dict[Side, Sample] = field(default_factory=dict, repr=False)
    _passes: dict[tuple[int, Side], EncodedPass[SAE]] = field(default_factory=dict, repr=False)
    _medians: dict[int, MedianPass] = field(default_factory=dict, repr=False)

    @property
    def firsts(self) -> dict[str, SAE]:
        """The first SAE of every arm."""
        return {name: listed[0] for name, listed in self.arms.items()}

    @property
    def first(self) -> str:
        """The arm that the others are compared with."""
        return self.baseline or next(iter(self.arms))

    @property
    def least_positives(self) -> int:
        """Tokens with and without a concept that make it worth probing."""
        return self.min_positives or min(200, max(10, self.tokens // 500))

    def sample(self, side: Side = "held_out") -> Sample:
        if side not in self._samples:
            if side == "held_out":
                self._samples[side] = self.data.sample(side, self.tokens, self.rule)
            else:
                self._samples[side] = self.data.sample(side, self.probe_tokens or self.tokens, self.sample().rule)
        return self._samples[side]

    @property
    def site(self) -> Site:
        """Where the model is read."""
        assert self.data.site is not None
        return self.data.site

    def put(self, sample: Sample, side: Side = "held_out") -> None:
        """Use a sample that is at hand already."""
        self._samples[side] = sample

    def encoded(self, sae: SAE, side: Side = "held_out") -> EncodedPass[SAE]:
        """The SAE's pass over a sample, made once."""
        if (id(sae), side) not in self._passes:
            sample = self.sample(side)
            with self.progress.phase(f"encoding {side.replace('_', '-')} tokens: {self._name(sae)}", len(sample)):
                self._passes[id(sae), side] = encode_sample(sae, sample, on_rows=self.progress.rows)
        return self._passes[id(sae), side]

    def at_median(self, sae: SAE) -> MedianPass:
        """The SAE's second pass over the held-out sample, every token at the median length; made once."""
        if id(sae) not in self._medians:
            encoded = self.encoded(sae)
            with self.progress.phase(f"encoding tokens at the median norm: {self._name(sae)}", len(encoded.sample)):
                self._medians[id(sae)] = at_median(encoded, on_rows=self.progress.rows)
        return self._medians[id(sae)]

    def _name(self, sae: SAE) -> str:
        return next((name for name, listed in self.arms.items() if any(one is sae for one in listed)), "untrained SAE")
