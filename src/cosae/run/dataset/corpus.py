"""A recipe's corpus, one source or several weighted ones: tokenised, packed, endless.

Small sources are held and read in a seeded order of documents, and so are data sets that lie on disk, a row at a time;
large files and what comes from the hub are streamed in their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cosae.activations.positions import choose_positions
from cosae.errors import CosaeError
from cosae.io.fetched.packages import text_of
from cosae.io.legacy import V01_ORDER
from cosae.media.files import read_media
from cosae.models.sources import EndlessText
from cosae.recipe import DataConfig
from cosae.run.dataset.base import Side
from cosae.text.chat import render
from cosae.text.documents import pylib_sides, read_documents
from cosae.text.encoders import Around, around_of, surrounded
from cosae.text.files import ROW_SUFFIXES, Reading, Tally
from cosae.text.ids import read_ids
from cosae.text.mixture import Cursor, Text, mix, parse_corpus
from cosae.text.packing import iterate_sequences, sequences
from cosae.text.pylib import Document
from cosae.text.rows import is_saved_dataset
from cosae.text.tokenization import HEAD_CHARS, WHOLE_CHARS, TokenizedDocument, tokenize_documents
from cosae.text.workers import Workers
from cosae.types import Sequences

STREAM_ABOVE_BYTES = 256 * 2**20
"""Files and folders larger than this are streamed instead of held."""


@dataclass(frozen=True)
class _Chosen:
    """An endless text of which some places become rows."""

    text: Text
    positions: str

    def chunks(self, cursor: dict[str, Any] | None = None) -> Iterator[tuple[Sequences, dict[str, Any]]]:
        return ((choose_positions(chunk, self.positions), at) for chunk, at in self.text.chunks(cursor))

    def describe(self) -> dict[str, Any]:
        return {**self.text.describe(), "positions": self.positions}


class CorpusText:
    """What a recipe's corpus gives, through a tokenizer.

    seed     of the order of documents, and of a mixture
    held_out whether there must be documents for the held-out side; where there need be none, a source that has no
             others trains on them
    streamed whether training reads it as it comes (`text`), not as a list of documents
    add_bos  whether documents start with BOS
    warnings  what a person should be told of what was read so far

    Raises CosaeError where a source names nothing or leaves no document for the held-out side.
    """

    def __init__(self, data: DataConfig, tokenizer: Any, seed: int, held_out: bool = True) -> None:
        self._data, self._tokenizer, self._seed = data, tokenizer, seed
        self.sources = parse_corpus(data.corpus)
        self.streamed = len(self.sources) > 1 or streamed(self.sources[0].spec)
        self._sides = pylib_sides(data.max_chars) if "pylib" in self.specs and len(self.sources) > 1 else None
        self._workers = Workers(tokenizer, data.n_workers) if data.n_workers else None
        self._around = around_texts(data, tokenizer)
        self.add_bos = adds_bos(data, tokenizer)
        self._tallies = {spec: Tally() for spec in self.specs}
        self._undivided: set[str] = set()
        if held_out:
            for spec in self.specs:
                self._check_held_out(spec)
        else:
            self._undivided.update(spec for spec in self.specs if self._is_all_held_out(spec))

    @property
    def specs(self) -> tuple[str, ...]:
        return tuple(source.spec for source in self.sources)

    @property
    def warnings(self) -> list[str]:
        what = "is read in its own order, so that a batch holds one kind of text if it is sorted: shuffle it first"
        in_order = [f"{spec} {what}" for spec in self.specs if streamed(spec) and in_file_order(spec)]
        return [*in_order, *(f"{spec}: passed over {t.warning}" for spec, t in self._tallies.items() if t.warning)]

    def close(self) -> None:
        """End the tokenising processes; a later request starts others."""
        if self._workers is not None:
            self._workers.close()

    def tokenized(
        self, split: Side, max_tokens: int | None, salt: str = "train", drawn: int | None = None
    ) -> list[TokenizedDocument]:
        """Documents of one side with at most max_tokens in all, each once, the last cut to fit; long ones in parts.

        drawn: how many of the tokens will be used: of a document far longer than that, no more than it could give.
        """
        found: list[TokenizedDocument] = []
        left = max_tokens
        for one in self.each(split, salt, drawn):
            found.append(one.cut(0, left))
            if left is not None:
                left -= len(found[-1].ids_T)
                if left == 0:
                    break
        return found

    def each(self, split: Side, salt: str = "train", drawn: int | None = None) -> Iterator[TokenizedDocument]:
        """Documents of one side, each once, lazily; long ones in parts."""
        opened = [partial(self._open, i, split, salt, drawn=drawn) for i in range(len(self.sources))]
        start, weights = [Cursor()] * len(opened), [source.weight for source in self.sources]
        return (document for _, document in mix(opened, weights, start, self._seed, endless=False))

    def pack_each(self, tokenized: Iterable[TokenizedDocument]) -> Iterator[Sequences]:
        """As `pack`, lazily: `chunk_sequences` rows at a time."""
        data = self._data
        options: dict[str, Any] = {"rows_per_chunk": data.chunk_sequences, **self._special}
        packed = iterate_sequences(tokenized, data.context, data.packing, **options)  # type: ignore[arg-type]
        return (choose_positions(chunk, data.positions) for chunk in packed)

    def pack(self, tokenized: Sequence[TokenizedDocument]) -> Sequences:
        """Rows of `context` tokens."""
        data = self._data
        packed = sequences(tokenized, data.context, data.packing, **self._special)  # type: ignore[arg-type]
        return choose_positions(packed, data.positions)

    def text(self) -> EndlessText:
        """The training side without end, as large corpora and mixtures are read."""
        data = self._data
        text = Text(
            sources=tuple(partial(self._open, i, "train", "train") for i in range(len(self.sources))),
            weights=tuple(source.weight for source in self.sources),
            context=data.context,
            packing=data.packing,  # type: ignore[arg-type]
            rows_per_chunk=data.chunk_sequences,
            seed=self._seed,
            about={"corpus": [list(source) for source in self.sources]},
            **self._special,
        )
        return text if data.positions == "all" else _Chosen(text, data.positions)

    def documents(self, spec: str, split: Side, salt: str, turn: int = 0) -> Iterator[Document]:
        """Documents of one source that are long enough, in the order they are read in."""
        key = [self._seed, *salt.encode(), *([turn] if turn else [])]
        self._tallies[spec] = tally = Tally()
        side = "all" if spec in self._undivided else split
        return long_enough(self._data, spec, side, key, sides=self._sides, tally=tally)

    def _open(
        self, number: int, split: Side, salt: str, turn: int, skip: int, drawn: int | None = None
    ) -> Iterator[TokenizedDocument]:
        spec = self.specs[number]
        documents: Iterator[Any] = itertools.islice(self.documents(spec, split, salt, turn), skip, None)
        if len(self.sources) > 1:
            documents = (one._replace(name=f"{spec}:{one.name}") for one in documents)
        data = self._data
        if data.inputs == "chat":
            documents = (render(one, self._tokenizer) for one in documents)
        options: dict[str, Any] = {"workers": self._workers, "keep_empty": True}
        in_parts = self.specs != ("pylib",)  # whose labels are of whole files
        if data.packing == "document" and data.order != V01_ORDER:
            options["head"] = data.context
        elif in_parts and drawn is not None and data.order != V01_ORDER:
            options["max_chars"] = max(WHOLE_CHARS, HEAD_CHARS * drawn)
        read = tokenize_documents(documents, self._tokenizer, add_bos=self.add_bos, in_parts=in_parts, **options)
        return read if self._around is None else surrounded(read, self._around, data.context)

    @property
    def _special(self) -> dict[str, Any]:
        return {"pad_id": pad_id(self._tokenizer), "special_ids": tuple(self._tokenizer.all_special_ids)}

    def _is_all_held_out(self, spec: str) -> bool:
        """Whether the few documents of a source all fall on the held-out side."""
        try:
            next(self.documents(spec, "train", "train"), None)
        except CosaeError:
            tally = self._tallies[spec]
            if tally.chosen or tally.read == tally.blank:
                raise
            return True
        return False

    def _check_held_out(self, spec: str) -> None:
        frac = self._data.held_out_frac
        if frac == 0 or next(self.documents(spec, "held_out", "train"), None) is None:
            what = f"the corpus {spec} leaves no document for the held-out side (held_out_frac {frac})"
            raise CosaeError(f"{what}: give more documents or raise data.held_out_frac.")


def long_enough(
    data: DataConfig, spec: str, split: Side | Literal["all"], key: list[int], **options: Any
) -> Iterator[Document]:
    """Documents of one source that are long enough, in an order seeded by `key`; streamed ones in their own."""
    held, reading = not streamed(spec), reading_of(data)
    as_it_comes = held or (data.order == V01_ORDER and random_access(spec))
    options |= {"held_out_frac": data.held_out_frac, "order_key": None if as_it_comes else key}
    found = read_documents(spec, split, reading=reading, **options)
    if held:
        listed = list(found)
        # any stretch of a sorted folder is one corner of it; the seed decides which documents a short run sees
        found = iter([listed[i] for i in np.random.default_rng(key).permutation(len(listed))])
    return (document for document in found if len(document.text) >= data.min_chars)


def check_corpus(data: DataConfig) -> None:
    """Raises CosaeError for a local source that is not there, before a model is loaded for it."""
    for spec, _ in parse_corpus(data.corpus):
        if spec.startswith("hf:"):
            continue
        if data.inputs == "ids":
            read_ids(spec, data.field, data.context)
        elif data.inputs in ("images", "audio"):
            read_media(spec, data.inputs, data.field)
        else:
            read_documents(spec, "all", reading=reading_of(data))


def reading_of(data: DataConfig) -> Reading:
    """How a recipe reads text."""
    return Reading(data.field, data.suffixes, data.txt_unit, data.max_chars, data.inputs == "chat")


def streamed(spec: str) -> bool:
    """Whether a source is read as it comes instead of being held."""
    path = Path(text_of(spec))
    if spec.startswith("hf:") or is_saved_dataset(path):
        return True
    sizes = itertools.accumulate(p.stat().st_size for p in itertools.chain([path], path.rglob("*")) if p.is_file())
    return any(size > STREAM_ABOVE_BYTES for size in sizes)


def random_access(spec: str) -> bool:
    """Whether any row of a source can be read at once: a data set that lies on disk."""
    return is_saved_dataset(Path(spec.removeprefix("hf:").split(":")[0]))


def in_file_order(spec: str) -> bool:
    """Whether documents come in the order of a file or of the hub, not in one that a seed decides."""
    path = Path(text_of(spec))
    rows = not path.is_dir() or any(p.suffix.lower() in ROW_SUFFIXES for p in path.rglob("*"))
    return rows and not random_access(spec)


def adds_bos(data: DataConfig, tokenizer: Any) -> bool:
    """Whether documents start with BOS: as asked, else as the tokenizer does by itself (the embedded model's: yes)."""
    if data.inputs == "chat" or around_texts(data, tokenizer) is not None:
        return False  # the template, or what stands around a text, has one
    if data.add_bos is not None:
        return data.add_bos
    if data.model == "embedded":
        return True
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def around_texts(data: DataConfig, tokenizer: Any) -> Around | None:
    """What stands around each text of an encoder; None for other models, and where data.add_bos is False.

    Raises CosaeError where an encoder's rows would be packed.
    """
    around = around_of(tokenizer) if data.add_bos is not False and data.inputs == "text" else None
    if around is not None and data.packing != "document":
        raise CosaeError(
            f"the encoder {data.model} reads one text at a time, with special tokens around it. Got data.packing "
            f"{data.packing!r} instead: give --set data.packing=document."
        )
    return around


def pad_id(tokenizer: Any) -> int:
    """An id to fill masked places with; models never attend to them."""
    found = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos", "bos"))
    return int(next((value for value in found if value is not None), 0))
