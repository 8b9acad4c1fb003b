"""Tokens → activations at one or many sites of a frozen Hugging Face model.

In: a causal language model and `Sequences`. Out: `Activations` per site, one row per real token, padding
dropped, in the order of the sequences. Hooks sit on the asked modules for one forward pass of the model's
body (the head is never run), and the pass is cut short by a private exception as soon as the last site has
been read.

Captured residuals equal the model's own `output_hidden_states` to the bit, with one exception that is not
ours: its last entry has the final norm applied, `resid_post` of the last block has not. Documents packed into
one sequence attend to one another, as they do wherever sequences are packed without a block mask.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cosae.errors import CosaeError, check_least
from cosae.io.generators import epoch_order
from cosae.models.hooks import body_of, positions, read_sites
from cosae.models.load import load_model
from cosae.models.sites import resolve_site
from cosae.types import Activations, Sequences, Site

__all__ = [
    "ModelSource",
    "StreamedModelSource",
    "capture",
    "digest_sequences",
    "load_model",
    "resolve_site",
]

CURSORS = 4096
"""Chunks whose place in the text is kept in mind: more than any shuffle buffer reaches back."""
NAMED_CHUNKS = 64
"""Chunks whose documents' names are kept in mind: more than are read ahead."""
STORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def capture(
    model: nn.Module,
    sequences: Sequences,
    sites: str | Site | Sequence[str | Site],
    batch_sequences: int = 8,
    store_dtype: torch.dtype = torch.float32,
    store_device: str = "cpu",
    allow_non_finite: bool = False,
) -> dict[str, Activations]:
    """Activations of every real token of `sequences`, by site, all sites from the same forward passes.

    model            causal language model (or its body) in eval mode
    sequences        (S, T) token sequences; padding may be left, right or anywhere
    sites            names for `resolve_site`; the result's keys are the names as given, or a `Site`'s own
    batch_sequences  sequences per forward pass; it may change the last bits, as any batching does
    store_dtype      float32, bfloat16 or float16 for `x_ND`; `norm_N` is fp32, from before that rounding
    store_device     where the activations are kept
    allow_non_finite leave rows that are not finite to the caller (cosae.activations.monitor)

    `position_N` counts real tokens from 0, and is the position the model was told. The tensors are ordinary
    ones, usable in autograd even when the caller is under `torch.inference_mode`. Hooks are removed whatever
    happens.

    Raises `CosaeError` for an unknown site, a model in training mode, no tokens, a token id outside the
    model's vocabulary, sequences longer than the model's context, an unsupported `store_dtype`, activations
    that are not finite (naming site, sequence and position), and a site that the forward pass never reaches.
    """
    by_name = _named_sites(model, sites)
    _check_request(model, sequences, batch_sequences, store_dtype)
    # Whatever the caller's mode: inference tensors cannot be trained on afterwards.
    with torch.inference_mode(False):
        parts: dict[Site, list[Activations]] = {site: [] for site in by_name.values()}
        for start in range(0, len(sequences), batch_sequences):
            batch = sequences[start : start + batch_sequences]
            if not bool(batch.mask_ST.any()):
                continue
            found = read_sites(model, batch, list(parts), store_dtype, store_device)
            for site, (x_ND, norm_N) in found.items():
                part = _annotate(x_ND, norm_N, batch)
                if not allow_non_finite:
                    _check_finite(part, batch, site, store_dtype)
                parts[site].append(part)
        return {name: Activations.cat(parts[site]) for name, site in by_name.items()}


def _named_sites(model: nn.Module, sites: str | Site | Sequence[str | Site]) -> dict[str, Site]:
    asked = (sites,) if isinstance(sites, str | Site) else tuple(sites)
    if not asked:
        raise CosaeError("No site was given to capture; name at least one, such as 'resid_post.3'.")
    return {site.name if isinstance(site, Site) else site: resolve_site(model, site) for site in asked}


def _check_request(model: nn.Module, sequences: Sequences, batch_sequences: int, store_dtype: torch.dtype) -> None:
    if model.training:
        raise CosaeError("The model is in training mode, where dropout is on; call model.eval() first.")
    check_least("batch_sequences", batch_sequences, 1)
    if store_dtype not in STORE_DTYPES:
        raise CosaeError(f"store_dtype must be float32, bfloat16 or float16. Got {store_dtype} instead.")
    real = sequences.ids_ST[sequences.mask_ST]
    if real.numel() == 0:
        raise CosaeError("There are no tokens to capture: the corpus is empty.")
    embeddings = body_of(model).get_input_embeddings()
    n_vocabulary = int(embeddings.weight.shape[0])
    if int(real.min()) < 0 or int(real.max()) >= n_vocabulary:
        worst = int(real.min()) if int(real.min()) < 0 else int(real.max())
        raise CosaeError(
            f"Token id {worst} is outside the model's vocabulary of {n_vocabulary}; "
            "use the tokenizer that belongs to the model."
        )
    longest = int(sequences.mask_ST.sum(dim=1).max())
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if context is not None and longest > context:
        raise CosaeError(
            f"Sequences have up to {longest} tokens, but the model's context is {context}; cut them shorter."
        )


