"""Labelled texts from any file or data set with a text and a label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from cosae.errors import CosaeError
from cosae.text.labelled import LabelledTexts, read_labelled

ROWS = [{"text": "a good film", "label": "pos"}, {"text": "dull", "label": "neg"}, {"text": "fine", "label": "pos"}]


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return str(path)


def test_every_kind_of_file_says_the_same(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = read_labelled(written(tmp_path / "films.jsonl", ROWS))
    parquet.write_table(pa.Table.from_pylist([{**row, "more": 1} for row in ROWS]), tmp_path / "films.parquet")
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "films"))
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "both"))
    assert (one.name, one.classes, one.class_N.tolist()) == ("films", ("neg", "pos"), [1, 0, 1])
    for other in ("films.parquet", "films", "both"):
        found = read_labelled(str(tmp_path / other))
        assert (found.texts, found.classes, found.class_N.tolist()) == (one.texts, one.classes, [1, 0, 1])


def test_columns_are_named_and_numbers_sort_by_size(tmp_path: Path) -> None:
    rows = [{"review": "x", "stars": s, "sure": s > 5} for s in (10, 2, 10, 1)]
    path = written(tmp_path / "r.jsonl", rows)
    assert read_labelled(path, text="review", label="stars").classes == ("1", "2", "10")
    assert read_labelled(path, text="review", label="sure").classes == ("False", "True")
    assert len(read_labelled(path, text="review", label="stars", n_rows=2)) == 2


@given(st.lists(st.tuples(st.text(), st.sampled_from(["x", "y", "z"])), min_size=1, max_size=20))
def test_labels_come_back_as_they_went_in(pairs: list[tuple[str, str]]) -> None:
    labels = [label for _, label in pairs]
    if len(set(labels)) < 2:
        with pytest.raises(CosaeError, match="between 2 and"):
            LabelledTexts.of("set", [t for t, _ in pairs], labels)
        return
    one = LabelledTexts.of("set", [t for t, _ in pairs], labels)
    assert [one.classes[c] for c in one.class_N] == labels


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"text": "a"}], "its class under 'label'"),
        (["a"], "Got str at"),
        ([{"text": 3, "label": 1}], "must be a string. Got int"),
        ([{"text": "a", "label": 0.5}], "must be strings, whole numbers"),
        ([{"text": "a", "label": None}], "must be strings, whole numbers"),
        ([{"text": "a", "label": 1}], "between 2 and 200 different labels"),
    ],
)
def test_what_is_no_labelled_set_is_named(tmp_path: Path, rows: list[Any], sentence: str) -> None:
    with pytest.raises(CosaeError, match=sentence):
        read_labelled(written(tmp_path / "r.jsonl", rows))


def test_places_that_hold_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "bad.jsonl").write_text("{")
    parquet.write_table(pa.table({"body": ["a"], "label": [1]}), tmp_path / "other.parquet")
    for name, sentence in {
        "absent.jsonl": "must be an existing",
        "empty": "written by datasets' save_to_disk",
        "bad.parquet": "whole Parquet file",
        "bad.jsonl": "must be JSON",
        "other.parquet": "body.*label",
    }.items():
        with pytest.raises(CosaeError, match=sentence):
            read_labelled(str(tmp_path / name))
