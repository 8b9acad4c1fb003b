"""Several weighted corpora → one endless text, made again from any cursor.

    next source = the one with the least (tokens given so far) / weight;  ties fall to an order drawn from the seed

so that after any document each source has given its share of the tokens, to within one document. A source that runs
out starts over by itself while the others go on where they are: shares hold for ever, and no source's rest is skipped.
"""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cosae.errors import CosaeError
from cosae.text.packing import Packing, iterate_sequences
from cosae.text.tokenization import TokenizedDocument
from cosae.types import Sequences

_WEIGHTED = re.compile(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")

Open = Callable[[int, int], Iterator[TokenizedDocument]]
"""open(pass, skip): a source's tokenised documents of one pass over it, the first `skip` left out; passes may differ in
order. The same arguments give the same documents. A document may have no tokens."""


class Weighted(NamedTuple):
    """One source of a mixture: spec as for `read_documents`, weight > 0 of any scale."""

    spec: str
    weight: float


def parse_corpus(corpus: str | Sequence[str]) -> tuple[Weighted, ...]:
    """One corpus, or several: each SPEC or SPEC:WEIGHT, a weight of 1 where there is none.

    A spec that ends in a colon and a number, and exists as a path, is read as the path. Raises CosaeError for no
    source, a weight that is not above 0 and finite, and a source named twice.
    """
    entries = (corpus,) if isinstance(corpus, str) else tuple(corpus)
    if not entries or not all(entries):
        raise CosaeError("the corpus must name at least one source, such as 'pylib' or a folder. Got none instead.")
    found = tuple(_parse(entry) for entry in entries)
    specs = [os.path.normpath(s.spec) if Path(s.spec).exists() else s.spec for s in found]
    for spec in specs:
        if specs.count(spec) > 1:
            raise CosaeError(
                f"a corpus must name each source once. Got {spec!r} twice: give it the sum of the weights."
            )
    return found


def _parse(entry: str) -> Weighted:
    match = _WEIGHTED.fullmatch(entry)
    if match is None or Path(entry).exists():
        return Weighted(entry, 1.0)
    weight = float(match[2])
    if not (weight > 0 and math.isfinite(weight)):
        raise CosaeError(
            f"the weight of a source must be above 0 and finite. Got {match[2]!r} for {match[1]!r} instead."
        )
    return Weighted(match[1], weight)


@dataclass(frozen=True)
class Cursor:
    """Where one source stands: passes done, documents of this pass given, tokens given in all."""

    passes: int = 0
    documents: int = 0
    tokens: int = 0


def mix(
    sources: Sequence[Open], weights: Sequence[float], cursors: Sequence[Cursor], seed: int, endless: bool = True
) -> Iterator[tuple[tuple[Cursor, ...], TokenizedDocument]]:
    """Documents of all sources, each with where the sources stood before it; parts of one follow each other.

    Not endless: a source that runs out is left out, and the mixture ends with the last of them. Raises CosaeError
    for a source that gives nothing in a whole pass.
    """
    rank = np.random.default_rng([seed, len(sources)]).permutation(len(sources))
    at = list(cursors)
    opened: dict[int, Iterator[TokenizedDocument]] = {}
    empty_pass = [cursor.documents == 0 for cursor in cursors]  # no token yet in this pass
    live = set(range(len(sources)))
    before, in_parts = tuple(at), False
    while live:
        if not in_parts:
            i = min(live, key=lambda j: (at[j].tokens / weights[j], rank[j]))
        if i not in opened:
            opened[i] = sources[i](at[i].passes, at[i].documents)
        document = next(opened[i], None)
        if document is not None:
            if not in_parts:
                before = tuple(at)
                at[i] = replace(at[i], documents=at[i].documents + 1)
            at[i] = replace(at[i], tokens=at[i].tokens + len(document.ids_T))
            in_parts = document.more
            if len(document.ids_T):
                empty_pass[i] = False
                yield before, document
            continue
        del opened[i]
        if not endless:
            live.remove(i)
            continue
        if empty_pass[i]:
            raise CosaeError(
                "every source of the corpus must hold at least one token. Got none in a whole pass over number "
                f"{i + 1} of {len(sources)}: its documents are empty or too short for min_chars."
            )
        at[i], empty_pass[i] = Cursor(at[i].passes + 1, 0, at[i].tokens), True


@dataclass(frozen=True)
class Text:
    """Endless chunks of sequences from one or several sources.

    sources   tokenised documents of each, as `Open`
    weights   of each
    seed      breaks ties
    about     plain values that identify this text, for records
    Other fields as in `iterate_sequences`.
    """

    sources: tuple[Open, ...]
    weights: tuple[float, ...]
    context: int
    packing: Packing
    pad_id: int
    special_ids: tuple[int, ...]
    rows_per_chunk: int
    seed: int
    about: dict[str, Any]

    def chunks(self, cursor: dict[str, Any] | None = None) -> Iterator[tuple[Sequences, dict[str, Any]]]:
        """Chunks from a cursor (the beginning) on, each with the cursor from which it is made again.

        A cursor is a few plain numbers: nothing of what came before it is tokenised again.
        """
        cursor = cursor or {"sources": [[0, 0, 0]] * len(self.sources), "document": 0, "skip": 0}
        starts: deque[tuple[int, tuple[Cursor, ...]]] = deque()
        chunks = iterate_sequences(
            self._documents(cursor, starts),
            self.context,
            self.packing,
            pad_id=self.pad_id,
            special_ids=self.special_ids,
            rows_per_chunk=self.rows_per_chunk,
            first_doc=cursor["document"],
            first_index=cursor["skip"],
        )
        for chunk in chunks:
            document, skip = int(chunk.doc_ST[0, 0]), int(chunk.index_ST[0, 0])
            while starts[0][0] != document:
                starts.popleft()
            stood = [[c.passes, c.documents, c.tokens] for c in starts[0][1]]
            yield chunk, {"sources": stood, "document": document, "skip": skip}

    def _documents(
        self, cursor: dict[str, Any], starts: deque[tuple[int, tuple[Cursor, ...]]]
    ) -> Iterator[TokenizedDocument]:
        """Documents from the cursor on; `starts` gets where the sources stood before each."""
        number, skip, in_parts = cursor["document"], cursor["skip"], False
        cursors = [Cursor(*numbers) for numbers in cursor["sources"]]
        for before, one in mix(self.sources, self.weights, cursors, self.seed):
            ids_T, more = one.ids_T, one.more
            if not in_parts:
                starts.append((number, before))
                number += 1
            if skip < len(ids_T):
                yield one.cut(skip)
            skip, in_parts = max(0, skip - len(ids_T)), more

    def describe(self) -> dict[str, Any]:
        """What decides which sequences come, in plain values."""
        return {**self.about, "packing": self.packing, "rows_per_chunk": self.rows_per_chunk, "text_seed": self.seed}
