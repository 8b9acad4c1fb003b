"""Chunks of another source kept in memory for a second reading."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from cosae.activations.stream import Source, width_out
from cosae.types import Activations


class CachedSource:
    """Another source whose first `limit_tokens` tokens are kept, so that a second run need not compute them again."""

    def __init__(self, source: Source, limit_tokens: int) -> None:
        self._source = source
        self._limit = limit_tokens
        self._kept: list[Activations] = []
        self._n_kept = 0
        self.d_in, self.d_out = source.d_in, width_out(source)

    def document_name(self, doc: int) -> str | None:
        """The wrapped source's name of document `doc`, None where it knows none."""
        named: Callable[[int], str | None] | None = getattr(self._source, "document_name", None)
        return None if named is None else named(doc)

    def describe(self) -> dict[str, Any]:
        """The wrapped source's own record: keeping chunks changes nothing."""
        return self._source.describe()

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        """As the wrapped source's."""
        for number in itertools.count(start):
            if number >= len(self._kept):
                break
            yield self._kept[number]
        for number, chunk in enumerate(self._source.chunks(max(start, len(self._kept))), max(start, len(self._kept))):
            if number == len(self._kept) and self._n_kept + len(chunk) <= self._limit:
                self._kept.append(chunk)
                self._n_kept += len(chunk)
            yield chunk
