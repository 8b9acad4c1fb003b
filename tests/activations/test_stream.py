"""The stream: mixes like a full shuffle, loses nothing, resumes to the bit, and says what is wrong."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch

from cosae.activations.filter import FilterPolicy
from cosae.activations.perturbation import Perturbation, apply
from cosae.activations.stream import ActivationStream, Source
from cosae.errors import CosaeError
from cosae.types import Activations

D, CHUNK, DOC = 3, 96, 16


class Numbered:
    """Row r of the whole source holds r in index_N and x[0]; documents of 16 tokens, each its own
    sequence."""

    d_in = D

    def __init__(
        self,
        end: int | None = None,
        spoil: dict[int, float] | None = None,
        loud_every: int = 0,
        change: Callable[[Activations], Activations] = lambda chunk: chunk,
    ) -> None:
        self.end, self.spoil, self.loud_every, self.change = end, spoil or {}, loud_every, change

    def describe(self) -> dict[str, Any]:
        return {"kind": "numbered", "shape": (CHUNK, D), "loud_every": self.loud_every}

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        index = start
        while self.end is None or index < self.end:
            row_N = torch.arange(index * CHUNK, (index + 1) * CHUNK, dtype=torch.int32)
            x_ND = torch.stack([row_N.float(), torch.full((CHUNK,), 1e4), torch.ones(CHUNK)], 1)
            if self.loud_every:
                x_ND[row_N % self.loud_every == 0] *= 100
            for row, value in self.spoil.items():
                x_ND[row_N == row, 1] = value
            bare = Activations.bare(x_ND)
            yield self.change(
                replace(bare, index_N=row_N, doc_N=row_N // DOC, position_N=row_N % DOC, token_N=row_N % 7)
            )
            index += 1


NONE = FilterPolicy("none", window_tokens=200)


def opened(source: Source | None = None, **changes: Any) -> ActivationStream:
    settings: dict[str, Any] = {"batch_tokens": 64, "buffer_tokens": 512, "seed": 0, "filter": NONE}
    return ActivationStream(source or Numbered(), **(settings | changes))


def taken(stream: ActivationStream, n: int) -> Activations:
    return Activations.cat([stream.next_batch() for _ in range(n)])


def equal(a: Activations, b: Activations) -> bool:
    same = all(torch.equal(column, b.columns[name]) for name, column in a.columns.items())
    return same and a.columns.keys() == b.columns.keys()


def prefetching() -> bool:
    return any(thread.name == "cosae prefetches" for thread in threading.enumerate())


def test_nothing_is_lost_or_repeated() -> None:
    stream = opened()
    rows = taken(stream, 100)
    still = stream.state()["buffer.index_N"]
    seen = torch.cat([rows.index_N, still]).sort().values
    assert torch.equal(seen, torch.arange(len(seen), dtype=torch.int32))  # the window was not eaten
    assert torch.equal(rows.x_ND[:, 0], rows.index_N.float())  # ids stay with their vectors
    assert torch.equal(rows.doc_N, rows.index_N // DOC)
    assert stream.n_tokens == 6400


def test_batches_are_float32_contiguous_and_the_buffer_never_moves() -> None:
    stream = opened(store_dtype=torch.bfloat16)
    places = [column.data_ptr() for column in stream._buffer.columns.values()]
    assert len(set(places)) == len(places)
    assert stream._buffer.x_ND.dtype == torch.bfloat16
    for _ in range(40):
        batch = stream.next_batch()
        assert batch.x_ND.shape == (64, D)
        assert batch.x_ND.dtype == torch.float32
        assert batch.x_ND.is_contiguous()
        torch.testing.assert_close(batch.x_ND[:, 0], batch.index_N.float(), rtol=2**-8, atol=0)
    stream.restore(stream.state())
    assert [column.data_ptr() for column in stream._buffer.columns.values()] == places


class FarFromZero(Numbered):
    """Rows 300 standard deviations from zero, where bfloat16 alone would add a quarter of their variance as noise."""

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        for number, chunk in enumerate(super().chunks(start), start):
            noise_ND = torch.randn(chunk.x_ND.shape, generator=torch.Generator().manual_seed(number))
            yield replace(chunk, x_ND=300 + noise_ND)


def test_a_bfloat16_buffer_far_from_zero_keeps_the_variance() -> None:
    exact, rounded = (opened(FarFromZero(), store_dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert rounded._buffer.x_ND.dtype == torch.bfloat16
    true_ND, found_ND = (taken(stream, 20).x_ND.double() for stream in (exact, rounded))
    assert float((found_ND - true_ND).square().mean() / true_ND.var(0).mean()) < 1e-3
    again = opened(FarFromZero(), store_dtype=torch.bfloat16)
    again.restore(rounded.state())
    assert equal(taken(again, 20), taken(rounded, 20))
    assert again.digest == rounded.digest


def test_mixes_like_a_full_shuffle() -> None:
    """Autocorrelation of document ids along the stream, against what full shuffles of the same rows give."""
    n = 8192

    def autocorrelation(doc_N: torch.Tensor, lag: int) -> float:
        """Of a random number per document, so that no trend of document numbers can hide or feign mixing."""
        mark_N = torch.randn(int(doc_N.max()) + 1, generator=torch.Generator().manual_seed(1))[doc_N.long()]
        mark_N = mark_N - mark_N.mean()
        return float((mark_N[lag:] * mark_N[:-lag]).mean() / mark_N.square().mean())

    unshuffled = Activations.cat(list(islice(Numbered().chunks(), n // CHUNK))).doc_N
    shuffled = taken(opened(buffer_tokens=4096, seed=3), n // 64).doc_N
    draw = torch.Generator().manual_seed(5)
    full = [shuffled[torch.randperm(n, generator=draw)] for _ in range(200)]
    for lag in (1, 2, 5, 64):
        null = torch.tensor([autocorrelation(doc_N, lag) for doc_N in full])
        low, high = null.quantile(torch.tensor([0.005, 0.995])).tolist()  # 99 % of full shuffles
        assert low < autocorrelation(shuffled, lag) < high
        if lag < DOC:
            assert autocorrelation(unshuffled, lag) > 10 * high
    short = taken(opened(buffer_tokens=256, seed=3), n // 64).doc_N  # a buffer of 16 documents does not mix
    assert autocorrelation(short, 1) > high


def chi_square(count: torch.Tensor) -> float:
    """Pearson's statistic against equal shares, as a number of standard deviations from its mean."""
    expected = count.double().mean()
    degrees = count.numel() - 1
    return float(((count - expected).square() / expected).sum() - degrees) / (2 * degrees) ** 0.5


