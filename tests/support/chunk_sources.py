"""Tokens made up for feature stores, in chunks of any size, and SAEs that fire on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cosae.browse.collect.chunks import Chunk
from cosae.sae.calibrate import calibrate
from cosae.sae.model import SAE
from cosae.types import Activations

D, WORDS = 8, 50


class MadeUp:
    """Sequences of 5 to 24 tokens of random vectors with a few norms that are far larger, two sequences a document."""

    concepts = (("even", "even ids"), ("first", "ids below ten"), ("rare", "the id 49"))
    model, site, corpus, context = "made up", "resid_post.0", "numbers", 24

    def __init__(
        self, n_sequences: int = 120, chunk_sequences: int = 16, seed: int = 0, stop_after: int = 10**9
    ) -> None:
        rng = np.random.default_rng(seed)
        self.length_S = rng.integers(5, 25, n_sequences)
        self.total = n = int(self.length_S.sum())
        self.chunk_sequences, self.stop_after = chunk_sequences, stop_after
        self.start_S1 = np.concatenate([[0], np.cumsum(self.length_S)])
        self.id_N = rng.integers(0, WORDS, n)
        word_WD = rng.normal(size=(WORDS, D))
        x_ND = word_WD[self.id_N] + 0.5 * rng.normal(size=(n, D))
        x_ND *= rng.lognormal(0, 0.4, (n, 1))
        x_ND[self.start_S1[:-1]] *= 40
        self.x_ND = torch.from_numpy(x_ND).float()
        self.identity: dict[str, Any] = {"seed": seed, "sequences": n_sequences}
        self.labels_NC = np.stack([self.id_N % 2 == 0, self.id_N < 10, self.id_N == 49], 1)

    def activations(self, first: int = 0, end: int | None = None) -> Activations:
        """Tokens of some sequences."""
        end = len(self.length_S) if end is None else min(end, len(self.length_S))
        some = slice(int(self.start_S1[first]), int(self.start_S1[end]))
        x_ND, sequence = self.x_ND[some], np.repeat(np.arange(first, end), self.length_S[first:end])
        position = np.arange(some.start, some.stop) - self.start_S1[sequence]
        ints = [torch.from_numpy(np.ascontiguousarray(one)).int() for one in (self.id_N[some], sequence // 2, position)]
        return Activations(x_ND, x_ND.norm(dim=1), ints[0], ints[1], ints[2], ints[2], ints[0] == 48)

    def chunks(self, skip: int) -> Iterator[Chunk]:
        for number, first in enumerate(range(0, len(self.length_S), self.chunk_sequences)):
            if number == self.stop_after:
                raise KeyboardInterrupt
            if number < skip:
                continue
            found = self.activations(first, first + self.chunk_sequences)
            names = {int(doc): f"document {doc}" for doc in found.doc_N.unique().tolist()}
            start = int(self.start_S1[first])
            rows = slice(start, start + len(found))
            labelled = np.ones(len(found), dtype=bool)
            yield Chunk(found, start, first, names, self.labels_NC[rows], labelled)

    def spell(self, token: int) -> str | None:
        return f" w{token}"

    def logits(self, rows_FD: Any) -> Any:
        unembedding_VD = torch.eye(D).repeat(7, 1)[:WORDS]
        return lambda some: rows_FD[some].float().cpu() @ unembedding_VD.T


def made_up_sae(
    source: MadeUp, score: str = "cosine", selector: str = "batch_topk", d_sae: int = 40, seed: int = 0
) -> SAE:
    """An SAE calibrated on the source's tokens; the last feature never fires."""
    sae = SAE.build(D, d_sae, score, selector, k=4, seed=seed, sample=source.x_ND, a_init=0.6)
    if selector == "batch_topk":
        calibrate(sae, source.x_ND)
        threshold = sae.selector.threshold.detach().expand(d_sae).clone()
        threshold[-1] = 1e9
        sae.selector.threshold = threshold
    return sae
