"""A model and text → endless chunks of activations at one site (`Source`s of cosae.activations.stream)."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from cosae.errors import CosaeError, check_least
from cosae.io.generators import epoch_order
from cosae.models.capture import capture, capture_pair, check_request, name_in
from cosae.models.sites import resolve_site
from cosae.types import Activations, Sequences, Site

CURSORS = 4096
"""Chunks whose place in the text is kept in mind: more than any shuffle buffer reaches back."""
NAMED_CHUNKS = 64
"""Chunks whose documents' names are remembered: more than are prefetched."""


class _SiteSource:
    """One site of a model, captured as `capture` does, and another beside it where there is a target, in the same
    passes. Raises CosaeError for what it would refuse of `first`."""

    def __init__(
        self,
        model: nn.Module,
        site: str | Site,
        first: Sequences,
        batch_sequences: int = 8,
        store_dtype: torch.dtype = torch.float32,
        target: str | Site | None = None,
        **options: Any,
    ) -> None:
        self.model, self.site = model, resolve_site(model, site)
        self.target = None if target is None else resolve_site(model, target)
        self._options = {**options, "batch_sequences": batch_sequences, "store_dtype": store_dtype}
        check_request(model, first, batch_sequences, store_dtype)
        one = first[first.rows_ST.any(dim=1)][:1]
        read = capture_pair(model, one, self.site, self.target)
        if self.site.joined:
            parts = capture(model, one, self.site.places).values()
            self.site_widths: tuple[int, ...] = tuple(int(part.x_ND.shape[1]) for part in parts)
        self.d_in = int(read.x_ND.shape[1])
        self.d_out = None if read.y_ND is None else int(read.y_ND.shape[1])

    def _capture(self, sequences: Sequences) -> Activations:
        return capture_pair(self.model, sequences, self.site, self.target, **self._options)

    def describe(self) -> dict[str, Any]:
        """Model and site in plain values for a record."""
        config = getattr(self.model, "config", None)
        parameter = next(self.model.parameters())
        quantized = getattr(self.model, "quantization", None)
        return {
            **({} if quantized is None else {"quantization": quantized}),
            "model": getattr(config, "_name_or_path", "") or type(self.model).__name__,
            "model_type": getattr(config, "model_type", type(self.model).__name__),
            "revision": getattr(config, "_commit_hash", None),
            "attn_implementation": getattr(config, "_attn_implementation", None),
            "model_dtype": str(parameter.dtype).removeprefix("torch."),
            "site": self.site.name,
            "hook_name": self.site.hook_name,
            "module_path": self.site.module_path,
            "block": self.site.block,
            "store_dtype": str(self._options["store_dtype"]).removeprefix("torch."),
            "batch_sequences": self._options["batch_sequences"],
            **({} if not self.site.joined else {"joined": self.site.to_record()["joined"]}),
            **({} if self.target is None else {"target": self.target.to_record()}),
        }


class ModelSource(_SiteSource):
    """Endless chunks of activations at one site, from a finite set of sequences.

    Chunk c of epoch e holds the sequences `epoch_order(S, seed, e)[c·chunk_sequences : (c + 1)·chunk_sequences]`, so
    every epoch sees each sequence once in an order of its own, and the last chunk of an epoch may be shorter. Any chunk
    can be made again to the bit, by this object or by another made with the same arguments on the same machine.

    model, sequences, site, batch_sequences, store_dtype, store_device, allow_non_finite   as in `capture`
    target           a second site, for a transcoder
    chunk_sequences  sequences per chunk
    seed             seed of the orders

    Raises `CosaeError` as `capture` does, on construction where it can be known then.
    """

    def __init__(
        self,
        model: nn.Module,
        sequences: Sequences,
        site: str | Site,
        *,
        chunk_sequences: int = 64,
        seed: int = 0,
        **options: Any,
    ) -> None:
        check_least("chunk_sequences", chunk_sequences, 1)
        super().__init__(model, site, sequences, **options)
        # A row of nothing but padding would make an empty chunk.
        self.sequences = sequences[sequences.rows_ST.any(dim=1)]
        self.sequences_sha256 = digest_sequences(self.sequences)
        self.chunk_sequences = chunk_sequences
        self.seed = seed

    @property
    def chunks_per_epoch(self) -> int:
        return math.ceil(len(self.sequences) / self.chunk_sequences)

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        """Chunk `start`, `start + 1`, ... without end; chunk numbers run on from epoch to epoch."""
        for number in itertools.count(start):
            epoch, chunk = divmod(number, self.chunks_per_epoch)
            order = epoch_order(len(self.sequences), self.seed, epoch)
            rows = order[chunk * self.chunk_sequences : (chunk + 1) * self.chunk_sequences]
            yield self._capture(self.sequences[rows])

    def document_name(self, doc: int) -> str | None:
        """The name of document `doc` of `doc_N`."""
        return name_in(self.sequences, doc)

    def describe(self) -> dict[str, Any]:
        """Where the activations come from, in plain values for a record."""
        return {
            **super().describe(),
            "source": "sequences",
            "context": int(self.sequences.mask_ST.shape[1]),
            "n_sequences": len(self.sequences),
            "n_tokens": self.sequences.n_rows,
            "sequences_sha256": self.sequences_sha256,
            "chunk_sequences": self.chunk_sequences,
            "seed": self.seed,
        }


