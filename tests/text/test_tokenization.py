"""A long document is tokenised in pieces, and no further than it is used; the tokens are those of the whole."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cosae.models import embedded
from cosae.recipe import DataConfig
from cosae.run.dataset.corpus import CorpusText
from cosae.text import tokenization, workers
from cosae.text.mixture import Text
from cosae.text.pylib import Document
from cosae.text.tokenization import TokenizedDocument, tokenize_documents, whole
from tests.support.letters import Letters

WORDS = ["norm", "  ", "\n", "\n\n    ", "été", "feature", ", ", "日本語", "12345", "-", "\t", "the sink ", "🙂", "aa"]


def text_of(n_words: int, seed: int = 0) -> str:
    drawn = random.Random(seed)
    return "".join(drawn.choice(WORDS) + drawn.choice(["", " "]) for _ in range(n_words))


@cache
def tokenizer_of(kind: str) -> Any:
    """Of the embedded model, or trained here: what kinds there are split text in different places."""
    if kind == "embedded":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(embedded.model_path())
    known = {
        "metaspace": (models.BPE(unk_token="?", byte_fallback=True), pre_tokenizers.Metaspace(), trainers.BpeTrainer),
        "word_piece": (models.WordPiece(unk_token="?"), pre_tokenizers.BertPreTokenizer(), trainers.WordPieceTrainer),
        "unigram": (models.Unigram(), pre_tokenizers.Metaspace(), trainers.UnigramTrainer),
    }
    model, split, trainer = known[kind]
    made = Tokenizer(model)
    made.pre_tokenizer = split
    made.normalizer = normalizers.NFKC() if kind == "unigram" else normalizers.Sequence([])
    made.decoder = decoders.Metaspace()
    unknown = {"unk_token": "?"} if kind == "unigram" else {}
    made.train_from_iterator(
        [text_of(2000, 7)], trainer(vocab_size=150, special_tokens=["?"], show_progress=False, **unknown)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIECE_CHARS": 900, "AROUND_CHARS": 100, "WHOLE_CHARS": 600, "HEAD_CHARS": 1}.items():
        monkeypatch.setattr(tokenization, name, value)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", ["embedded", "metaspace", "word_piece", "unigram"])
def test_pieces_and_heads_have_the_tokens_of_the_whole(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    documents = [Document("long", text_of(3000)), Document("short", "a few words"), Document("next", text_of(900, 2))]
    documents.append(Document("spaces", " " * 4000 + "end"))
    true = [tokenizer(d.text, add_special_tokens=False, return_offsets_mapping=True) for d in documents]
    for options in ({}, {"in_parts": True}):
        found = list(whole(tokenize_documents(documents, tokenizer, add_bos=False, **options)))
        assert [d.name for d in found] == [d.name for d in documents]
        for one, real in list(zip(found, true, strict=True))[:3]:
            assert one.ids_T.tolist() == real["input_ids"]
            assert one.offset_T2.tolist() == [list(ends) for ends in real["offset_mapping"]]
    heads = list(tokenize_documents(documents, tokenizer, add_bos=False, head=150))
    assert [len(d.ids_T) for d in heads[:3]] == [150, len(true[1]["input_ids"]), 150]
    for one, real in zip(heads, true, strict=True):
        assert one.ids_T.tolist() == real["input_ids"][: len(one.ids_T)]


def test_parts_know_that_they_go_on(small_pieces: None) -> None:
    documents = [Document("a", "x" * 2000), Document("b", "y"), Document("c", "z" * 1000)]
    read = partial(tokenize_documents, documents, Letters(), add_bos=True)
    parts = list(read(in_parts=True))
    assert [(d.name, d.more) for d in parts] == [
        *[("a", True), ("a", True), ("a", False), ("b", False), ("c", True), ("c", False)]
    ]
    assert [len(d.ids_T) for d in read()] == [2001, 2, 1001]
    cut = list(read(in_parts=True, max_tokens=1000))
    assert [(d.name, len(d.ids_T), d.more) for d in cut] == [("a", 901, True), ("a", 99, False)]
    with workers.Workers(Letters(), 1) as pool:
        assert [d.ids_T.tolist() for d in read(in_parts=True, workers=pool)] == [d.ids_T.tolist() for d in parts]


@pytest.mark.parametrize("packing", ["packed", "document"])
def test_a_mixture_of_parts_is_that_of_whole_documents_from_every_cursor(small_pieces: None, packing: Any) -> None:
    def opened(source: int, in_parts: bool, turn: int, skip: int) -> Iterator[TokenizedDocument]:
        lengths = [2100, 5, 950, 40] if source else [30, 1500]
        documents = [Document(f"{source} {turn} {n}", chr(97 + i) * n) for i, n in enumerate(lengths)]
        options: dict[str, Any] = {"add_bos": True, "keep_empty": True, "in_parts": in_parts}
        return tokenize_documents(islice(documents, skip, None), Letters(), **options)

    def text(in_parts: bool) -> Text:
        sources = tuple(partial(opened, source, in_parts) for source in (0, 1))
        return Text(sources, (0.3, 0.7), 32, packing, 0, (1,), 8, 0, {})

    true = list(islice(text(False).chunks(), 60))
    found = list(islice(text(True).chunks(), 60))
    for (chunk, cursor), (other, other_cursor) in zip(true, found, strict=True):
        assert cursor == other_cursor
        assert chunk.doc_names == other.doc_names
        assert all(bool((getattr(chunk, name) == getattr(other, name)).all()) for name in ("ids_ST", "doc_ST"))
    for number in range(0, 50, 7):
        again, _ = next(text(True).chunks(found[number][1]))
        assert bool((again.ids_ST == found[number][0].ids_ST).all())
        assert bool((again.index_ST == found[number][0].index_ST).all())


class Counting(Letters):
    """How many characters it was given."""

    all_special_ids = (1,)
    pad_token_id = 0

    def __init__(self) -> None:
        self.n_chars = 0

    def __call__(self, texts: Any, **options: Any) -> Any:
        self.n_chars += sum(map(len, texts))
        return super().__call__(texts, **options)


@pytest.mark.parametrize(("packing", "bound"), [("document", 4_000), ("packed", 1_700_000)])
def test_one_line_of_5_MB_costs_no_more_than_what_is_used_of_it(tmp_path: Path, packing: str, bound: int) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "norm and sink\n" * 360_000}), encoding="utf-8")
    tokenizer = Counting()
    corpus = str(tmp_path / "long.jsonl")
    data = DataConfig(corpus=corpus, packing=packing, context=64, add_bos=True, held_out_frac=0.0)
    text = CorpusText(data, tokenizer, 0, held_out=False)
    if packing == "document":
        tracemalloc.start()
    rows = text.pack(text.tokenized("train", 1000))
    if packing == "document":
        assert tracemalloc.get_traced_memory()[1] < 6 * 5_040_000  # the text, a few times while it is read
        tracemalloc.stop()
    assert rows.ids_ST.shape == (1 if packing == "document" else 16, 64)
    assert np.array_equal(rows.ids_ST.flatten()[1:15], [ord(c) for c in "norm and sink\n"])
    assert tokenizer.n_chars <= bound

    tokenizer.n_chars = 0  # sequences are drawn from all held-out documents, not from all of a very long one
    held_out = CorpusText(replace(data, held_out_frac=1.0), tokenizer, 0)
    drawn = held_out.pack(held_out.tokenized("held_out", None, drawn=1000))
    assert bool((drawn.ids_ST[0] == rows.ids_ST[0]).all())
    assert tokenizer.n_chars <= max(bound, 300_000)