def test_every_draw_is_uniform_over_the_buffer() -> None:
    """Over slots, and over how long a row has been live, whichever batch of a round it is."""
    n_slots, batch = 256, 16
    per_slot = torch.zeros(8, n_slots)
    first_half = torch.zeros(8)  # draws among the rows that came with the round, of those that were live before it
    for seed in range(60):
        stream = opened(batch_tokens=batch, buffer_tokens=n_slots, seed=seed)
        fresh: set[int] = set()
        live: set[int] = set()
        for i in range(8 * 9):
            live_before = live
            rows = stream.next_batch().index_N
            if i % 8 == 0:  # a round began: everything in the buffer is live
                live = set(stream._buffer.index_N.tolist())
                fresh = live - live_before
            if i >= 8:  # the first round has only new rows
                per_slot[i % 8].index_add_(0, stream._order[stream._cursor - batch : stream._cursor], torch.ones(batch))
                first_half[i % 8] += sum(int(row) in fresh for row in rows)
            live = live - set(rows.tolist())
    assert [abs(chi_square(count)) < 4 for count in per_slot] == [True] * 8
    drawn = 60 * 8 * batch
    assert ((first_half - drawn / 2).abs() < 4 * (drawn / 4) ** 0.5).all()  # half of the live rows are new ones


class Counted(Numbered):
    """Counts the chunks that were made."""

    made = 0

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        for chunk in super().chunks(start):
            self.made += 1
            yield chunk


def test_every_batch_costs_the_same() -> None:
    """The source is read as batches are handed out, not half a buffer at once; restoring catches up gently."""
    source = Counted()
    stream = opened(source, buffer_tokens=4096)
    stream.next_batch()
    for _ in range(100):
        before = source.made
        stream.next_batch()
        assert source.made - before <= 1
    fresh = opened(source, buffer_tokens=4096)
    fresh.restore(stream.state())
    for _ in range(100):
        before = source.made
        assert equal(fresh.next_batch(), stream.next_batch())
        assert source.made - before <= 1 + 3