class EndlessText(Protocol):
    """Chunks of sequences without end, each with the cursor (plain values) it is made again from: `mixture.Text`."""

    def chunks(self, cursor: dict[str, Any] | None = None) -> Iterator[tuple[Sequences, dict[str, Any]]]: ...
    def describe(self) -> dict[str, Any]: ...


class _Repeated:
    """A function that makes an iterator of `Sequences`, called again whenever it ends; a cursor is a chunk's number."""

    def __init__(self, make_chunks: Callable[[], Iterator[Sequences]]) -> None:
        self._make_chunks = make_chunks

    def chunks(self, cursor: dict[str, Any] | None = None) -> Iterator[tuple[Sequences, dict[str, Any]]]:
        start = 0 if cursor is None else int(cursor["chunk"])
        for number, sequences in enumerate(itertools.islice(self._endless(), start, None), start):
            yield sequences, {"chunk": number}

    def _endless(self) -> Iterator[Sequences]:
        for turn in itertools.count():
            empty = True
            for sequences in self._make_chunks():
                empty = False
                yield sequences
            if empty:
                later = "it gave sequences at first and none on a later epoch" if turn else "the corpus is empty"
                raise CosaeError(f"There are no tokens to capture: {later}.")

    def describe(self) -> dict[str, Any]:
        return {}


class StreamedModelSource(_SiteSource):
    """Endless chunks of activations at one site, from a corpus too large to hold, or a mixture.

    text  an `EndlessText`; or a function that makes an iterator of `Sequences`, the same ones each time: each is one
          chunk, and when they end, the next epoch calls it again

    A restart at a chunk that was made before, or whose cursor `seek` was given, begins right there; at any other it
    reads and drops what comes after the nearest cursor without running the model. Other arguments as in
    `ModelSource`. Raises `CosaeError` as `capture` does, and for a text that gives nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        text: EndlessText | Callable[[], Iterator[Sequences]],
        site: str | Site,
        **options: Any,
    ) -> None:
        self.text: EndlessText = _Repeated(text) if callable(text) else text
        first, cursor = next(self.text.chunks())
        super().__init__(model, site, first, **options)
        self._cursors: dict[int, dict[str, Any]] = {0: cursor}
        self._names: deque[tuple[int, tuple[str, ...]]] = deque(maxlen=NAMED_CHUNKS)  # first document, names
        self.context = int(first.mask_ST.shape[1])
        self.first_chunk_sha256 = digest_sequences(first)

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        """Chunk `start`, `start + 1`, ... without end."""
        return self.every(start, 1)

    def every(self, start: int, step: int) -> Iterator[Activations]:
        """Chunk `start`, `start + step`, ...: those between are read and not captured."""
        nearest = max(number for number in self._cursors if number <= start)
        for number, (sequences, cursor) in enumerate(self.text.chunks(self._cursors[nearest]), nearest):
            self.seek(number, cursor)
            self._names.append((sequences.first_doc, sequences.doc_names))
            if number >= start and (number - start) % step == 0:
                yield self._capture(sequences)

    def document_name(self, doc: int) -> str | None:
        """The name of document `doc` of a chunk made lately, else None."""
        held = ((doc - first, names) for first, names in list(self._names))
        return next((names[place] for place, names in held if 0 <= place < len(names)), None)

    def cursor(self, chunk: int) -> dict[str, Any] | None:
        """Plain values from which another process finds a chunk that was made here; None where it is forgotten."""
        return self._cursors.get(chunk)

    def seek(self, chunk: int, cursor: dict[str, Any]) -> None:
        """Keep a cursor, as `cursor(chunk)` gave it."""
        self._cursors[chunk] = cursor
        if len(self._cursors) > CURSORS:
            del self._cursors[min(number for number in self._cursors if number)]  # the first is always kept

    def describe(self) -> dict[str, Any]:
        """Where the activations come from, in plain values; only the first chunk's digest is known."""
        return {
            **super().describe(),
            **self.text.describe(),
            "source": "streamed sequences",
            "context": self.context,
            "first_chunk_sha256": self.first_chunk_sha256,
        }


def digest_sequences(sequences: Sequences) -> str:
    """SHA-256 of shape, ids, documents, indices, masks, document names and what is read instead of ids."""
    first_doc = (sequences.first_doc,) if sequences.first_doc else ()
    digest = hashlib.sha256(repr((tuple(sequences.ids_ST.shape), sequences.doc_names, *first_doc)).encode())
    dtypes = {"ids_ST": torch.int64, "doc_ST": torch.int32, "index_ST": torch.int32}
    for name, dtype in {**dtypes, "mask_ST": torch.bool, "special_ST": torch.bool}.items():
        digest.update(getattr(sequences, name).to("cpu", dtype).contiguous().numpy().tobytes())
    if sequences.keep_ST is not None or sequences.pooled:
        digest.update(f"{sequences.pooled} ".encode() + sequences.rows_ST.contiguous().numpy().tobytes())
    for name, value in sorted((sequences.inputs or {}).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
