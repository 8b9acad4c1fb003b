"""The site over HTTP, without a browser: what it answers, what it refuses, and that its numbers are the store's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the extra browse is not installed")
pytest.importorskip("pyarrow", reason="the extra browse is not installed")

from starlette.testclient import TestClient

from cosae.browse.server.app import application
from cosae.browse.server.notes import Notes
from cosae.browse.server.shell import ASSETS, PAGES
from cosae.browse.store.reader import FeatureStore, open_store
from tests.support.feature_stores import HOSTILE, write_store

OURS = "http://127.0.0.1:8321"
EVIL = "<img src=x onerror=alert(1)>/../../cosine"
"""A name of an SAE."""
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureStore]:
    found = open_store(write_store(tmp_path_factory.mktemp("pages") / "store", 200, ("standard", EVIL)))
    yield found
    found.close()


class StandIn:
    """A model that says what it was asked."""

    def activations(self, text: str) -> dict[str, Any]:
        return {"tokens": [{"text": text, "norm": float("nan"), "sink": True}], "saes": []}

    def steer(self, given: Any) -> dict[str, Any]:
        return {"what": str(given["feature"]), "without": "a", "changed": "b", "notes": []}


@pytest.fixture
def site(store: FeatureStore, tmp_path: Path) -> TestClient:
    return TestClient(application(store, Notes(tmp_path / "notes.sqlite"), StandIn()), base_url=OURS)


def got(site: TestClient, path: str, **words: Any) -> Any:
    answer = site.get(f"/data/{path}", params=words)
    assert answer.status_code == 200, answer.text
    return answer.json()


def sent(site: TestClient, path: str, value: Any, **headers: str) -> Any:
    return site.post(f"/data/{path}", content=json.dumps(value), headers=JSON | {"Origin": OURS} | headers)


@pytest.mark.parametrize("page", ["", *(f"{name}.html" for name in PAGES)])
def test_every_page_is_escaped_and_forbids_what_is_not_ours(page: str, site: TestClient) -> None:
    answer = site.get(f"/{page}")
    assert answer.status_code == 200
    assert EVIL not in answer.text
    assert "&lt;img src=x" in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "*" not in policy
    assert re.findall(r"<(?:script|style)(?![^>]* src=)[^>]*>|<[^>]*\s(?:style|on\w+)=", answer.text) == []
    linked = re.findall(r'(?:src|href)="([^"#]+)"', answer.text)
    assert len(linked) > 10
    assert [link for link in linked if site.get(f"/{link}").status_code != 200] == []


def test_the_files_are_known_ones_and_ask_no_other_machine(site: TestClient) -> None:
    for name in ASSETS:
        answer = site.get(f"/assets/{name}")
        assert answer.status_code == 200
        assert set(re.findall(r"https?://[\w./-]+", answer.text)) <= {"http://www.w3.org/2000/svg"}
        assert "innerHTML" not in answer.text, "text enters a page through textContent alone"
    for path in (
        "assets/../app.py",
        "assets/..%2fapp.py",
        "assets/%2e%2e/%2e%2e/etc/passwd",
        "assets/core.py",
        "x.html",
    ):
        assert site.get(f"/{path}").status_code == 404, path


def test_numbers_are_those_of_the_store(site: TestClient, store: FeatureStore) -> None:
    columns = store.columns(EVIL)
    rows = got(site, "table", sae=EVIL, sort="largest", limit=500)["rows"]
    assert [row["id"] for row in rows[:20]] == np.argsort(-columns["largest"])[:20].tolist()
    for row in rows[:-1]:
        for name in ("density", "largest", "norm_driven", "auroc"):
            assert row[name] == pytest.approx(columns[name][row["id"]], rel=1e-6)
    assert rows[-1]["largest"] is None, "the dead one comes last"
    scatter = got(site, "scatter", sae=EVIL, x="density", y="auroc")
    np.testing.assert_allclose(scatter["x"], columns["density"], rtol=1e-3)
    feature, direct = got(site, "feature", sae=EVIL, id=7), store.feature(EVIL, 7)
    assert [one["value"] for one in feature["examples"]] == [
        pytest.approx(one.value_W.tolist(), rel=1e-6) for one in direct.examples
    ]
    assert [pair[1] for pair in feature["promoted"]] == pytest.approx([pair[1] for pair in direct.promoted], rel=1e-6)
    assert feature["matches"][0]["id"] == direct.matches[0].id
    compared, pairs = got(site, "compare", a="standard", b=EVIL), store.compare_saes("standard", EVIL)
    assert [pair[:2] for pair in compared["shared"]] == [list(pair[:2]) for pair in pairs.shared]
    assert (compared["n_own_a"], compared["n_own_b"]) == (len(pairs.own_a), len(pairs.own_b))


def test_the_table_is_paged_filtered_and_searched(site: TestClient, store: FeatureStore) -> None:
    everything = got(site, "table", sae="standard", sort="id", order="up", limit=500)
    assert everything["total"] == len(everything["rows"]) == 200
    second = got(site, "table", sae="standard", sort="id", order="up", offset=50, limit=25)
    assert [row["id"] for row in second["rows"]] == list(range(50, 75))
    assert got(site, "table", sae="standard", dead="yes")["total"] == 1
    some = got(site, "table", sae="standard", least_density=0.01, most_density=0.1, matched_any="yes", limit=500)[
        "rows"
    ]
    assert 0 < len(some) < 200
    assert all(0.01 <= row["density"] <= 0.1 and row["matched"] for row in some)
    assert [row["id"] for row in got(site, "table", sae="standard", q="17", **{"in": "id"})["rows"]] == [17]
    found = got(site, "table", sae="standard", q="WORD42", **{"in": "token"}, limit=500)["rows"]
    assert found
    assert all(any("word42" in token for token in row["tokens"]) for row in found)


def test_hostile_tokens_arrive_as_text_and_long_ones_cut(site: TestClient) -> None:
    rows = got(site, "table", sae="standard", limit=500)["rows"]
    tokens = {token for row in rows for token in row["tokens"]}
    assert {HOSTILE[0], HOSTILE[3]} <= tokens
    assert max(map(len, tokens)) < 250
    assert any("10,000 characters" in token for token in tokens)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("table", {}),
        ("table", {"sae": "nobody"}),
        ("table", {"sae": "standard", "sort": "density; DROP"}),
        ("table", {"sae": "standard", "limit": "x"}),
        ("table", {"sae": "standard", "offset": "-1"}),
        ("table", {"sae": "standard", "least_density": "many"}),
        ("table", {"sae": "standard", "least_nothing": "1"}),
        ("scatter", {"sae": "standard", "x": "tokens"}),
        ("feature", {"sae": "standard", "id": "../../etc/passwd"}),
        ("feature", {"sae": "standard", "id": "200"}),
        ("feature", {"sae": "standard", "id": "-1"}),
        ("feature", {"sae": "standard", "id": "٣"}),
        ("feature", {"sae": "../store", "id": "1"}),
        ("compare", {"a": "standard", "b": "standard"}),
    ],
)
def test_a_mistake_is_one_sentence(path: str, words: dict[str, str], site: TestClient) -> None:
    answer = site.get(f"/data/{path}", params=words)
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}
    assert len(answer.json()["error"]) > 10


def test_only_our_own_address_is_answered(site: TestClient, store: FeatureStore, tmp_path: Path) -> None:
    for host in (
        "evil.example",
        "evil.example:8321",
        "127.0.0.1.evil.example",
        "10.0.0.7",
        "",
        "[::1",
        "localhost.evil",
    ):
        assert site.get("/data/about", headers={"Host": host}).status_code == 421, host
    for host in ("localhost", "localhost:1", "127.0.0.1", "[::1]:8321"):
        assert site.get("/data/about", headers={"Host": host}).status_code == 200, host
    wide = TestClient(application(store, Notes(tmp_path / "n"), host="0.0.0.0"), base_url="http://10.0.0.7:8321")
    assert wide.get("/data/about").status_code == 200
    assert wide.get("/data/about", headers={"Host": "evil.example"}).status_code == 421


def test_no_other_page_can_write(site: TestClient) -> None:
    note = {"sae": "standard", "feature": 1, "note": "hello"}
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}):
        assert sent(site, "note", note, **headers).status_code == 403
    assert sent(site, "note", note, **{"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert sent(site, "note", note, **{"Content-Type": "text/plain"}).status_code == 415
    assert site.put("/data/note", content="{}").status_code == 405
    assert got(site, "about")["notes"] == []
    assert sent(site, "note", note).json()["version"] == 1


def test_notes_are_kept_exported_and_not_overwritten(site: TestClient) -> None:
    note = {"sae": EVIL, "feature": 7, "note": "<b>\u202e", "tags": [" x ", "", "y"], "bookmark": True, "version": 0}
    assert sent(site, "note", note).json() == {
        "note": "<b>\u202e", "tags": ["x", "y"], "bookmark": True, "version": 1,
        "changed": got(site, "feature", sae=EVIL, id=7)["note"]["changed"],
    }  # fmt: skip
    second = sent(site, "note", note)
    assert second.status_code == 409
    assert second.json()["note"]["version"] == 1
    row = got(site, "table", sae=EVIL, q="7", **{"in": "id"})["rows"][0]
    assert (row["bookmark"], row["tags"]) == (True, ["x", "y"])
    saved = site.get("/data/notes.json")
    assert "attachment" in saved.headers["content-disposition"]
    assert saved.json()["notes"][0]["sae"] == EVIL


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"sae": "standard"},
        {"sae": "standard", "feature": 200},
        {"sae": "standard", "feature": True},
        {"sae": "standard", "feature": "1"},
        {"sae": "nobody", "feature": 1},
        {"sae": "standard", "feature": 1, "note": 5},
        {"sae": "standard", "feature": 1, "note": "\ud800"},
        {"sae": "standard", "feature": 1, "tags": "x"},
        {"sae": "standard", "feature": 1, "tags": ["x" * 100]},
        {"sae": "standard", "feature": 1, "version": "0"},
    ],
)
def test_a_wrong_note_is_refused_in_a_sentence(value: Any, site: TestClient) -> None:
    answer = sent(site, "note", value)
    assert answer.status_code == 400
    assert answer.json()["error"]
    assert got(site, "about")["notes"] == []


def test_too_much_and_no_json_are_refused(site: TestClient) -> None:
    assert sent(site, "note", {"note": "x" * 2**20}).status_code == 413
    assert site.post("/data/note", content="{", headers=JSON).status_code == 400
    assert site.post("/data/note", content="[" * 100_000, headers=JSON).status_code == 400
    assert sent(site, "about", {}).status_code == 404
    assert site.get("/data/note").status_code == 404


def test_a_text_is_tried_where_a_model_is_at_hand(site: TestClient, store: FeatureStore, tmp_path: Path) -> None:
    assert sent(site, "activations", {"text": "abc"}).json()["tokens"] == [{"text": "abc", "norm": None, "sink": True}]
    assert sent(site, "steer", {"feature": 4}).json()["what"] == "4"
    alone = TestClient(application(store, Notes(tmp_path / "n")), base_url=OURS)
    assert not got(alone, "about")["live"]
    assert "no model" in sent(alone, "activations", {"text": "abc"}).json()["error"].lower()
