"""Sources in memory: a tensor split once and read in epochs, and another source's chunks kept."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch

from cosae.activations.arrays import TensorSource
from cosae.activations.cached import CachedSource
from cosae.errors import CosaeError
from cosae.types import Activations


def numbered(n: int = 100) -> torch.Tensor:
    """Row i is (i, 1)."""
    return torch.stack([torch.arange(float(n)), torch.ones(n)], 1)


def rows_of(activations: Activations) -> list[int]:
    return [int(i) for i in activations.x_ND[:, 0]]


def test_each_epoch_hands_out_every_train_row_once_in_an_order_of_its_own() -> None:
    source = TensorSource(numbered(), chunk_tokens=32)
    held_out = rows_of(source.held_out())
    assert held_out == sorted(held_out)
    assert len(held_out) == 10
    assert source.chunks_per_epoch == 3
    epochs = [[row for chunk in islice(source.chunks(start), 3) for row in rows_of(chunk)] for start in (0, 3)]
    for epoch in epochs:
        assert sorted(epoch + held_out) == list(range(100))
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_chunks_do_not_depend_on_where_one_starts() -> None:
    source = TensorSource(numbered(), chunk_tokens=32)
    run = [rows_of(chunk) for chunk in islice(source.chunks(), 8)]
    for start in range(8):
        assert rows_of(next(source.chunks(start))) == run[start]


def test_the_seed_decides_split_and_order() -> None:
    held_out = {tuple(rows_of(TensorSource(numbered(), seed=seed).held_out())) for seed in (0, 0, 1, 2)}
    assert len(held_out) == 3


def test_the_source_owns_what_it_was_given() -> None:
    x_ND = numbered().requires_grad_()
    source = TensorSource(x_ND)
    chunk = next(source.chunks())
    assert not chunk.x_ND.requires_grad
    assert chunk.x_ND.dtype == torch.float32
    torch.testing.assert_close(chunk.norm_N, chunk.x_ND.norm(dim=-1))
    assert set(chunk.doc_N.tolist()) == {-1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_type_becomes_float32(dtype: torch.dtype) -> None:
    assert TensorSource(numbered(8).to(dtype)).held_out().x_ND.dtype == torch.float32


@pytest.mark.parametrize("n", [2, 3, 5])
def test_small_tensors_keep_a_row_on_each_side(n: int) -> None:
    for frac in (0.001, 0.5, 0.99):
        source = TensorSource(numbered(n), held_out_frac=frac)
        assert len(source.held_out()) >= 1
        assert source.chunks_per_epoch == 1
        assert len(next(source.chunks())) == n - len(source.held_out()) >= 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (torch.zeros(4), r"shape \(N, d\).*Got torch.float32 \(4,\)"),
        (torch.zeros(1, 4), "N of at least 2"),
        (torch.zeros(0, 4), "N of at least 2"),
        (torch.zeros(3, 4, dtype=torch.int64), "Got torch.int64"),
        (torch.zeros(3, 4, dtype=torch.complex64), "Got torch.complex64"),
        (torch.zeros(3, 0), "Got torch.float32"),
        ([[1.0, 2.0]], "Got list"),
        (None, "Got NoneType"),
        (numbered().index_fill(0, torch.tensor([7]), torch.nan), "Got nan at row 7, column 0"),
        (numbered().index_fill(0, torch.tensor([8]), -torch.inf), "Got -inf at row 8, column 0"),
        (torch.full((3, 2), 1e300, dtype=torch.float64), "finite"),
    ],
)
def test_what_is_no_activations_is_refused(given: Any, says: str) -> None:
    with pytest.raises(CosaeError, match=says) as caught:
        TensorSource(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("frac", [-0.1, 0.0, 1.0, 5.0, float("nan")])
def test_shares_that_leave_a_side_empty_are_refused(frac: float) -> None:
    with pytest.raises(CosaeError, match="held_out_frac must lie in"):
        TensorSource(numbered(), held_out_frac=frac)


def test_the_record_changes_with_every_bit_of_the_rows() -> None:
    x_ND = numbered()
    record = TensorSource(x_ND).describe()
    assert (record["source"], record["n_rows"], record["d_in"]) == ("tensor", 100, 2)
    assert (record["n_tokens"], record["n_held_out"]) == (90, 10)
    changed = x_ND.clone()
    changed[50, 0] = changed[50, 0].nextafter(torch.tensor(1e9))
    assert TensorSource(changed).describe()["sha256"] != record["sha256"]
    assert TensorSource(x_ND.double()).describe() == record


class Counted:
    """Chunk i is ten rows of i; counts how many were made."""

    d_in = 2

    def __init__(self) -> None:
        self.made: list[int] = []

    def describe(self) -> dict[str, Any]:
        return {"source": "counted"}

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        number = start
        while True:
            self.made.append(number)
            yield Activations.bare(torch.full((10, 2), float(number)))
            number += 1


def test_kept_chunks_are_made_once_and_are_the_same() -> None:
    inner = Counted()
    cached = CachedSource(inner, limit_tokens=35)  # three whole chunks
    assert (cached.d_in, cached.describe()) == (2, {"source": "counted"})
    first = list(islice(cached.chunks(), 5))
    assert inner.made == [0, 1, 2, 3, 4]
    again = list(islice(cached.chunks(), 5))
    assert inner.made == [0, 1, 2, 3, 4, 3, 4]
    for a, b in zip(first, again, strict=True):
        assert a.columns.keys() == b.columns.keys()
        assert all(torch.equal(column, b.columns[name]) for name, column in a.columns.items())


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7])
def test_a_later_start_is_the_same_before_and_after_keeping(start: int) -> None:
    cached = CachedSource(Counted(), limit_tokens=35)
    expected = [float(i) for i in range(start, start + 4)]
    assert [float(c.x_ND[0, 0]) for c in islice(cached.chunks(start), 4)] == expected
    list(islice(cached.chunks(), 6))
    assert [float(c.x_ND[0, 0]) for c in islice(cached.chunks(start), 4)] == expected


def test_two_readers_at_once() -> None:
    cached = CachedSource(Counted(), limit_tokens=1000)
    a, b = cached.chunks(), cached.chunks()
    seen = [(float(next(a).x_ND[0, 0]), float(next(b).x_ND[0, 0])) for _ in range(5)]
    assert seen == [(float(i), float(i)) for i in range(5)]
