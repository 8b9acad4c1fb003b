"""What a feature store is built from: tokens in their sequences, some whole sequences at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cosae.types import Activations

Array = NDArray[Any]
SAMPLE_TOKENS = 65_536
"""First tokens of the pass whose codes are kept; labels of others are not asked for."""
BEFORE = 0.75
"""Of a window, what comes before its own token, where the sequence has so much."""


@dataclass(frozen=True)
class Chunk:
    """Whole sequences of one stretch of the pass, N tokens.

    activations  of every real token, in order; x_ND on the CPU
    first        tokens of the pass before it; first_sequence: sequences before it
    labels_NC    (N, C) bool, labelled_N (N,) bool; None where there are no labels, and beyond the sample
    documents    names by number, of those that begin in it
    """

    activations: Activations
    first: int
    first_sequence: int
    documents: dict[int, str]
    labels_NC: Array | None = None
    labelled_N: Array | None = None

    def __len__(self) -> int:
        return len(self.activations)

    @cached_property
    def start_S1(self) -> Array:
        """(S + 1,) int64: where each sequence begins, and the end. Tokens without a position are a sequence each."""
        position_N = self.activations.position_N.cpu().numpy().astype(np.int64)
        begins_N = np.ones(len(position_N), dtype=bool)
        begins_N[1:] = (position_N[1:] != position_N[:-1] + 1) | (position_N[1:] < 1)
        return np.append(np.flatnonzero(begins_N), len(position_N))

    @cached_property
    def sequence_N(self) -> Array:
        """(N,) int64: the sequence of each token, from 0."""
        return np.repeat(np.arange(len(self.start_S1) - 1), np.diff(self.start_S1))

    def windows(self, width: int) -> tuple[Array, Array]:
        """(N,) first token and (N,) length of the stretch of at most `width` tokens around each token."""
        first_N, end_N = self.start_S1[self.sequence_N], self.start_S1[self.sequence_N + 1]
        wanted_N = np.arange(len(self)) - int(width * BEFORE)
        start_N = np.maximum(np.minimum(wanted_N, end_N - width), first_N)
        return start_N, np.minimum(end_N - start_N, width)


class Source(Protocol):
    """Where the tokens come from.

    total      about how many tokens there will be, for the progress
    identity   plain values: what decides the tokens and their activations, so that a build is gone on with only where
               all of it is the same
    concepts   (name, description) of the labels; () where there are none
    model, site, corpus   names, None where not known; context: tokens of a sequence at most
    """

    total: int
    identity: dict[str, Any]
    concepts: tuple[tuple[str, str], ...]
    model: str | None
    site: str | None
    corpus: str | None
    context: int

    def chunks(self, skip: int) -> Iterator[Chunk]:
        """Chunks in order, the first `skip` left out (without running a model on them)."""

    def spell(self, token: int) -> str | None:
        """Text of a token id; None where there is no tokenizer."""

    def logits(self, rows_FD: Any) -> Any:
        """(F, D) decoder rows → a function of a slice of features that gives (f, V) logits; None where not known."""
