"""The processes of one run, as the loop and the run's folder see them. Here: one.

`cosae.train.parallel.mesh` has those of torchrun. Every method but `mine` is called by all ranks, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from cosae.activations.stream import Source
from cosae.kernels import ALONE, Peers

T = TypeVar("T")


class Ranks:
    """The only process of a run.

    n, rank   how many there are, and which of them this is
    peers     those that share this one's arms
    """

    n, rank = 1, 0
    peers: Peers = ALONE

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes, prints and measures."""
        return self.rank == 0

    @property
    def writes(self) -> bool:
        """Whether this one writes its part of its arms; others have the same."""
        return self.peers.token_rank == 0

    def mine(self, arms: Sequence[T]) -> list[T]:
        """Those of the run's arms that this rank trains."""
        return list(arms)

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return flag

    def gather(self, value: T) -> list[T]:
        """The value of each rank, on all of them."""
        return [value]

    def first(self, call: Callable[[], T]) -> T | None:
        """Call on the leader alone, while the others wait; None on those. Raises on all what it raises."""
        return call()

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raises CosaeError where ranks differ in one of these."""

    def source(self, source: Source, prefetch_chunks: int) -> Source:
        """The source whose chunks all ranks get, each made by one of them."""
        return source

    def leave(self) -> None:
        """What ranks do together is over."""


ONE = Ranks()