def _annotate(x_ND: Tensor, norm_N: Tensor, batch: Sequences) -> Activations:
    """The rows with where each came from."""
    mask_ST, device = batch.mask_ST, x_ND.device
    return Activations(
        x_ND=x_ND,
        norm_N=norm_N,
        token_N=batch.ids_ST[mask_ST].to(device, torch.int32),
        doc_N=batch.doc_ST[mask_ST].to(device, torch.int32),
        position_N=positions(mask_ST)[mask_ST].to(device, torch.int32),
        index_N=batch.index_ST[mask_ST].to(device, torch.int32),
        special_N=batch.special_ST[mask_ST].to(device),
    )


def _check_finite(part: Activations, batch: Sequences, site: Site, store_dtype: torch.dtype) -> None:
    bad_N = ~part.norm_N.isfinite()
    if store_dtype == torch.float16:  # its largest value is 65504, which attention sinks exceed
        bad_N |= ~part.x_ND.isfinite().all(dim=-1)
    if not bool(bad_N.any()):
        return
    row = int(bad_N.nonzero()[0, 0])
    doc = int(part.doc_N[row])
    name = _name_in(batch, doc)
    raise CosaeError(
        f"Activations at {site.name} are not finite, first in document {doc}{f' ({name})' if name else ''}, position "
        f"{int(part.position_N[row])}, stored as {str(store_dtype).removeprefix('torch.')} ({int(bad_N.sum())} such "
        "tokens in the batch); run and store the model in bfloat16 or float32, or leave such tokens out with "
        "data.non_finite=drop."
    )


def _name_in(sequences: Sequences, doc: int) -> str | None:
    """The document's name, None where the sequences hold none."""
    place = doc - sequences.first_doc
    return sequences.doc_names[place] if 0 <= place < len(sequences.doc_names) else None


