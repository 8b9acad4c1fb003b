"""The reader of feature stores, on synthetic ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cosae.browse.store.reader import FeatureStore, open_store
from cosae.browse.store.records import GROUPS, NUMBERS
from cosae.errors import CosaeError
from tests.support.feature_stores import HOSTILE, write_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("features") / "store", 40, words=40, signed=True)


@pytest.fixture
def store(folder: Path) -> FeatureStore:
    return open_store(folder)


@pytest.mark.parametrize("sort", NUMBERS)
def test_rows_are_sorted_and_those_without_a_number_come_last(store: FeatureStore, sort: str) -> None:
    columns = store.columns("cosine")
    for descending in (True, False):
        rows = store.table("cosine", sort, descending, limit=100).rows
        value = np.array([columns[sort][row.id] for row in rows])
        known = value[: np.isfinite(value).sum()]
        assert len(rows) == 40
        assert np.isfinite(known).all()
        assert (np.diff(known) * (-1 if descending else 1) >= 0).all()


def test_pages_of_a_table_are_the_table(store: FeatureStore) -> None:
    whole = store.table("standard", "largest", limit=100)
    parts = [store.table("standard", "largest", offset=first, limit=7).rows for first in range(0, 40, 7)]
    assert sum(parts, ()) == whole.rows
    assert whole.total == 40


def test_filters_and_searches_keep_what_they_say(store: FeatureStore) -> None:
    dead = store.table("cosine", filters={"dead": True})
    assert [row.id for row in dead.rows] == [0]
    driven = store.table("cosine", filters={"norm_driven": (0.5, None), "matched_any": True}, limit=100).rows
    assert driven
    assert all(row.norm_driven is not None and row.norm_driven >= 0.5 and row.matched for row in driven)
    assert {row.id for row in store.table("cosine", filters={"explained": True}).rows} == {1, 2, 3, 4}
    by_token = store.table("cosine", search="SCRIPT", search_in="token", limit=100).rows
    assert all(0 in row.tokens for row in by_token)
    assert len(by_token) == sum(0 in row.tokens for row in store.table("cosine", limit=100).rows) > 0
    assert [row.id for row in store.table("cosine", search="begin with 3").rows] == [3]
    assert {row.concept for row in store.table("cosine", search="comma", search_in="concept").rows} == {"comma"}
    assert [row.id for row in store.table("cosine", search="17", search_in="id").rows] == [17]


@pytest.mark.parametrize(
    "wrong",
    [{"sort": "../x"}, {"filters": {"path": (0, 1)}}, {"filters": {"dead": (0, 1)}}, {"offset": -1}, {"limit": 0}],
)
def test_what_is_not_there_is_refused(store: FeatureStore, wrong: dict[str, object]) -> None:
    with pytest.raises(CosaeError):
        store.table("cosine", **wrong)  # type: ignore[arg-type]


def test_unknown_saes_and_features_are_refused(store: FeatureStore) -> None:
    with pytest.raises(CosaeError, match="choose from standard, cosine"):
        store.feature("../cosine", 1)
    for id in (-1, 40, True):
        with pytest.raises(CosaeError, match="out of range"):
            store.feature("cosine", id)


def test_a_feature_has_its_groups_neighbours_and_matches(store: FeatureStore) -> None:
    feature = store.feature("cosine", 20)
    assert [one.group for one in feature.examples] == sorted((one.group for one in feature.examples), key=GROUPS.index)
    assert all(feature.group(group) for group in GROUPS)
    assert feature.row.largest == pytest.approx(max(abs(one.value) for one in feature.examples), rel=1e-6)
    assert sum(feature.counts) == feature.row.firings
    assert [(one.sae, one.id) for one in feature.matches] == [("standard", 20)]
    assert [one.id for one in feature.by_cosine] == list(range(21, 29))
    assert store.feature("cosine", 21).matches[0].id is None
    dead = store.feature("cosine", 0)
    assert (dead.examples, dead.row.largest, dead.quantiles, dead.counts) == ((), None, None, ())


def test_tokens_are_spelled_as_they_are(store: FeatureStore) -> None:
    assert [store.spell(i) for i in range(len(HOSTILE))] == list(HOSTILE)
    assert store.spell(-1) == ""


def test_comparisons(store: FeatureStore) -> None:
    pair = store.compare("standard", 4, "cosine", 4)
    assert pair.correlation == pair.a.matches[0].correlation
    assert pair.texts
    assert all(len(one.a_W) == len(one.b_W) == len(one.ids_W) for one in pair.texts)
    both = store.compare_saes("standard", "cosine")
    often = {row.id for row in store.table("standard", limit=100).rows if row.firings >= 10}
    assert {a for a, *_ in both.shared} | set(both.own_a) == often | {a for a, *_ in both.shared}
    assert [name for name, *_ in both.concepts]
    with pytest.raises(CosaeError, match="twice"):
        store.compare_saes("cosine", "cosine")


def test_damage_is_noticed(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", 20)
    place = folder / "sae0" / "examples-0.parquet"
    data = bytearray(place.read_bytes())
    data[300] ^= 1
    place.write_bytes(data)
    store = open_store(folder)
    with pytest.raises(CosaeError, match="damaged"):
        store.verify()
    with pytest.raises(CosaeError, match="damaged"):
        store.feature("standard", 1)
    place.write_bytes(data[:-5])
    with pytest.raises(CosaeError, match="damaged"):
        open_store(folder)
    with pytest.raises(CosaeError, match="no feature store"):
        open_store(tmp_path)
