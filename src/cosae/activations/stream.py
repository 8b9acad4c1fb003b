"""Activations, shuffled and filtered, in batches: what every arm of a run is trained on.

A digest of everything handed out proves that two runs, or two arms, saw the same.

    source chunk → finite? → perturbation → norms as before? → filter → buffer → batch

The buffer is a ring of slots, allocated once. Its live rows are in one random order, and a batch is the next ones: a
uniform draw without replacement. The slots they leave are filled from the source batch by batch, so that every batch
costs the same; when half of the rows are handed out, the new ones join the rest and all are shuffled anew. So at least
half of the buffer is live at any time, and a row stays for a geometric number of rounds: long enough to meet rows from
far away in the source.

Stateless upstream, small state here: what is live in the buffer, one generator, and how far the source was read.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from cosae.activations import perturbation as perturbations
from cosae.activations.digest import chain
from cosae.activations.filter import Filter, FilterPolicy, describe_sinks, fit, norm_summary, total_variance
from cosae.activations.monitor import StreamMonitor
from cosae.activations.perturbation import Perturbation
from cosae.activations.prefetch import Prefetcher
from cosae.activations.store.format import choose_offset, restore_rows
from cosae.errors import CosaeError, check_least
from cosae.io.generators import keyed_generator
from cosae.io.legacy import upgrade
from cosae.io.progress import SILENT, Progress
from cosae.io.values import from_plain, to_plain
from cosae.types import Activations, NormSummary

SAMPLE_ROWS = 16384  # enough for a geometric median and for norm statistics, small enough to copy about
MAX_EMPTY_CHUNKS = 1000  # so many chunks in a row without one kept token: the filter is wrong, not the luck
STATE_VERSION = 1


@runtime_checkable
class Source(Protocol):
    """Anything that makes activations, endlessly and repeatably.

    `chunks(start)` begins with chunk number `start`; chunk i is the same whatever `start` was and never ends.
    """

    @property
    def d_in(self) -> int: ...

    def describe(self) -> dict[str, Any]:
        """Plain values that identify this source; written into records and checked on restoring."""

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        """Chunk `start`, `start + 1`, ..."""


@runtime_checkable
class Seekable(Protocol):
    """A source that finds a chunk again, in another process too, without making what comes before it."""

    def cursor(self, chunk: int) -> dict[str, Any] | None:
        """Plain values for `seek`, of a chunk that was made here; None where there are none."""

    def seek(self, chunk: int, cursor: dict[str, Any]) -> None:
        """Keep where a chunk is."""


class ActivationStream:
    """Shuffled, filtered batches from a source.

    source         where activations come from
    batch_tokens   rows of a batch
    buffer_tokens  rows of the shuffle buffer, at least two batches; its memory is allocated once
    seed           of the shuffle
    filter         which tokens take part; its median is fitted to the first window of the stream
    perturbation       norm perturbation put on before the filter looks
    device         where the buffer and the batches live
    store_dtype    float32 or bfloat16, of the buffer only: batches are always float32
    prefetch_chunks   chunks of the source made ahead in a thread of their own, while batches are used; 0 for none. The
                   batches are the same
    non_finite     fatal, or drop: leave out rows that are not finite, and count them
    progress       told how far the first window is, and the buffer's first filling

    Raises CosaeError for settings outside these, for activations of another width than the source promised,
    and under `fatal` for activations that are not finite, naming document and position (or chunk and row).
    A source may know `document_name(doc)` and `norm_reference()` (cosae.activations.monitor).

    After construction:
    filter      Filter       the fitted policy
    norm_summary  NormSummary    of the first window, before the filter
    sinks       dict           an event: which share of it are attention sinks, and what the filter does with them
    monitor     StreamMonitor  what was dropped, and events: rows that are not finite, norms that shifted
    sample_ND   (≤ 16384, D) fp32, evenly spaced kept rows of the first window, for initialisation
    target_sample_ND, target_variance   of a source with targets (it knows its width, `d_out`): those of the sample, and
                mean |y − mean y|² of the kept tokens of the window; None both elsewhere
    Looking at the window takes nothing from training: its tokens are handed out like all others.
    """

    filter: Filter
    norm_summary: NormSummary
    sinks: dict[str, Any]

    def __init__(
        self,
        source: Source,
        *,
        batch_tokens: int,
        buffer_tokens: int,
        seed: int,
        filter: FilterPolicy | None = None,
        perturbation: Perturbation | None = None,
        device: str | torch.device = "cpu",
        store_dtype: torch.dtype = torch.float32,
        prefetch_chunks: int = 0,
        non_finite: str = "fatal",
        progress: Progress = SILENT,
    ) -> None:
        check_least("batch_tokens", batch_tokens, 1)
        if buffer_tokens < 2 * batch_tokens:
            raise CosaeError(
                f"buffer_tokens must be at least two batches ({2 * batch_tokens}) for the shuffle to mix. "
                f"Got {buffer_tokens} instead."
            )
        if store_dtype not in (torch.float32, torch.bfloat16):
            raise CosaeError(f"store_dtype must be torch.float32 or torch.bfloat16. Got {store_dtype} instead.")
        check_least("prefetch_chunks", prefetch_chunks, 0)
        self.source, self.progress = source, progress
        self.prefetch_chunks = prefetch_chunks
        self.d_in, self.d_out = source.d_in, width_out(source)
        self.batch_tokens = batch_tokens
        self.buffer_tokens = buffer_tokens
        self.seed = seed
        self.perturbation = perturbation or Perturbation()
        self.device = torch.device(device)
        self.store_dtype = store_dtype
        self.monitor = StreamMonitor(
            non_finite, getattr(source, "document_name", None), getattr(source, "own_row", None)
        )
        self.n_batches = 0  # handed out so far
        self._digest = bytes(32)
        self._generator = keyed_generator(seed, "shuffle")
        self._chunks: Iterator[Activations] | None = None
        self._open(chunk=0, offset=0)
        try:
            policy = filter or FilterPolicy()
            with progress.phase("first window", policy.window_tokens):
                self._look(policy)
        except BaseException:
            self.close()
            raise
        # bfloat16 rounds relative to the value: rows far from zero are kept relative to a centre (store.format)
        samples = {"x_ND": self.sample_ND, "y_ND": self.target_sample_ND}
        self._centres = {name: self._centre_of(sample) for name, sample in samples.items() if sample is not None}
        self._buffer = _allocate(buffer_tokens, self.d_in, store_dtype, self.device, self.d_out)
        # slots in the order they will be handed out; those before the cursor are free, or filled for the next round
        self._order = torch.arange(buffer_tokens, device=self.device)
        self._cursor = buffer_tokens
        self._filled = 0
        self._round = (0, 0)  # where the source was read to when this round began

    @property
    def n_tokens(self) -> int:
        """Tokens handed out so far."""
        return self.n_batches * self.batch_tokens

    @property
    def sink_norm(self) -> float | None:
        """Norm from which on a token in a batch is a sink; None where the filter left none in the first window."""
        return self.filter.policy.factor * self.filter.median_norm if self.sinks["kept"] else None

    @property
    def digest(self) -> str:
        """64 hex digits over every batch handed out so far, in order: values in float32, and all ids."""
        return self._digest.hex()

    def describe(self) -> dict[str, Any]:
        """Everything that decides what this stream hands out; plain values, for records."""
        return {
            "source": self.source.describe(),
            "batch_tokens": self.batch_tokens,
            "buffer_tokens": self.buffer_tokens,
            "seed": self.seed,
            "filter": to_plain(self.filter.policy),
            "perturbation": to_plain(self.perturbation),
            "store_dtype": str(self.store_dtype).removeprefix("torch."),
        }

    def fill(self) -> None:
        """Read what the first batch waits for, which would read it otherwise: a phase of its own."""
        if self._needs_round:
            with self.progress.phase("filling buffer", self._cursor):
                self._fill(self._cursor)

    @property
    def _needs_round(self) -> bool:
        live = self.buffer_tokens - self._cursor
        return live <= self.buffer_tokens // 2 or live < self.batch_tokens

    def next_batch(self) -> Activations:
        """The next `batch_tokens` rows.

        x_ND is (B, D) float32 and contiguous; norm_N is the source's, from before any rounding to bfloat16.
        """
        if self._needs_round:
            self._begin_round()
        else:  # what the last batch left; twice that where a restored stream has to catch up
            self._fill(min(self._cursor, self._filled + 2 * self.batch_tokens))
        slots_B = self._order[self._cursor : self._cursor + self.batch_tokens]
        rows = _gather(self._buffer, slots_B)
        vectors = {name: restore_rows(rows.columns[name], None, c).float() for name, c in self._centres.items()}
        batch = replace(rows, **vectors)
        self._cursor += self.batch_tokens
        self.n_batches += 1
        self._digest = chain(self._digest, batch)
        return batch

    def state(self) -> dict[str, Any]:
        """All that is needed to go on to the bit: plain values and tensors (copies), in one flat dict.

        Only the live rows of the buffer are kept, in the order they would be handed out; those filled in for the next
        round are read again.
        """
        live = _gather(self._buffer, self._order[self._cursor :])
        chunk, offset = self._round
        cursor = self.source.cursor(chunk) if isinstance(self.source, Seekable) else None
        return {
            "version": STATE_VERSION,
            "stream": json.dumps(self.describe(), sort_keys=True, default=str),
            "filter": json.dumps(to_plain(self.filter)),
            "monitor": self._monitor_state,
            "chunk": chunk,
            "offset": offset,
            **({} if cursor is None else {"cursor": json.dumps(cursor)}),
            **{_CENTRES[name]: centre_D for name, centre_D in self._centres.items() if centre_D is not None},
            "n_batches": self.n_batches,
            "digest": self.digest,
            "generator": self._generator.get_state(),
            **{f"buffer.{name}": column for name, column in live.columns.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken: every later batch and digest equals the uninterrupted stream's.

        Raises CosaeError if the state belongs to another stream (source, filter, seed, sizes).
        """
        if state.get("version") != STATE_VERSION:
            raise CosaeError(
                f"the saved stream must be of version {STATE_VERSION}. Got {state.get('version')!r} instead; "
                "resume with the cosae that wrote it."
            )
        if differing := _differences(upgrade(json.loads(state["stream"])), self.describe()):
            raise CosaeError(
                f"the saved stream differs from this one in {', '.join(differing)}; resume with the recipe "
                "and the data it was started with."
            )
        # the fitted median comes from the state: on other hardware this window's may differ in its last bit
        self.filter = from_plain(Filter, json.loads(state["filter"]), "the saved filter")
        self._monitor_state = state["monitor"]
        self.monitor.restore(self._monitor_state)
        for name in self._centres:
            centre_D = state.get(_CENTRES[name])  # a state of cosae 0.1 has none, whatever its rows are
            self._centres[name] = None if centre_D is None else centre_D.to(self.device)
        live = len(state["buffer.x_ND"])
        for name, column in self._buffer.columns.items():
            column[:live].copy_(state[f"buffer.{name}"])
        # what counts is the order of hand-out, not which slot holds a row: live rows fill the first slots
        self._order = torch.arange(self.buffer_tokens, device=self.device).roll(self.buffer_tokens - live)
        self._cursor = self.buffer_tokens - live
        self._filled = 0
        self._generator.set_state(state["generator"].cpu())
        self.n_batches = int(state["n_batches"])
        self._digest = bytes.fromhex(state["digest"])
        chunk = int(state["chunk"])
        if isinstance(self.source, Seekable) and "cursor" in state:
            self.source.seek(chunk, json.loads(state["cursor"]))
        self._open(chunk, int(state["offset"]))
        self._round = (chunk, self._offset)

    def close(self) -> None:
        """Stop reading ahead. The stream may be used on: it then reads again what was read ahead."""
        self._open(self._chunk, self._offset)

    def _open(self, chunk: int, offset: int) -> None:
        """Read the source from kept row `offset` of chunk `chunk` on."""
        self._chunk, self._offset = chunk, offset
        self._waiting: deque[Activations] = deque()  # read and checked, not yet taken: the first window
        if isinstance(self._chunks, Prefetcher):
            self._chunks.close()
        self._chunks = self.source.chunks(start=chunk)
        if self.prefetch_chunks:
            self._chunks = Prefetcher(self._chunks, self.prefetch_chunks)
        self._next_index = chunk
        self._kept: Activations | None = None  # kept rows of chunk self._chunk

    def _look(self, policy: FilterPolicy) -> None:
        """Read the first window ahead; fit the filter, take the norm summary and the sample."""
        seen = 0
        while seen < policy.window_tokens:
            self._waiting.append(self._read())
            seen += len(self._waiting[-1])
            self.progress.reached(seen)
        reference = getattr(self.source, "norm_reference", None)
        self.monitor.begin(reference() if reference is not None and self.perturbation.kind == "none" else None)
        self._monitor_state = self.monitor.state()  # as of the beginning of the round, where a resumption reads on
        window = Activations.cat(list(self._waiting))[: policy.window_tokens]
        if policy.kind == "position_0" and int(window.position_N.max()) < 0:
            raise CosaeError(
                "the filter position_0 needs activations that know their positions, and these do not; "
                "use the filter norm or none."
            )
        self.filter = fit(policy, window.norm_N)
        self.norm_summary = norm_summary(window, self.filter)
        self.sinks = describe_sinks(window, self.filter)
        kept = self.filter.keep(window).nonzero().flatten()
        spaced = torch.linspace(0, len(kept) - 1, min(len(kept), SAMPLE_ROWS), dtype=torch.float64).long()
        rows = kept[spaced.to(kept.device)]
        self.sample_ND: Tensor = window.x_ND[rows].float().to(self.device)
        self.target_sample_ND = None if window.y_ND is None else window.y_ND[rows].float().to(self.device)
        self.target_variance = None if window.y_ND is None else total_variance(window.y_ND, self.filter.keep(window))

    def _centre_of(self, sample_ND: Tensor) -> Tensor | None:
        centre_D, _ = choose_offset(sample_ND, str(self.store_dtype).removeprefix("torch."))
        return None if centre_D is None else centre_D.to(self.device)

    def _read(self) -> Activations:
        """The next chunk of the source, checked, with the perturbation on it."""
        index = self._next_index
        assert self._chunks is not None
        chunk = next(self._chunks, None)
        if chunk is None:
            raise CosaeError(f"a source must be endless; this one stopped before chunk {index}.")
        if chunk.x_ND.shape[-1] != self.d_in:
            raise CosaeError(
                f"the source promised width {self.d_in}. Got {chunk.x_ND.shape[-1]} in chunk {index} instead."
            )
        if (came := None if chunk.y_ND is None else chunk.y_ND.shape[-1]) != self.d_out:
            raise CosaeError(f"the source promised targets of width {self.d_out}. Got {came} in chunk {index} instead.")
        chunk = perturbations.apply(self.monitor.check(chunk, index), self.perturbation, index)
        self._next_index += 1
        self.monitor.see(chunk.norm_N, index)
        return chunk

    def _begin_round(self) -> None:
        """Fill the slots that are still free, let all new rows join the live ones, and shuffle the whole buffer."""
        self._fill(self._cursor)
        self.monitor.refilled()
        self._monitor_state = self.monitor.state()
        shuffle = torch.randperm(self.buffer_tokens, generator=self._generator).to(self.device)
        self._order = self._order[shuffle]
        self._cursor = self._filled = 0
        self._round = (self._chunk, self._offset)

    def _fill(self, end: int) -> None:
        """Read rows from the source into the free slots before place `end` of the order."""
        while self._filled < end:
            rows = self._take(end - self._filled)
            slots = self._order[self._filled : self._filled + len(rows)]
            columns = rows.columns
            for name, column in self._buffer.columns.items():
                centre_D = self._centres.get(name)
                new = columns[name] if centre_D is None else columns[name].to(self.device, torch.float32) - centre_D
                column.index_copy_(0, slots, new.to(self.device, column.dtype))
            self._filled += len(rows)
            self.progress.reached(self._filled)

    def _take(self, at_most: int) -> Activations:
        """Up to `at_most` kept rows from the source, at least one, in its order."""
        empty_chunks = 0
        while True:
            if self._kept is None:
                chunk = self._waiting.popleft() if self._waiting else self._read()
                keep_N = self.filter.keep(chunk)
                self._kept = chunk if bool(keep_N.all()) else chunk[keep_N]
            rows = self._kept[self._offset : self._offset + at_most]
            if len(rows):
                self._offset += len(rows)
                return rows
            self._kept, self._chunk, self._offset = None, self._chunk + 1, 0
            empty_chunks += 1
            if empty_chunks > MAX_EMPTY_CHUNKS:
                raise CosaeError(
                    f"the filter {self.filter.policy.kind!r} kept nothing of {MAX_EMPTY_CHUNKS} chunks in a "
                    "row; choose another filter or check the activations."
                )


