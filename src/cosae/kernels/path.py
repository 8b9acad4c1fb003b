"""A sparse path: a device's finder of survivors and its sums over entries, put around one search and one set of
gradients. Each method's definition is its twin in `reference`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cosae.kernels import autograd
from cosae.kernels.autograd import apply
from cosae.kernels.peers import ALONE, Peers
from cosae.kernels.select import search, topk
from cosae.kernels.terms import Entries, ScoreTerms


@dataclass(frozen=True)
class SparsePath:
    NAME: str
    finder: search.Finder
    sums: autograd.Sums

    def select_batch_topk(
        self, terms: ScoreTerms, n_keep: int, hint: float | None = None, peers: Peers = ALONE
    ) -> tuple[Entries, float]:
        return search.select_batch_topk(terms, n_keep, hint, finder=self.finder, peers=peers)

    def select_topk(self, terms: ScoreTerms, k: int, absolute: bool = False) -> Entries:
        return topk.select_topk(terms, k, absolute, finder=self.finder)

    def select_above(self, terms: ScoreTerms, threshold: Tensor) -> Entries:
        return search.select_above(terms, threshold, finder=self.finder)

    def entry_content(self, terms: ScoreTerms, entries: Entries) -> Tensor:
        inputs = (terms.z_BD, terms.rows_FD, terms.exponent, terms.log_gain)
        return apply(autograd.Content, *inputs, terms, entries, self.sums)

    def entry_values(self, terms: ScoreTerms, entries: Entries, score_E: Tensor) -> Tensor:
        if terms.value_exponent is None:
            return score_E
        return apply(autograd.Values, score_E, terms.z_BD, terms.value_exponent, terms, entries, self.sums)

    def at_feature(self, parameter_F: Tensor, entries: Entries) -> Tensor:
        return apply(autograd.AtFeature, parameter_F, entries, self.sums)

    def decode(self, value_E: Tensor, entries: Entries, decoder_FD: Tensor, n_tokens: int) -> Tensor:
        return apply(autograd.Decode, value_E, decoder_FD, entries, n_tokens, self.sums)

    def squared_errors(self, z_BD: Tensor, recon_BD: Tensor, centre_only: bool = False) -> Tensor:
        return apply(autograd.SquaredErrors, z_BD, recon_BD, centre_only, self.sums)
