"""Documents from every place, each on one side of the split, and one sentence for what cannot be read."""

import json
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosae.activations import documents, pylib
from cosae.activations.documents import Document
from cosae.types import CosaeError


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return str(path)


def test_folders_and_text_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.py").write_text("x = 1\n", newline="\n")
    (tmp_path / "a.md").write_text("é", "utf-8")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert list(documents.read_documents(str(tmp_path))) == [("a.md", "é"), ("b/x.py", "x = 1\n")]
    assert list(documents.read_documents(str(tmp_path / "b"))) == [("x.py", "x = 1\n")]
    (tmp_path / "one.txt").write_text("one")
    assert list(documents.read_documents(str(tmp_path / "one.txt"))) == [("one.txt", "one")]


def test_rows_of_jsonl(tmp_path):
    rows = [{"text": "a", "name": "first"}, {"text": "b", "id": 7}, {"text": "c"}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    assert list(documents.read_documents(path)) == [("first", "a"), ("7", "b"), ("d.jsonl:3", "c")]


def test_rows_of_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["a", "b"], "id": ["x", None], "other": [1, 2]})
    parquet.write_table(table, tmp_path / "d.parquet")
    assert list(documents.read_documents(str(tmp_path / "d.parquet"))) == [("x", "a"), ("d.parquet:1", "b")]


def test_half_a_surrogate_pair_becomes_a_replacement_mark(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "a\\ud800b\\ud83d\\ude00"}\n')
    (document,) = documents.read_documents(str(tmp_path / "d.jsonl"))
    assert document.text == "a\ufffdb😀"


def test_the_hub_is_streamed_through_datasets(monkeypatch):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return iter([{"text": "a"}, {"text": "b", "id": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(documents.read_documents("hf:org/set:en:test")) == [("org/set:0", "a"), ("two", "b")]
    list(documents.read_documents("hf:org/set:validation"))
    list(documents.read_documents("hf:org/set"))
    assert calls == [
        (("org/set", "en"), {"split": "test", "streaming": True}),
        (("org/set", None), {"split": "validation", "streaming": True}),
        (("org/set", None), {"split": "train", "streaming": True}),
    ]


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(CosaeError, match="no route"):
        documents.read_documents("hf:org/set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CosaeError, match="pip install"):
        documents.read_documents("hf:org/set")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zip", b"", "a.zip"),
        ("a.txt", b"\xff", "UTF-8"),
        ("a.jsonl", b"{", "line 1"),
        ("a.jsonl", b'{"text": "x"}\n\xff\n', "line 2"),
        ("a.jsonl", b'{"body": "x"}', "body"),
        ("a.jsonl", b'{"text": 3}', "string"),
        ("a.jsonl", b"[1]", "list"),
        ("a.jsonl", b"", "at least one document"),
        ("a.parquet", b"x", "Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CosaeError, match=message) as caught:
        list(documents.read_documents(str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_a_spec_that_names_nothing_is_refused_at_the_call(tmp_path):
    for spec, message in (
        (str(tmp_path / "missing"), "does not exist"),
        ("hf:", "DATASET"),
        ("hf:a:b:c:d", "DATASET"),
    ):
        with pytest.raises(CosaeError, match=message):
            documents.read_documents(spec)
    with pytest.raises(CosaeError, match="at least one text"):
        list(documents.read_documents(str(tmp_path)))


@given(texts=st.lists(st.text(), max_size=30), seed=st.integers(0, 5), frac=st.floats(0, 1))
def test_sides_are_disjoint_and_a_function_of_the_text(texts, seed, frac):
    sides = [documents.split_of(Document(str(i), t), frac, seed) for i, t in enumerate(texts)]
    held_out = {t for t, s in zip(texts, sides, strict=True) if s == "held_out"}
    assert held_out.isdisjoint(t for t, s in zip(texts, sides, strict=True) if s == "train")
    assert frac > 0 or not held_out


def test_the_splits_of_a_file_make_up_the_whole(tmp_path):
    rows = [{"text": f"text {i % 300}", "name": str(i)} for i in range(400)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    side = {s: list(documents.read_documents(path, s, held_out_frac=0.2)) for s in ("train", "held_out", "all")}
    assert sorted(side["train"] + side["held_out"]) == sorted(side["all"])
    assert {d.text for d in side["train"]}.isdisjoint(d.text for d in side["held_out"])
    assert 0.1 < len(side["held_out"]) / 400 < 0.3
    other = list(documents.read_documents(path, "held_out", held_out_frac=0.2, seed=1))
    assert other != side["held_out"]


def test_pylib_keeps_its_own_split():
    assert list(documents.read_documents("pylib", "held_out")) == pylib.documents("held_out")


@pytest.mark.parametrize("bad", [{"split": "test"}, {"held_out_frac": 1.5}])
def test_bad_splits_are_refused(bad):
    with pytest.raises(CosaeError, match=next(iter(bad))):
        documents.read_documents("pylib", **bad)
