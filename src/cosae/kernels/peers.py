"""The other processes of a step, as its mathematics sees them. Here: none, and every sum is this process' own.

Several processes compute together what one computes: each has some tokens of the batch and some features of the
dictionary (`cosae.train.parallel.peers`). A result that is summed over processes is the same on all of them, and its
gradient goes to each one's own share: what a process computes from it, all the others compute too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace

from torch import Tensor, nn

from cosae.types import Framed


class Peers:
    """The process that has all tokens and all features.

    token_rank, token_ranks      which part of the batch is this process', and of how many; in their order
    feature_rank, feature_ranks  which part of the dictionary, and of how many of the same size
    """

    token_rank, token_ranks, feature_rank, feature_ranks = 0, 1, 0, 1

    @property
    def alone(self) -> bool:
        return self.token_ranks * self.feature_ranks == 1

    def rows(self, n_rows: int) -> slice:
        """The rows of a batch of so many that are this process'."""
        return slice(0, n_rows)

    def tokens(self, x: Tensor) -> Tensor:
        """Σ x over the processes that have other tokens."""
        return x

    def features(self, x: Tensor) -> Tensor:
        """Σ x over those that have other features of the same tokens."""
        return x

    def both(self, x: Tensor) -> Tensor:
        """Σ x over all of them."""
        return x

    def both_and_back(self, x: Tensor) -> Tensor:
        """Σ x over all of them for a result that each uses for its own share: its gradient is summed as well."""
        return x

    def counts(self, *numbers: int) -> tuple[int, ...]:
        """Σ of whole numbers over all of them."""
        return numbers

    def bins(self, count: Tensor) -> Tensor:
        """The same of a tensor of counts."""
        return count

    def beside(self, x_BK: Tensor) -> Tensor:
        """(B, n · K): the x of every process that has other features of these tokens, in the order of features."""
        return x_BK

    def whole(self, x: Tensor) -> Tensor:
        """(F,) of all features, where x is (F,) of this process' features; () stays."""
        return x

    def reduce_gradients(self, parameters: Mapping[str, nn.Parameter], split: Collection[str]) -> None:
        """Sum gradients over processes: `split` names parameters of its own features, which others do
        not have."""

    def squares(self, squares: Tensor, split: Sequence[bool]) -> Tensor:
        """(n,) squared norms of whole gradients from those of this process; `split` says which are of its features."""
        return squares

    def once(self, framed: Framed) -> Framed:
        """For what every feature rank computes alike from z: with a graph on one of them, without on the others."""
        if self.feature_rank == 0:
            return framed
        stats = framed.norm_stats
        cut = {f.name: value.detach() for f in fields(stats) if (value := getattr(stats, f.name)) is not None}
        return replace(framed, z_BD=framed.z_BD.detach(), norm_stats=replace(stats, **cut))


ALONE = Peers()
