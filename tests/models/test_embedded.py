"""The embedded model: loads as any other, reads any text exactly, and knows its corpus."""

import math
import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cosae.errors import CosaeError
from cosae.models import embedded
from cosae.text import packing as corpus
from cosae.text import pylib
from cosae.text.tokenization import tokenize_documents

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pair():
    return embedded.load()


@pytest.fixture(scope="module")
def tokenizer(pair):
    return pair[1]


def test_plain_transformers_loads_it_without_a_warning(pair):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = transformers.AutoModelForCausalLM.from_pretrained(embedded.model_path())
        tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.model_path())
    ours, our_tokenizer = pair
    assert type(model).__name__ == type(ours).__name__ == "Qwen3ForCausalLM"
    assert all(torch.equal(p.float(), q) for p, q in zip(model.parameters(), ours.parameters(), strict=True))
    assert tokenizer("def f(x):\n    return x").input_ids == our_tokenizer("def f(x):\n    return x").input_ids


def test_it_is_small_frozen_and_consistent_with_its_tokenizer(pair):
    model, tokenizer = pair
    assert sum(f.stat().st_size for f in embedded.model_path().iterdir()) < 16e6
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert ids == [model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id] == [0, 1, 2]
    assert sorted(tokenizer.all_special_ids) == ids
    assert model.config.vocab_size == len(tokenizer)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 256


@settings(deadline=None, max_examples=200)
@given(text=st.text())
@example("\r\n\t x\r\r\n\n    y \n")
@example("\x00\ufeff\u2028 e\u0301 😀\u200d")
@example("if x:\n        y = '''a'''  # ok\n")
def test_every_text_comes_back_and_offsets_cover_it(tokenizer, text):
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(encoded.input_ids[1:]) == text
    reached = 0
    for start, end in encoded.offset_mapping[1:]:
        assert start <= reached <= end  # several tokens may share one character's bytes
        assert end > start
        reached = end
    assert reached == len(text)


def test_held_out_files_come_back_from_packed_rows(tokenizer):
    docs = pylib.documents("held_out")[:10]
    tokens = list(tokenize_documents(docs, tokenizer, add_bos=True))
    rows = corpus.sequences(tokens, 256, pad_id=tokenizer.pad_token_id, special_ids=tokenizer.all_special_ids)
    for i, document in enumerate(docs):
        ids = rows.ids_ST[rows.doc_ST == i]
        assert tokenizer.decode(ids, skip_special_tokens=True) == document.text
    starts = (rows.index_ST == 0).flatten()
    assert torch.equal(rows.special_ST.flatten() & rows.mask_ST.flatten(), starts)


def test_a_line_end_with_its_indentation_is_one_token(tokenizer):
    for blanks, depths in ((1, (0, 4, 8, 12, 16, 20, 24)), (2, (0, 4, 8)), (3, (0, 4))):
        for depth in depths:
            text = "x" + "\n" * blanks + " " * depth + "y"
            assert len(tokenizer(text, add_special_tokens=False).input_ids) == 3, (blanks, depth)


def bits_per_byte(model, tokenizer, docs):
    """Rows of 256 tokens without overlap, each document alone behind its BOS; mean over all bytes."""
    tokens = tokenize_documents(docs, tokenizer, add_bos=True)
    nats = 0.0
    for document in tokens:
        ids = torch.from_numpy(document.ids_T).long()
        for start in range(0, len(ids) - 1, 256):
            part = ids[start : start + 257]
            with torch.inference_mode():
                logits = model(input_ids=part[None, :-1]).logits[0]
            nats += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
    return nats / math.log(2) / sum(len(d.text.encode()) for d in docs)


@pytest.mark.long
def test_it_predicts_held_out_files_far_better_than_the_baselines(pair):
    docs = [d for d in pylib.documents("held_out") if 2000 < len(d.text) < 8000]
    found = bits_per_byte(*pair, docs[:4])
    assert found < 1.5
    assert found < 0.85 * embedded.metadata()["baselines_bits_per_byte"]["bigram"]


def test_its_facts_are_complete_and_nobody_s_to_change():
    metadata = embedded.metadata()
    assert metadata["finished"]
    assert metadata["bits_per_byte"]["no_overlap"] <= 1.25
    assert metadata["bits_per_byte"]["stride_half"] <= metadata["bits_per_byte"]["no_overlap"]
    assert metadata["baselines_bits_per_byte"]["bigram"] < metadata["baselines_bits_per_byte"]["unigram"]
    assert [n["block"] for n in metadata["norms"]] == list(range(metadata["settings"]["n_layers"]))
    assert all(0 < n["cv"] < 1 < n["max_over_median"] for n in metadata["norms"])
    metadata["norms"].clear()
    assert embedded.metadata()["norms"]


def test_held_out_files_of_this_python_were_held_out_when_it_was_trained():
    trained_on = set(embedded.metadata()["corpus"]["held_out_names"])
    here = {f.name for f in pylib.library_files() if f.split == "held_out"}
    assert here & trained_on
    assert all(pylib.split_of_name(name) == "held_out" for name in trained_on)


def test_a_package_without_the_model_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "_FOLDER", tmp_path)
    with pytest.raises(CosaeError, match=r"model\.safetensors"):
        embedded.load()
