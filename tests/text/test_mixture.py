"""Several sources: shares of tokens held, order fixed by the seed, any chunk made again from a cursor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosae.errors import CosaeError
from cosae.text.mixture import Cursor, Text, Weighted, mix, parse_corpus
from cosae.text.packing import iterate_sequences
from cosae.text.tokenization import TokenizedDocument
from cosae.types import Sequences


def lengths_of(source: int, turn: int, n: int) -> list[int]:
    return np.random.default_rng([source, turn]).integers(0, 40, n).tolist()


def opened(source: int, n: int, turn: int, skip: int) -> Iterator[TokenizedDocument]:
    """n documents of lengths 0 … 39, others in each pass; token ids tell source and pass."""
    for i, length in islice(enumerate(lengths_of(source, turn, n)), skip, None):
        ids = np.full(length, 100 * source + turn, dtype=np.int32)
        yield TokenizedDocument(f"s{source} p{turn} d{i}", ids, np.zeros((length, 2), np.int32))


def text(sizes: list[int], weights: list[float], seed: int = 0, rows: int = 3, packing: str = "packed") -> Text:
    sources = tuple(partial(opened, i, n) for i, n in enumerate(sizes))
    return Text(sources, tuple(weights), 8, packing, 99, (), rows, seed, {"corpus": "made up"})  # type: ignore[arg-type]


def names(sizes: list[int], weights: list[float], seed: int = 0, n: int = 200, **options: Any) -> list[str]:
    sources = [partial(opened, i, size) for i, size in enumerate(sizes)]
    found = mix(sources, weights, [Cursor()] * len(sizes), seed, **options)
    return [document.name for _, document in islice(found, n)]


@settings(deadline=None, max_examples=40)
@given(weights=st.lists(st.floats(0.05, 20), min_size=1, max_size=4), seed=st.integers(0, 3))
def test_every_source_has_its_share_of_the_tokens_to_within_a_document(weights: list[float], seed: int) -> None:
    sources = [partial(opened, i, 11) for i in range(len(weights))]  # small: each starts over many times
    given_ = np.zeros(len(weights))
    for _, document in islice(mix(sources, weights, [Cursor()] * len(weights), seed), 300):
        given_[int(document.name[1])] += len(document.ids_T)
        share = given_.sum() * np.array(weights) / sum(weights)
        assert (np.abs(given_ - share) < 40 * len(weights)).all()


def test_the_seed_decides_and_a_source_that_runs_out_starts_over_by_itself() -> None:
    order = names([5, 400], [1, 1])
    assert order == names([5, 400], [1, 1])
    assert any(order != names([5, 400], [1, 1], seed) for seed in range(1, 5))
    first = [name for name in order if name.startswith("s0")]
    assert {"s0 p0 d1", "s0 p1 d1", "s0 p2 d1"} <= set(first)
    second = [name for name in order if name.startswith("s1")]
    assert len(second) == len(set(second))  # goes on where it was
    assert {name.split()[1] for name in second} == {"p0"}


def test_a_finite_mixture_gives_every_document_once() -> None:
    wanted = [f"s{s} p0 d{i}" for s, n in enumerate([7, 30]) for i, length in enumerate(lengths_of(s, 0, n)) if length]
    assert sorted(names([7, 30], [3, 1], n=10**6, endless=False)) == sorted(wanted)


def test_a_source_without_a_token_is_an_error_not_a_loop() -> None:
    def empty(turn: int, skip: int) -> Iterator[TokenizedDocument]:
        ids = np.zeros(0, np.int32)
        return islice(iter([TokenizedDocument("e", ids, np.zeros((0, 2), np.int32))] * 3), skip, None)

    with pytest.raises(CosaeError, match="at least one token"):
        list(mix([empty, partial(opened, 1, 5)], [1, 1], [Cursor()] * 2, 0))


FIELDS = ("ids_ST", "doc_ST", "index_ST", "mask_ST", "special_ST")


def same(a: Sequences, b: Sequences) -> bool:
    parts = all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)
    return parts and (a.doc_names, a.first_doc) == (b.doc_names, b.first_doc)


@pytest.mark.parametrize("packing", ["packed", "document"])
@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(2, 30), min_size=1, max_size=3), rows=st.integers(1, 9), at=st.integers(0, 25))
def test_a_cursor_makes_every_later_chunk_again(packing: str, sizes: list[int], rows: int, at: int) -> None:
    whole = list(islice(text(sizes, [1.0 + i for i in range(len(sizes))], rows=rows, packing=packing).chunks(), 30))
    cursor = json.loads(json.dumps(whole[at][1]))
    again = text(sizes, [1.0 + i for i in range(len(sizes))], rows=rows, packing=packing).chunks(cursor)
    for (chunk, place), (other, there) in zip(whole[at:], again, strict=False):
        assert same(chunk, other)
        assert place == there


def test_one_source_is_read_as_it_would_be_without_a_mixture() -> None:
    plain = iterate_sequences(opened(0, 50, 0, 0), 8, pad_id=99, rows_per_chunk=3)
    kept = [c for c in plain if len(c) == 3 and bool(c.mask_ST.all())]
    documents = [length for length in lengths_of(0, 0, 50) if length]
    for chunk, (other, _) in zip(kept, text([50], [1.0]).chunks(), strict=False):
        assert torch.equal(chunk.ids_ST, other.ids_ST)
        assert torch.equal(chunk.index_ST, other.index_ST)
    assert sum(int(c.mask_ST.sum()) for c in kept) > 0.9 * sum(documents)


def test_what_is_held_does_not_grow() -> None:
    chunks = text([40, 40], [1, 3], rows=4).chunks()
    sizes = [len(chunk.doc_names) for chunk, _ in islice(chunks, 400)]
    assert max(sizes[200:]) <= max(sizes[:200]) + 5


def test_specs_and_weights(tmp_path: Any) -> None:
    assert parse_corpus("code") == (Weighted("code", 1.0),)
    assert parse_corpus("code/:0.7") == (Weighted("code/", 0.7),)
    assert parse_corpus(["code/:7e-1", "hf:org/set:en:train:3", "notes.jsonl"]) == (
        Weighted("code/", 0.7),
        Weighted("hf:org/set:en:train", 3.0),
        Weighted("notes.jsonl", 1.0),
    )
    odd = tmp_path / "a:2"
    odd.mkdir()
    with pytest.raises(CosaeError, match="once"):
        parse_corpus([f"{tmp_path}:1", f"{tmp_path}/:2"])
    assert parse_corpus(str(odd)) == (Weighted(str(odd), 1.0),)


@pytest.mark.parametrize(
    ("corpus", "says"),
    [
        ([], "at least one source"),
        ("", "at least one source"),
        (["a", ""], "at least one source"),
        (["a:0", "b"], "above 0"),
        (["a:-1", "b"], "above 0"),
        (["a:1e999", "b"], "above 0"),
        (["a:1", "a:2"], "once"),
    ],
)
def test_what_a_mixture_refuses(corpus: Any, says: str) -> None:
    with pytest.raises(CosaeError, match=says):
        parse_corpus(corpus)
