"""Tokens with their offsets, and rows in which no token is lost."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosae.errors import CosaeError, CosaeWarning
from cosae.text import packing as corpus
from cosae.text.pylib import Document
from cosae.text.tokenization import TokenizedDocument, tokenize_documents

transformers = pytest.importorskip("transformers")

PAD, BOS = 99, 1


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"<pad>": 0, "<bos>": 1, **{c: i + 2 for i, c in enumerate(alphabet)}}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", pad_token="<pad>", model_max_length=8
    )


def tokenized(lengths):
    """Documents of distinct ids, each starting with BOS."""
    ids = np.arange(1000, 1000 + sum(lengths), dtype=np.int32)
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    for part in parts:
        part[:1] = BOS
    return [TokenizedDocument(f"d{i}", p, np.zeros((len(p), 2), np.int32)) for i, p in enumerate(parts)]


def pack(documents, context, packing="packed", **options):
    return corpus.sequences(documents, context, packing, pad_id=PAD, special_ids=[BOS, PAD], **options)


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=20)
FIELDS = ("ids_ST", "doc_ST", "index_ST", "mask_ST", "special_ST")


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, context=st.integers(2, 33))
def test_packed_rows_hold_every_token_once_and_in_order(lengths, context):
    documents = tokenized(lengths)
    rows = pack(documents, context)
    assert rows.ids_ST.shape == (-(-sum(lengths) // context), context)
    assert rows.mask_ST.flatten().tolist() == [i < sum(lengths) for i in range(rows.ids_ST.numel())]
    kept = rows.mask_ST
    assert rows.ids_ST[kept].tolist() == [t for d in documents for t in d.ids_T.tolist()]
    assert rows.doc_ST[kept].tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert rows.index_ST[kept].tolist() == [t for n in lengths for t in range(n)]
    check_padding_and_types(rows)


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, context=st.integers(2, 33))
def test_document_rows_hold_each_document_s_beginning(lengths, context):
    documents = tokenized(lengths)
    rows = pack(documents, context, "document")
    assert len(rows) == len(documents)
    for row, document in enumerate(documents):
        n = min(len(document.ids_T), context)
        assert rows.mask_ST[row].tolist() == [t < n for t in range(context)]
        assert rows.ids_ST[row, :n].tolist() == document.ids_T[:n].tolist()
        assert rows.index_ST[row, :n].tolist() == list(range(n))
        assert (rows.doc_ST[row, :n] == row).all()
    check_padding_and_types(rows)


def check_padding_and_types(rows):
    hidden = ~rows.mask_ST
    assert (rows.ids_ST[hidden] == PAD).all()
    assert (rows.doc_ST[hidden] == -1).all()
    assert (rows.index_ST[hidden] == -1).all()
    assert torch.equal(rows.special_ST, (rows.ids_ST == BOS) | (rows.ids_ST == PAD))
    types = [getattr(rows, f).dtype for f in FIELDS]
    assert types == [torch.int64, torch.int32, torch.int32, torch.bool, torch.bool]


@settings(deadline=None, max_examples=60)
@given(
    lengths=LENGTHS,
    context=st.integers(2, 17),
    per_chunk=st.integers(1, 5),
    packing=st.sampled_from(["packed", "document"]),
)
def test_chunks_are_the_same_rows(lengths, context, per_chunk, packing):
    documents = tokenized(lengths)
    whole = pack(documents, context, packing)
    chunks = list(
        corpus.iterate_sequences(
            iter(documents), context, packing, pad_id=PAD, special_ids=[BOS, PAD], rows_per_chunk=per_chunk
        )
    )
    for name in FIELDS:
        assert torch.equal(torch.cat([getattr(c, name) for c in chunks]), getattr(whole, name))
    assert [len(c) for c in chunks[:-1]] == [per_chunk] * (len(chunks) - 1)
    for chunk in chunks:  # names of its own documents, and no others
        own = chunk.doc_ST[chunk.mask_ST].unique().tolist()
        assert [chunk.doc_names[i - chunk.first_doc] for i in own] == list(chunk.doc_names)
        assert list(chunk.doc_names) == [f"d{i}" for i in own]
    assert whole.doc_names == tuple(d.name for d in documents)


def test_chunks_are_read_lazily():
    def endless():
        while True:
            yield from tokenized([7])

    chunks = corpus.iterate_sequences(endless(), 8, pad_id=PAD, rows_per_chunk=2)
    assert [next(chunks).ids_ST.shape for _ in range(3)] == [(2, 8)] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "context"),
        ({"context": 8, "packing": "tight"}, "packed"),
        ({"context": 8, "rows_per_chunk": 0}, "rows_per_chunk"),
    ],
)
def test_bad_settings_are_refused_at_the_call(options, message):
    with pytest.raises(CosaeError, match=message):
        corpus.iterate_sequences(tokenized([5]), pad_id=PAD, **options)


def test_an_empty_corpus_is_one_sentence():
    with pytest.raises(CosaeError, match="at least one token"):
        pack([], 8)


def test_a_bos_that_the_text_spells_is_not_doubled_and_that_is_said_once(tokenizer):
    texts = ["<bos>x é", "x é", "<bos>", "x<bos>"]
    documents = [Document(text, text) for text in texts]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        found = [list(d.ids_T) for d in tokenize_documents(documents * 2, tokenizer, add_bos=True)]
    assert [str(one.message).count("<bos>") for one in said] == [1]
    x = tokenizer("x")["input_ids"]
    assert found[:4] == [found[1], found[1], [1], [1, *x, 1]]
    with pytest.warns(CosaeWarning, match="one of the two is kept"):
        (first,) = tokenize_documents(documents[:1], tokenizer, add_bos=True)
    (plain,) = tokenize_documents(documents[1:2], tokenizer, add_bos=True)
    assert (first.offset_T2[1:] - 5 == plain.offset_T2[1:]).all()  # places in the text as it is
    assert first.offset_T2[0].tolist() == [0, 0]
    (as_written,) = tokenize_documents(documents[:1], tokenizer, add_bos=False)
    assert list(as_written.ids_T) == found[0]


def test_tokens_carry_bos_and_character_offsets(tokenizer):
    (document,) = tokenize_documents([Document("a", "x é")], tokenizer, add_bos=True)
    assert document.ids_T.dtype == document.offset_T2.dtype == np.int32
    assert document.ids_T[0] == BOS
    assert document.offset_T2.tolist() == [[0, 0], [0, 1], [1, 2], [2, 3], [2, 3]]  # é is two bytes
    (plain,) = tokenize_documents([Document("a", "x é")], tokenizer, add_bos=False)
    assert plain.ids_T.tolist() == document.ids_T[1:].tolist()


def test_tokens_are_the_tokenizer_s_own_for_any_number_of_documents(tokenizer, recwarn):
    docs = [Document(str(i), "ab " * i) for i in range(200)]
    found = list(tokenize_documents(docs, tokenizer, add_bos=True))
    assert [d.name for d in found] == [d.name for d in docs]
    assert [d.ids_T[1:].tolist() for d in found] == [tokenizer.encode(d.text) for d in docs]
    assert not recwarn.list


def test_limits(tokenizer):
    docs = [Document("long", "abcdefgh"), Document("short", "xy"), Document("next", "ijklmnop")]

    def lengths(**options):
        found = tokenize_documents(docs, tokenizer, add_bos=True, **options)
        return {d.name: len(d.ids_T) for d in found}

    assert lengths() == {"long": 9, "short": 3, "next": 9}
    assert lengths(max_chars=4) == {"long": 5, "short": 3, "next": 5}
    assert lengths(min_chars=3) == {"long": 9, "next": 9}
    assert lengths(max_tokens=10) == {"long": 9, "short": 1}
    assert lengths(max_tokens=9) == {"long": 9}


def test_tokenizing_stops_reading_at_max_tokens(tokenizer):
    def endless():
        while True:
            yield Document("a", "abc")

    found = list(tokenize_documents(endless(), tokenizer, add_bos=True, max_tokens=1000))
    assert sum(len(d.ids_T) for d in found) == 1000


def test_empty_documents_leave_no_tokens_without_bos(tokenizer):
    docs = [Document("a", ""), Document("b", "x")]
    assert [d.name for d in tokenize_documents(docs, tokenizer, add_bos=False)] == ["b"]
    assert [len(d.ids_T) for d in tokenize_documents(docs, tokenizer, add_bos=True)] == [1, 2]


def test_tokenizers_without_offsets_or_bos_are_refused(tokenizer):
    with pytest.raises(CosaeError, match="fast"):
        tokenize_documents([], SimpleNamespace(is_fast=False), add_bos=False)
    with pytest.raises(CosaeError, match="BOS"):
        tokenize_documents([], SimpleNamespace(is_fast=True, bos_token_id=None), add_bos=True)
