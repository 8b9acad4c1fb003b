"""The pages as plain files: complete, the same values, nothing that needs a server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow", reason="the extra browse is not installed")

from cosae.browse.server import views, write_static
from cosae.browse.server.shell import ASSETS, PAGES
from cosae.browse.store.reader import FeatureStore, open_store
from cosae.errors import CosaeError
from tests.support.feature_stores import write_store

NAMES = ("</script><b>", "a/b")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureStore]:
    found = open_store(write_store(tmp_path_factory.mktemp("static") / "store", 70, NAMES))
    yield found
    found.close()


@pytest.fixture(scope="module")
def site(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_static(store, tmp_path_factory.mktemp("out") / "site")


def piece(site: Path, key: str) -> Any:
    text = (site / "data" / f"{key}.js").read_text("utf-8")
    found = re.fullmatch(r'cosae\.put\("([\w/-]+)",(.*)\);\n', text, re.DOTALL)
    assert found is not None
    assert found[1] == key
    return json.loads(found[2])


def test_every_piece_of_data_is_there_and_is_what_the_server_would_send(site: Path, store: FeatureStore) -> None:
    assert piece(site, "about") == json.loads(json.dumps(views.about(store)))
    for at, name in enumerate(NAMES):
        table = piece(site, f"table/{at}")
        assert table["id"] == list(range(70))
        assert table["density"] == pytest.approx(store.columns(name)["density"].tolist(), rel=1e-6)
        shards = [piece(site, f"feature/{at}/{shard}") for shard in (0, 1)]
        assert [len(shard) for shard in shards] == [64, 6]
        for id in (0, 63, 64, 69):
            sent = json.loads(json.dumps(views.feature(store, store.feature(name, id))))
            assert shards[id // 64][str(id)] == sent
    pairs = store.compare_saes(*NAMES).shared
    assert [pair[:2] for pair in piece(site, "compare/0-1")["shared"]] == [list(pair[:2]) for pair in pairs]
    turned = {(two, one) for one, two, *_ in piece(site, "compare/1-0")["shared"]}
    assert turned == {tuple(pair[:2]) for pair in pairs}


def test_pages_name_only_files_beside_them(site: Path) -> None:
    assert {path.name for path in site.iterdir()} == {"assets", "data", *(f"{page}.html" for page in PAGES)}
    assert {path.name for path in (site / "assets").iterdir()} == set(ASSETS)
    for page in PAGES:
        html = (site / f"{page}.html").read_text("utf-8")
        assert 'data-live="no"' in html
        assert "Content-Security-Policy" in html
        assert NAMES[0] not in html
        for link in re.findall(r'(?:src|href)="([^"#]+)"', html):
            assert (site / link).is_file(), link


def test_a_folder_of_others_is_left_alone_and_an_own_one_replaced(store: FeatureStore, tmp_path: Path) -> None:
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("important")
    with pytest.raises(CosaeError, match="not empty"):
        write_static(store, other)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    own = write_static(store, tmp_path / "site")
    (own / "data" / "stale.js").write_text("")
    write_static(store, own)
    assert not (own / "data" / "stale.js").exists()