def test_a_batch_reaches_across_the_whole_buffer() -> None:
    stream = opened(buffer_tokens=4096)
    taken(stream, 64)
    span = stream.next_batch().index_N.float()
    assert float(span.max() - span.min()) > 3000


@pytest.mark.parametrize("before", [0, 1, 3, 4, 13])
@pytest.mark.parametrize("policy", [NONE, FilterPolicy("position_0", window_tokens=200)])
@pytest.mark.parametrize("ahead", [0, 2])
def test_restored_streams_go_on_to_the_bit(before: int, policy: FilterPolicy, ahead: int) -> None:
    settings = {
        "filter": policy,
        "prefetch_chunks": ahead,
        "perturbation": Perturbation("log_normal", sigma=0.3),
        "store_dtype": torch.bfloat16,
    }
    whole = opened(**settings)
    for _ in range(before):
        whole.next_batch()
    state = whole.state()
    expected = taken(whole, 30)

    assert all(isinstance(v, torch.Tensor) or json.loads(json.dumps(v)) == v for v in state.values())
    fresh = opened(**settings)
    taken(fresh, 5)  # whatever it did before, the state replaces
    fresh.restore(state)
    assert fresh.n_batches == before
    assert equal(taken(fresh, 30), expected)
    assert fresh.digest == whole.digest
    for stream in (whole, fresh):
        stream.close()
    assert not prefetching()