def width_out(source: Any) -> int | None:
    """Width of a source's targets; None where it has none."""
    width: int | None = getattr(source, "d_out", None)
    return width


_CENTRES = {"x_ND": "centre", "y_ND": "target_centre"}
"""Vectors of a batch → what a saved stream calls their centre."""


def _allocate(n: int, d_in: int, dtype: torch.dtype, device: torch.device, d_out: int | None) -> Activations:
    empty = Activations.bare(torch.zeros(n, d_in, dtype=dtype, device=device), torch.zeros(n, device=device))
    if d_out is not None:
        empty = replace(empty, y_ND=torch.zeros(n, d_out, dtype=dtype, device=device))
    # `bare` shares one tensor among the four id fields; a buffer needs each its own memory
    return Activations(**{name: column.clone() for name, column in empty.columns.items()})


def _gather(activations: Activations, rows: Tensor) -> Activations:
    """index_select costs a third of plain indexing."""
    return Activations(**{name: column.index_select(0, rows) for name, column in activations.columns.items()})


def _differences(saved: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    """Names of the settings that differ, one level deep."""
    mine = json.loads(json.dumps(mine, default=str))  # as `saved` was: JSON turns tuples into lists
    names = []
    for name in sorted(saved.keys() | mine.keys()):
        a, b = saved.get(name), mine.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names += [f"{name}.{key}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
        elif a != b:
            names.append(name)
    return names
