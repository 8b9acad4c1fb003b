"""Documents from every place, each on one side of the split, and one sentence for what cannot be read."""

import json
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosae.errors import CosaeError
from cosae.text import documents, pylib
from cosae.text.files import Reading, Tally
from cosae.text.pylib import Document


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


def write_parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)
    return str(path)


def test_the_text_field_is_a_choice(tmp_path):
    reading = Reading(text_field="content")
    path = write_jsonl(tmp_path / "d.jsonl", [{"content": "a", "text": 3, "id": "x"}])
    assert list(documents.read_documents(path, reading=reading)) == [("x", "a")]
    path = write_parquet(tmp_path / "d.parquet", content=["a", "b"], text=[1, 2])
    assert [d.text for d in documents.read_documents(path, reading=reading)] == ["a", "b"]
    named = Reading(text_field="name")
    path = write_jsonl(tmp_path / "n.jsonl", [{"name": "the text", "id": "x"}])
    assert list(documents.read_documents(path, reading=named)) == [("x", "the text")]


def test_a_parquet_file_without_the_column_or_with_a_hole_is_one_sentence(tmp_path):
    path = write_parquet(tmp_path / "d.parquet", body=["a"], title=["b"])
    with pytest.raises(CosaeError, match=r"'text'.*\['body', 'title'\].*text_field"):
        list(documents.read_documents(path))
    path = write_parquet(tmp_path / "e.parquet", text=["a", None])
    with pytest.raises(CosaeError, match=r"NoneType there at e\.parquet, row 1"):
        list(documents.read_documents(path))
    cut = tmp_path / "f.parquet"
    cut.write_bytes((tmp_path / "e.parquet").read_bytes()[:-20])
    with pytest.raises(CosaeError, match="whole Parquet file"):
        list(documents.read_documents(str(cut)))


def test_the_suffixes_of_a_folder_are_a_choice(tmp_path):
    for name in ("a.py", "b.RS", "c.md", "d.weird"):
        (tmp_path / name).write_text(name)

    def names(*suffixes):
        return [d.name for d in documents.read_documents(str(tmp_path), reading=Reading(suffixes=suffixes))]

    assert names() == ["a.py", "b.RS", "c.md"]
    assert names(".rs", ".weird") == ["b.RS", "d.weird"]
    with pytest.raises(CosaeError, match=r"none of \.go among its 4 files"):
        names(".go")
    with pytest.raises(CosaeError, match=r"endings such as \.py"):
        Reading(suffixes=("py",))


def test_a_folder_of_shards_is_read_by_rows(tmp_path):
    write_jsonl(tmp_path / "0.jsonl", [{"text": "a"}, {"text": "b"}])
    write_parquet(tmp_path / "1.parquet", text=["c"])
    found = list(documents.read_documents(str(tmp_path)))
    assert found == [("0.jsonl:1", "a"), ("0.jsonl:2", "b"), ("1.parquet:0", "c")]
    (tmp_path / "code.py").write_text("d")  # beside source files such data are not text
    assert [d.text for d in documents.read_documents(str(tmp_path))] == ["d"]


def test_paragraphs_and_lines_of_a_text_file(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("one\ntwo\n\n \nthree\n\nfour", newline="\n")

    def units(unit):
        return list(documents.read_documents(str(path), reading=Reading(txt_unit=unit)))

    assert units("file") == [("t.txt", path.read_text())]
    assert units("paragraph") == [("t.txt:1", "one\ntwo\n"), ("t.txt:5", "three\n"), ("t.txt:7", "four")]
    assert [d.text.strip() for d in units("line")] == ["one", "two", "three", "four"]
    assert [d.name for d in units("line")] == ["t.txt:1", "t.txt:2", "t.txt:5", "t.txt:7"]


def test_blank_documents_and_files_that_are_not_text_are_counted(tmp_path):
    (tmp_path / "a.py").write_text("x")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "white.py").write_text(" \n\u00a0")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    tally = Tally()
    assert [d.name for d in documents.read_documents(str(tmp_path), tally=tally)] == ["a.py"]
    assert tally.warning == "2 blank, 1 not UTF-8 (the first: latin.txt)"


def test_documents_that_are_cut_to_the_same_text_are_on_the_same_side(tmp_path):
    rows = [{"text": f"{i % 50:04d}" + "x" * i} for i in range(200)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    sides = [
        {d.text for d in documents.read_documents(path, split, held_out_frac=0.3, reading=Reading(max_chars=4))}
        for split in ("train", "held_out")
    ]
    assert all(sides)
    assert sides[0].isdisjoint(sides[1])


def test_what_is_read_beside_pylib_takes_its_sides(tmp_path):
    """A copy of the library in a folder: no held-out text of the one is a training text of the other."""
    files = pylib.documents("held_out")[:15] + pylib.documents("train")[:15]
    for i, document in enumerate(files):
        (tmp_path / f"{i:02d}.py").write_text(document.text, "utf-8", newline="\n")
    sides = documents.pylib_sides()
    beside = {d.name for d in documents.read_documents(str(tmp_path), "held_out", sides=sides)}
    assert beside == {f"{i:02d}.py" for i in range(15)}


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets")


def test_a_data_set_saved_to_disk(tmp_path, datasets):
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "id": ["x", "y"]})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "two"))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert (
        list(documents.read_documents(one)) == list(documents.read_documents(f"hf:{one}")) == [("x", "a"), ("y", "b")]
    )
    assert [d.text for d in documents.read_documents(two)] == ["a", "b"]
    assert [d.text for d in documents.read_documents(f"hf:{two}:test")] == ["b"]
    for spec, says in ((f"hf:{two}:dev", "has train, test"), (f"hf:{one}:test", "without splits")):
        with pytest.raises(CosaeError, match=says):
            documents.read_documents(spec)


def test_a_local_folder_is_streamed_through_datasets(tmp_path, datasets, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": "a"}, {"text": "b"}])
    write_jsonl(tmp_path / "set" / "test.jsonl", [{"text": "c"}])
    spec = f"hf:{tmp_path / 'set'}"
    assert [d.text for d in documents.read_documents(spec)] == ["a", "b"]
    assert [d.text for d in documents.read_documents(f"{spec}:test")] == ["c"]
    with pytest.raises(CosaeError, match="cannot be opened"):
        documents.read_documents(f"{spec}:dev")


def test_a_data_set_that_raises_is_one_sentence_naming_the_row(monkeypatch):
    def rows():
        yield {"text": "a"}
        raise ConnectionError("the line went dead\nat noon")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: rows()))
    with pytest.raises(CosaeError, match=r"'hf:org/set' .*row 1.*line went dead") as caught:
        list(documents.read_documents("hf:org/set"))
    assert "\n" not in str(caught.value)


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
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.jsonl", b"", "at least one document"),
        ("a.jsonl", b'{"text": " \\n\\t"}\n{"text": ""}', "2 documents, .*2 blank"),
        ("a.txt", b" \n\t \n", "none with text"),
        ("a.txt", b"", "none with text"),
        ("a.parquet", b"x", "Parquet"),
        ("a.parquet", b"PAR1" + bytes(40) + b"PAR1", "Parquet"),
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
