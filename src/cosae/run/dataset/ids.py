"""A corpus of token ids that are ready: rows as they are, one sequence each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from cosae.errors import CosaeError
from cosae.models.intervene.splice import special_ids_of
from cosae.recipe import DataConfig
from cosae.run.dataset.base import Side
from cosae.run.dataset.corpus import CorpusText, in_file_order, streamed
from cosae.shown import counted
from cosae.text.ids import read_ids, side_of_ids
from cosae.text.mixture import parse_corpus
from cosae.text.tokenization import TokenizedDocument


class IdCorpus(CorpusText):
    """As `CorpusText`, of rows of token ids. Special are the model's own bos, eos and pad ids.

    Rows longer than the context are cut, which a warning says.
    """

    def __init__(self, data: DataConfig, model: Any, seed: int, held_out: bool = True) -> None:
        self._data, self._seed = replace(data, packing="document"), seed
        self._ids = special_ids_of(model)
        self._cut: dict[str, set[str]] = {}
        self.sources = parse_corpus(data.corpus)
        self.streamed = len(self.sources) > 1 or streamed(self.sources[0].spec)
        self.add_bos = False
        if held_out:
            for spec in self.specs:
                if data.held_out_frac == 0 or next(self._rows(spec, "held_out"), None) is None:
                    what = f"the corpus {spec} leaves no row for the held-out side (held_out_frac {data.held_out_frac})"
                    raise CosaeError(f"{what}: give more rows or raise data.held_out_frac.")

    @property
    def warnings(self) -> list[str]:
        what = "is read in its own order: shuffle it first if it is sorted"
        in_order = [f"{spec} {what}" for spec in self.specs if streamed(spec) and in_file_order(spec)]
        context = self._data.context
        cut = (f"{spec}: {counted(len(names), 'row')} longer than {context} cut" for spec, names in self._cut.items())
        return [*in_order, *cut]

    def close(self) -> None:
        pass

    def _rows(self, spec: str, split: Side) -> Iterator[TokenizedDocument]:
        data = self._data
        for row in read_ids(spec, data.field, data.context):
            if len(row.ids_T) and side_of_ids(row.ids_T, data.held_out_frac) == split:
                if len(row.ids_T) > data.context:
                    self._cut.setdefault(spec, set()).add(row.name)
                yield row.cut(0, data.context)

    def _open(
        self, number: int, split: Side, salt: str, turn: int, skip: int, drawn: int | None = None
    ) -> Iterator[TokenizedDocument]:
        spec = self.specs[number]
        rows = self._rows(spec, split)
        if not streamed(spec):
            listed = list(rows)
            key = [self._seed, *salt.encode(), *([turn] if turn else [])]
            rows = iter([listed[i] for i in np.random.default_rng(key).permutation(len(listed))])
        return itertools.islice(rows, skip, None)

    @property
    def _special(self) -> dict[str, Any]:
        return {"pad_id": 0, "special_ids": self._ids}
