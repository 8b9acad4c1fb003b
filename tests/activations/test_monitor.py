"""What a stream looks out for: rows that are not finite, located, counted, left out; norms that shift, told once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cosae.activations.filter import FilterPolicy
from cosae.activations.monitor import MARKS, NormReference, finite_rows, shift
from cosae.activations.perturbation import Perturbation
from cosae.activations.stream import ActivationStream
from cosae.errors import CosaeError, NotFiniteError
from cosae.types import Activations

BATCH, BUFFER, CHUNK, WINDOW = 16, 128, 50, 200
NAN, INF = float("nan"), float("inf")


class Spoiled:
    """Chunks of 50 gaussian rows in 8 dimensions; `bad` (chunk, row) → value; `gain` multiplies rows of a chunk."""

    d_in = 8

    def __init__(self, bad: dict[tuple[int, int], float] | None = None, gain: Any = lambda chunk: 1.0) -> None:
        self.bad, self.gain = bad or {}, gain

    def describe(self) -> dict[str, Any]:
        return {"source": "spoiled"}

    def document_name(self, doc: int) -> str | None:
        return f"file{doc}.py"

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        index = start
        while True:
            x_ND = torch.randn(CHUNK, 8, generator=torch.Generator().manual_seed(index)) * self.gain(index)
            for (chunk, row), value in self.bad.items():
                if chunk == index:
                    x_ND[row, 3] = value
            number = torch.arange(CHUNK, dtype=torch.int32)
            yield replace(Activations.bare(x_ND), doc_N=number * 0 + index, position_N=number)
            index += 1


def opened(source: Any, **options: Any) -> ActivationStream:
    settings = {"filter": FilterPolicy(kind="none", window_tokens=WINDOW), **options}
    return ActivationStream(source, batch_tokens=BATCH, buffer_tokens=BUFFER, seed=0, **settings)


def read(stream: ActivationStream, n: int) -> Tensor:
    return torch.cat([stream.next_batch().x_ND for _ in range(n)])


@pytest.mark.parametrize(("value", "what"), [(NAN, "NaN"), (INF, "an infinity"), (3e38, "a norm beyond float32")])
def test_fatal_names_document_name_and_position(value: float, what: str) -> None:
    stream = opened(Spoiled({(9, 7): value, (9, 9): value}))
    with pytest.raises(CosaeError, match=rf"{what} at document 9 \(file9.py\), position 7 \(2 such rows") as caught:
        read(stream, 100)
    assert isinstance(caught.value, NotFiniteError)  # a run adds that such rows can be dropped
    with pytest.raises(CosaeError, match="document 0"):
        opened(Spoiled({(0, 0): value}))


def test_rows_without_documents_are_named_by_row_and_chunk() -> None:
    class Bare(Spoiled):
        def chunks(self, start: int = 0) -> Iterator[Activations]:
            yield from (Activations.bare(chunk.x_ND) for chunk in super().chunks(start))

    with pytest.raises(CosaeError, match="NaN at row 5 of chunk 2 "):
        opened(Bare({(2, 5): NAN}))


def test_dropped_rows_are_counted_located_and_never_handed_out() -> None:
    bad = {(1, 4): NAN, (1, 5): INF, (9, 7): NAN, (11, 0): -INF}
    stream = opened(Spoiled(bad), non_finite="drop")
    assert [(e["kind"], e["tokens"]) for e in stream.monitor.take_events()] == [("non_finite", 2)]
    x_ND = read(stream, 60)
    assert bool(x_ND.isfinite().all())
    metadata = stream.monitor.metadata()
    assert metadata["policy"] == "drop"
    assert metadata["dropped_tokens"] == 4
    assert [(f["document"], f["position"], f["what"], f["name"]) for f in metadata["first"]] == [
        (1, 4, "NaN", "file1.py"),
        (1, 5, "an infinity", "file1.py"),
        (9, 7, "NaN", "file9.py"),
        (11, 0, "an infinity", "file11.py"),
    ]
    later = stream.monitor.take_events()
    assert sum(event["tokens"] for event in later) == 2
    assert "dropped 1 token " in later[0]["text"]
    assert "NaN) at document 9 (file9.py), position 7" in later[0]["text"]
    assert stream.monitor.take_events() == []
    assert stream.digest == _without(bad)


def _without(bad: dict[tuple[int, int], float]) -> str:
    """Digest of a stream from which the bad rows were taken beforehand."""

    class Clean(Spoiled):
        def chunks(self, start: int = 0) -> Iterator[Activations]:
            for index, chunk in enumerate(super().chunks(start), start):
                keep = torch.tensor([(index, row) not in bad for row in range(CHUNK)])
                yield chunk[keep]

    stream = opened(Clean())
    read(stream, 60)
    return stream.digest


def test_every_row_of_many_chunks_may_be_bad_but_not_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {(chunk, row): NAN for chunk in (0, 1, 6) for row in range(CHUNK)}
    assert read(opened(Spoiled(whole), non_finite="drop"), 60).isfinite().all()
    monkeypatch.setattr("cosae.activations.monitor.MAX_EMPTY_CHUNKS", 20)
    with pytest.raises(CosaeError, match=r"20 chunks .*finite"):
        opened(Spoiled(gain=lambda chunk: NAN), non_finite="drop")


def test_finite_rows_are_never_called_bad_and_left_as_they_are() -> None:
    x_ND = torch.full((3, 8), 1e38)
    x_ND[0, :4] = -1e38
    fine = Activations.bare(x_ND, torch.ones(3))  # the sum of a row overflows, the row does not
    assert finite_rows(fine) is fine
    assert len(finite_rows(Activations.bare(torch.tensor([[1.0], [NAN], [2.0]])))) == 2


@pytest.mark.parametrize("at", range(1, 60, 7))
def test_going_on_tells_every_event_once(at: int) -> None:
    source = Spoiled({(1, 4): NAN, (9, 7): NAN, (11, 0): INF, (30, 30): NAN}, lambda chunk: 3.0 if chunk > 12 else 1.0)
    whole = opened(source, non_finite="drop")
    read(whole, 60)
    first = opened(source, non_finite="drop")
    read(first, at)
    events = first.monitor.take_events()
    second = opened(source, non_finite="drop")
    second.restore(first.state())
    read(second, 60 - at)
    assert events + second.monitor.take_events() == whole.monitor.take_events()
    assert second.monitor.metadata() == whole.monitor.metadata()
    assert second.digest == whole.digest


# --------------------------------------------------------------------------------- norms that shift


def events(source: Any, batches: int = 100, **options: Any) -> list[dict[str, Any]]:
    stream = opened(source, **options)
    read(stream, batches)
    return stream.monitor.take_events()


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
def test_a_steady_stream_is_silent(sigma: float) -> None:
    perturbation = Perturbation("log_normal", sigma=sigma) if sigma else None
    assert events(Spoiled(), 600, perturbation=perturbation) == []


@pytest.mark.parametrize("gain", [3.0, 1.5, 0.4])
def test_a_sudden_shift_is_told_once_with_its_numbers_and_when_it_ends(gain: float) -> None:
    source = Spoiled(gain=lambda chunk: gain if 20 <= chunk < 26 else 1.0)
    begun, over = events(source)
    assert (begun["kind"], over["kind"]) == ("norm_shift", "norm_shift_over")
    assert begun["ratio"] == pytest.approx(gain, rel=0.2)
    assert 20 <= begun["chunk"] < 24
    assert "norms shifted: the " in begun["text"]
    assert "that of the first window" in begun["text"]


def test_a_shift_of_the_upper_half_alone_is_seen() -> None:
    class Tailed(Spoiled):
        def chunks(self, start: int = 0) -> Iterator[Activations]:
            for index, chunk in enumerate(super().chunks(start), start):
                heavy = (torch.arange(CHUNK) % 2 == 0) & (index > 20)
                x_ND = torch.where(heavy[:, None], chunk.x_ND * 20, chunk.x_ND)
                yield replace(chunk, x_ND=x_ND, norm_N=x_ND.norm(dim=-1))

    (event,) = events(Tailed())
    assert event["quantile"] in (0.75, 0.95)
    assert event["ratio"] > 5


def test_the_filter_hides_no_shift_and_looking_changes_nothing() -> None:
    source = Spoiled(gain=lambda chunk: 30.0 if 20 <= chunk < 26 else 1.0)
    stream = opened(source, filter=FilterPolicy(kind="norm", window_tokens=WINDOW))
    read(stream, 100)
    assert [event["kind"] for event in stream.monitor.take_events()] == ["norm_shift", "norm_shift_over"]
    plain = opened(Spoiled(), filter=FilterPolicy(kind="norm", window_tokens=WINDOW))
    read(plain, 20)
    told = opened(Spoiled(gain=lambda chunk: 30.0 if chunk > 40 else 1.0), filter=plain.filter.policy)
    read(told, 20)
    assert told.digest == plain.digest


def test_a_source_may_bring_its_own_reference() -> None:
    class Known(Spoiled):
        def norm_reference(self) -> NormReference:
            norm_N = torch.randn(10_000, 8, generator=torch.Generator().manual_seed(99)).norm(dim=-1).double() * 2
            marks = torch.quantile(norm_N, torch.tensor(MARKS, dtype=torch.float64))
            return NormReference(tuple(marks.tolist()), 10_000, "the store")

    (event,) = events(Known())
    assert "that of the store" in event["text"]
    assert event["ratio"] == pytest.approx(0.5, rel=0.2)
    assert events(Known(gain=lambda chunk: 2.0)) == []


def test_two_modes_about_a_quantile_do_not_alarm() -> None:
    """4.9 and 5.1 % of sinks move the 95 % quantile by a factor 100, and the stream has not changed."""
    reference = NormReference((1.0, 1.0, 1.0, 1.0, 1.0), 1000)
    norm_N = torch.ones(1000)
    norm_N[:51] = 100.0
    assert shift(norm_N, reference) is None
    norm_N[:300] = 100.0
    assert shift(norm_N, reference) == (0.75, 100.0) or shift(norm_N, reference) == (0.95, 100.0)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(CosaeError, match="non_finite must be one of fatal, drop"):
        opened(Spoiled(), non_finite="ignore")
