"""A source read by all ranks together: each chunk is made by one of them and handed to all, in the source's order.

So every rank has the stream that one process would have, whatever the mesh, and shuffles, filters and hashes it alike;
reading and capture are shared. A chunk's B × D numbers are few beside the gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch

from cosae.activations.prefetch import Prefetcher
from cosae.activations.stream import Seekable, Source
from cosae.errors import CosaeError
from cosae.types import Activations


class SharedSource:
    """Another source, of which rank r of n makes the chunks r, r + n, r + 2 n, ….

    exchange  hands what each rank has to say of its chunk to all (`Ranks.gather`)
    spread    hands a tensor from one rank to all
    """

    def __init__(
        self,
        source: Source,
        rank: int,
        n: int,
        prefetch_chunks: int,
        exchange: Callable[[Any], list[Any]],
        spread: Callable[[torch.Tensor, int], None],
        device: torch.device,
    ) -> None:
        self._source, self.rank, self.n, self.prefetch_chunks = source, rank, n, prefetch_chunks
        self._exchange, self._spread, self._device = exchange, spread, device
        self.d_in = source.d_in

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def describe(self) -> dict[str, Any]:
        return self._source.describe()

    def cursor(self, chunk: int) -> dict[str, Any] | None:
        return self._source.cursor(chunk) if isinstance(self._source, Seekable) else None

    def seek(self, chunk: int, cursor: dict[str, Any]) -> None:
        if isinstance(self._source, Seekable):
            self._source.seek(chunk, cursor)

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        """Chunk `start`, `start + 1`, ...: rank r makes chunk start + r and every n-th after it."""
        own: Iterator[Activations] = self._own(start + self.rank)
        if self.prefetch_chunks:
            own = Prefetcher(own, self.prefetch_chunks)
        try:
            for first in itertools.count(start, self.n):
                yield from self._round(first, own)
        finally:
            if isinstance(own, Prefetcher):
                own.close()

    def _own(self, start: int) -> Iterator[Activations]:
        """This rank's chunks; only streamed text has to read the others' on its way to them."""
        every = getattr(self._source, "every", None)
        if every is not None:
            yield from every(start, self.n)
        else:
            for number in itertools.count(start, self.n):
                yield from itertools.islice(self._source.chunks(number), 1)

    def _round(self, first: int, own: Iterator[Activations]) -> Iterator[Activations]:
        """One chunk of each rank. Raises on all what one of them raised."""
        chunk: Activations | None = None
        fault: str | None = None
        try:
            chunk = next(own, None)
        except CosaeError as error:
            fault = str(error)
        layout: dict[str, Any] = {}
        if chunk is not None:
            names = [f.name for f in fields(chunk) if getattr(chunk, f.name) is not None]
            layout = {name: (getattr(chunk, name).dtype, tuple(getattr(chunk, name).shape)) for name in names}
        cursor = self.cursor(first + self.rank)
        said = self._exchange((layout, cursor, fault))
        for rank, (_, _, told) in enumerate(said):
            if told is not None:
                raise CosaeError(told if rank == self.rank else f"rank {rank} of {self.n}: {told}")
        for rank, (there, found, _) in enumerate(said):
            if not there:
                return
            columns = {}
            for name, (dtype, shape) in there.items():
                if chunk is not None and rank == self.rank:
                    columns[name] = getattr(chunk, name).to(self._device).contiguous()
                else:
                    columns[name] = torch.empty(shape, dtype=dtype, device=self._device)
                self._spread(columns[name], rank)
            if found is not None:
                self.seek(first + rank, found)
            yield Activations(**columns)