class Seeking(Numbered):
    """A source that finds a chunk by its cursor, and no other way."""

    def __init__(self) -> None:
        super().__init__()
        self.known = {0: 0}

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        for index, chunk in enumerate(super().chunks(self.known[start] // 7), start):
            self.known[index] = 7 * index
            yield chunk

    def cursor(self, chunk: int) -> dict[str, Any] | None:
        return {"place": self.known[chunk]}

    def seek(self, chunk: int, cursor: dict[str, Any]) -> None:
        self.known[chunk] = cursor["place"]


def test_a_source_that_can_seek_is_told_where_to_begin() -> None:
    stream = opened(Seeking())
    taken(stream, 40)
    state = stream.state()
    fresh = opened(Seeking())
    fresh.restore(state)
    assert equal(taken(fresh, 20), taken(stream, 20))


def test_prefetching_changes_nothing_and_close_ends_it() -> None:
    plain, ahead = opened(), opened(prefetch_chunks=3)
    assert equal(taken(ahead, 30), taken(plain, 30))
    assert prefetching()
    ahead.close()
    assert not prefetching()
    assert equal(taken(ahead, 30), taken(plain, 30))  # and the stream goes on where it was
    ahead.close()
    with pytest.raises(CosaeError, match="NaN at document 200"):
        taken(opened(Numbered(spoil={16 * 200 + 5: float("nan")}), prefetch_chunks=2), 100)
    with pytest.raises(CosaeError, match="prefetch_chunks must be at least 0"):
        opened(prefetch_chunks=-1)


def test_taking_a_state_or_looking_changes_nothing() -> None:
    plain, watched = opened(), opened()
    for _ in range(20):
        a, b = plain.next_batch(), watched.next_batch()
        assert equal(a, b)
        state = watched.state()
        state["buffer.x_ND"].zero_()  # a copy, not a view
        b.x_ND.zero_()
        _ = watched.digest, watched.norm_summary, watched.describe()
        torch.manual_seed(0)
    assert plain.digest == watched.digest


def test_state_of_another_stream_is_refused() -> None:
    state = opened(seed=1).state()
    with pytest.raises(CosaeError, match="differs from this one in seed;"):
        opened().restore(state)
    with pytest.raises(CosaeError, match=r"in filter\.kind, source\.loud_every;"):
        opened(Numbered(loud_every=9), filter=replace(NONE, kind="norm")).restore(opened().state())
    with pytest.raises(CosaeError, match="version"):
        opened().restore({"version": 0})


def test_digest_sees_values_order_and_ids() -> None:
    def digest(**changes: Any) -> str:
        stream = opened(**changes)
        taken(stream, 40)
        return stream.digest

    plain = digest()
    assert plain == digest()
    assert len(plain) == 64
    assert plain != digest(seed=1)
    last_bit = Numbered(spoil={30: 1e4 + 2**-10})  # one value off by one unit in its last place
    assert plain != digest(source=last_bit)
    assert plain != digest(source=Numbered(change=lambda c: replace(c, token_N=c.token_N + 1)))


def test_filter_is_fitted_after_the_nuisance_and_rules_the_stream() -> None:
    perturbation = Perturbation("sinks", frac=0.1, factor=40.0)
    stream = opened(perturbation=perturbation, filter=FilterPolicy("norm", window_tokens=150))
    raw = Activations.cat([apply(c, perturbation, i) for i, c in enumerate(islice(Numbered().chunks(), 2))])[:150]
    loud = raw.norm_N > 2e5
    assert stream.norm_summary.filtered_frac == pytest.approx(float(loud.float().mean()))
    assert stream.norm_summary.window_tokens == stream.filter.seen_tokens == 150
    assert torch.equal(stream.sample_ND, raw.x_ND[~loud])
    rows = taken(stream, 30)
    assert float(rows.norm_N.max()) < stream.filter.threshold
    sinks = Activations.cat([apply(c, perturbation, i) for i, c in enumerate(islice(Numbered().chunks(), 8))])
    dropped = set(sinks.index_N[sinks.norm_N > 2e5].tolist())
    assert dropped
    assert not dropped & set(rows.index_N.tolist())


def test_chunk_draws_do_not_depend_on_where_the_stream_was_restored() -> None:
    stream = opened(perturbation=Perturbation("log_normal"))
    rows = taken(stream, 20)
    expected = Activations.cat(
        [apply(c, Perturbation("log_normal"), i) for i, c in enumerate(islice(Numbered().chunks(), 40))]
    )
    torch.testing.assert_close(rows.x_ND, expected.x_ND[rows.index_N.long()], rtol=0, atol=0)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_bad_values_are_named(value: float, word: str) -> None:
    with pytest.raises(CosaeError, match=f"{word} at document 3, position 2 "):
        opened(Numbered(spoil={50: value}))  # in the first window
    stream = opened(Numbered(spoil={16 * 200 + 5: value}))  # much later
    with pytest.raises(CosaeError, match=f"{word} at document 200, position 5 "):
        taken(stream, 100)


def bare(chunk: Activations) -> Activations:
    return Activations.bare(chunk.x_ND)


def test_bad_values_without_documents_are_named_by_row() -> None:
    with pytest.raises(CosaeError, match="row 4 of chunk 1"):
        opened(Numbered(spoil={CHUNK + 4: float("nan")}, change=bare))


def test_large_half_precision_values_are_not_called_infinite() -> None:
    large = torch.full((CHUNK, D), 60_000.0, dtype=torch.float16)  # their sum overflows in their own dtype
    stream = opened(Numbered(change=lambda c: replace(c, x_ND=large)))
    assert float(stream.next_batch().x_ND.max()) == 60_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buffer_tokens": 100}, r"two batches \(128\)"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"store_dtype": torch.float16}, "store_dtype"),
        ({"source": Numbered(end=2)}, "stopped before chunk 2"),
    ],
)
def test_wrong_settings_are_answered_at_construction(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CosaeError, match=message) as caught:
        opened(**changes)
    assert "\n" not in str(caught.value)


def test_position_filter_needs_positions_and_widths_must_agree() -> None:
    with pytest.raises(CosaeError, match="know their positions"):
        opened(Numbered(change=bare), filter=FilterPolicy("position_0", window_tokens=200))
    wide = Numbered()
    wide.d_in = 4
    with pytest.raises(CosaeError, match="promised width 4"):
        opened(wide)


def test_a_source_that_keeps_nothing_is_reported() -> None:
    source = Numbered(change=lambda c: replace(c, special_N=c.index_N >= 10 * CHUNK))
    stream = opened(source, filter=FilterPolicy("none", window_tokens=200, drop_special=True))
    with pytest.raises(CosaeError, match="kept nothing of 1000 chunks"):
        taken(stream, 20)