class ModelSource:
    """Endless chunks of activations at one site, from a finite set of sequences.

    Chunk c of epoch e holds the sequences `epoch_order(S, seed, e)[c·chunk_sequences : (c +
    1)·chunk_sequences]`, so every epoch sees each sequence once in an order of its own, and the last chunk of
    an epoch may be shorter. Any chunk can be made again to the bit, by this object or by another made with
    the same arguments on the same machine.

    model, sequences, site, batch_sequences, store_dtype, store_device, allow_non_finite   as in `capture`
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
        batch_sequences: int = 8,
        seed: int = 0,
        store_dtype: torch.dtype = torch.float32,
        store_device: str = "cpu",
        allow_non_finite: bool = False,
    ) -> None:
        check_least("chunk_sequences", chunk_sequences, 1)
        self.model = model
        self.site = resolve_site(model, site)
        _check_request(model, sequences, batch_sequences, store_dtype)
        # A row of nothing but padding would make an empty chunk.
        self.sequences = sequences[sequences.mask_ST.any(dim=1)]
        self.sequences_sha256 = digest_sequences(self.sequences)
        self.chunk_sequences = chunk_sequences
        self.seed = seed
        self._options: dict[str, Any] = {
            "batch_sequences": batch_sequences,
            "store_dtype": store_dtype,
            "store_device": store_device,
            "allow_non_finite": allow_non_finite,
        }
        self.d_in = _width(model, self.sequences, self.site)

    @property
    def chunks_per_epoch(self) -> int:
        return math.ceil(len(self.sequences) / self.chunk_sequences)

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        """Chunk `start`, `start + 1`, ... without end; chunk numbers run on from epoch to epoch."""
        for number in itertools.count(start):
            epoch, chunk = divmod(number, self.chunks_per_epoch)
            order = epoch_order(len(self.sequences), self.seed, epoch)
            rows = order[chunk * self.chunk_sequences : (chunk + 1) * self.chunk_sequences]
            yield capture(self.model, self.sequences[rows], self.site, **self._options)[self.site.name]

    def document_name(self, doc: int) -> str | None:
        """The name of document `doc` of `doc_N`."""
        return _name_in(self.sequences, doc)

    def describe(self) -> dict[str, Any]:
        """Where the activations come from, in plain values for a record."""
        return {
            **_describe_model(self.model, self.site, self._options),
            "source": "sequences",
            "context": int(self.sequences.mask_ST.shape[1]),
            "n_sequences": len(self.sequences),
            "n_tokens": int(self.sequences.mask_ST.sum()),
            "sequences_sha256": self.sequences_sha256,
            "chunk_sequences": self.chunk_sequences,
            "seed": self.seed,
        }


class EndlessText(Protocol):
    """Chunks of sequences without end, each made again from its cursor (`mixture.Text`)."""

    def chunks(self, cursor: dict[str, Any] | None = None) -> Iterator[tuple[Sequences, dict[str, Any]]]:
        """Chunks from a cursor on (None: the beginning), each with its own cursor, of plain values."""
        ...

    def describe(self) -> dict[str, Any]:
        """What decides which sequences come."""
        ...


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
            if empty and turn:
                raise CosaeError("The corpus gave sequences at first and none on a later epoch.")
            if empty:
                raise CosaeError("There are no tokens to capture: the corpus is empty.")

    def describe(self) -> dict[str, Any]:
        return {}


class StreamedModelSource:
    """Endless chunks of activations at one site, from a corpus too large to hold, or a mixture.

    text  an `EndlessText`; or a function that makes an iterator of `Sequences`, the same ones each time: each is one
          chunk, and when they end, the next epoch calls it again

    A restart at a chunk that was made before, or whose cursor `seek` was told, begins right there; at any other it
    reads and drops what comes after the nearest cursor without running the model. Other arguments as in
    `ModelSource`. Raises `CosaeError` as `capture` does, and for a text that gives nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        text: EndlessText | Callable[[], Iterator[Sequences]],
        site: str | Site,
        *,
        batch_sequences: int = 8,
        store_dtype: torch.dtype = torch.float32,
        store_device: str = "cpu",
        allow_non_finite: bool = False,
    ) -> None:
        self.model = model
        self.text: EndlessText = _Repeated(text) if callable(text) else text
        self.site = resolve_site(model, site)
        self._options: dict[str, Any] = {
            "batch_sequences": batch_sequences,
            "store_dtype": store_dtype,
            "store_device": store_device,
            "allow_non_finite": allow_non_finite,
        }
        first, cursor = next(self.text.chunks())
        self._cursors: dict[int, dict[str, Any]] = {0: cursor}
        self._names: deque[tuple[int, tuple[str, ...]]] = deque(maxlen=NAMED_CHUNKS)  # first document, names
        _check_request(model, first, batch_sequences, store_dtype)
        self.context = int(first.mask_ST.shape[1])
        self.first_chunk_sha256 = digest_sequences(first)
        self.d_in = _width(model, first[first.mask_ST.any(dim=1)], self.site)

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        """Chunk `start`, `start + 1`, ... without end."""
        nearest = max(number for number in self._cursors if number <= start)
        for number, (sequences, cursor) in enumerate(self.text.chunks(self._cursors[nearest]), nearest):
            self._remember(number, cursor)
            self._names.append((sequences.first_doc, sequences.doc_names))
            if number >= start:
                yield capture(self.model, sequences, self.site, **self._options)[self.site.name]

    def document_name(self, doc: int) -> str | None:
        """The name of document `doc` of a chunk made lately, else None."""
        held = ((doc - first, names) for first, names in list(self._names))
        return next((names[place] for place, names in held if 0 <= place < len(names)), None)

    def cursor(self, chunk: int) -> dict[str, Any] | None:
        """Plain values from which another process finds a chunk that was made here; None where it is forgotten."""
        return self._cursors.get(chunk)

    def seek(self, chunk: int, cursor: dict[str, Any]) -> None:
        """Be told a cursor, as `cursor(chunk)` gave it."""
        self._remember(chunk, cursor)

    def _remember(self, chunk: int, cursor: dict[str, Any]) -> None:
        self._cursors[chunk] = cursor
        if len(self._cursors) > CURSORS:
            del self._cursors[min(number for number in self._cursors if number)]  # the first is always kept

    def describe(self) -> dict[str, Any]:
        """Where the activations come from, in plain values; only the first chunk's digest is known."""
        return {
            **_describe_model(self.model, self.site, self._options),
            **self.text.describe(),
            "source": "streamed sequences",
            "context": self.context,
            "first_chunk_sha256": self.first_chunk_sha256,
        }


def digest_sequences(sequences: Sequences) -> str:
    """SHA-256 of shape, ids, documents, indices, masks and document names."""
    head: tuple[Any, ...] = (tuple(sequences.ids_ST.shape), sequences.doc_names)
    if sequences.first_doc:
        head = (*head, sequences.first_doc)
    digest = hashlib.sha256(repr(head).encode())
    for values, dtype in (
        (sequences.ids_ST, torch.int64),
        (sequences.doc_ST, torch.int32),
        (sequences.index_ST, torch.int32),
        (sequences.mask_ST, torch.bool),
        (sequences.special_ST, torch.bool),
    ):
        digest.update(values.to("cpu", dtype).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _width(model: nn.Module, sequences: Sequences, site: Site) -> int:
    """D at a site, measured on one sequence."""
    return int(capture(model, sequences[:1], site)[site.name].x_ND.shape[1])


def _describe_model(model: nn.Module, site: Site, options: dict[str, Any]) -> dict[str, Any]:
    config = getattr(model, "config", None)
    parameter = next(model.parameters())
    return {
        "model": getattr(config, "_name_or_path", "") or type(model).__name__,
        "model_type": getattr(config, "model_type", type(model).__name__),
        "revision": getattr(config, "_commit_hash", None),
        "attn_implementation": getattr(config, "_attn_implementation", None),
        "model_dtype": str(parameter.dtype).removeprefix("torch."),
        "site": site.name,
        "hook_name": site.hook_name,
        "module_path": site.module_path,
        "block": site.block,
        "store_dtype": str(options["store_dtype"]).removeprefix("torch."),
        "batch_sequences": options["batch_sequences"],
    }
