"""Trying a text and steering, in Chromium, over the real server, with a real model behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra browse is not installed")
pytest.importorskip("pyarrow", reason="the extra browse is not installed")

from cosae.browse.server.app import application
from cosae.browse.server.notes import Notes
from cosae.browse.store.reader import open_store
from cosae.models.embedded import load
from cosae.run.explore.browse import prepare
from cosae.run.explore.live import LiveModel, live_model
from cosae.run.explore.steer import steer
from cosae.run.requests import BrowseRequest, Place, SteerOptions
from cosae.sae.calibrate import calibrate
from cosae.sae.file import save
from cosae.sae.model import SAE
from tests.support.browser import browser, server, shown, watched

pytestmark = pytest.mark.browser
TEXT = "def f(x):\n    return x + 1\n"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, LiveModel, Path]]:
    folder = tmp_path_factory.mktemp("live")
    (folder / "corpus").mkdir()
    for i in range(6):
        (folder / "corpus" / f"{i}.py").write_text(TEXT.replace("f", f"f{i}") * 12)
    model, tokenizer = load()
    ids = tokenizer(TEXT * 8, return_tensors="pt", add_special_tokens=False)["input_ids"]
    x_ND = model(ids, output_hidden_states=True).hidden_states[4][0].detach()
    for name, seed in (("one", 0), ("two", 1)):
        sae = SAE.build(192, 48, "cosine", k=6, seed=seed, sample=x_ND)
        calibrate(sae, x_ND)
        sae.metadata = {"model": "embedded", "site": "resid_post.3"}
        save(sae, folder / "run" / "arms" / name)
    request = BrowseRequest(corpus=str(folder / "corpus"), context=32, tokens=400)
    store = open_store(prepare([folder / "run"], request))
    model_of = live_model(store, request)
    assert model_of is not None
    with server(application(store, Notes(folder / "notes"), model_of)) as address:
        yield address, model_of, folder / "run" / "arms"
    store.close()


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)], ids=["laptop", "phone"])
def test_a_text_is_read_and_a_feature_steered(live: tuple[str, LiveModel, Path], width: int, dark: bool) -> None:
    address, model, arms = live
    with browser() as chromium, watched(chromium, width, dark) as page:
        shown(page, f"{address}try.html?sae=two&id=5")
        page.fill("#reading textarea", TEXT)
        page.click("#reading button")
        page.wait_for_selector("section.of-sae")
        direct: dict[str, Any] = model.activations(TEXT)
        for number, one in enumerate(direct["saes"]):
            section = page.locator("section.of-sae").nth(number)
            assert section.get_attribute("data-sae") == one["name"]
            assert section.locator(".text .token").count() == len(direct["tokens"])
            assert section.locator(".text .token.sink").count() == sum(token["sink"] for token in direct["tokens"])
            token = max(entry[0] for entry in one["entries"])
            section.locator(".text .token").nth(token).click()
            values = section.locator(".detail td:nth-of-type(1) [data-value]")
            seen = [float(value.get_attribute("data-value") or 0) for value in values.all()]
            mine = sorted((entry[2] for entry in one["entries"] if entry[0] == token), key=abs, reverse=True)
            assert seen == pytest.approx(mine[:12], rel=1e-5)
        page.fill("#steering textarea", "def f(")
        page.fill("[name=amount]", "40")
        page.fill("[name=new_tokens]", "6")
        page.click("#steering button")
        page.wait_for_selector("[data-text=changed]")
        found = steer(arms / "two", "def f(", Place(), SteerOptions((5,), add=40.0, new_tokens=6))
        assert page.text_content("[data-text=without]") == found.without
        assert page.text_content("[data-text=changed]") == found.changed
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.locator("#reading textarea").bounding_box()
        assert box["width"] > 0.9 * page.locator("main").bounding_box()["width"]


def test_a_feature_that_is_not_there_is_said_on_the_page(live: tuple[str, LiveModel, Path]) -> None:
    with browser() as chromium, chromium.new_context() as context:  # the browser itself reports a refused request
        page = shown(context.new_page(), f"{live[0]}try.html?sae=two&id=48")
        page.click("#steering button")
        page.wait_for_selector("#steered .warn")
        assert "48" in page.inner_text("#steered .warn")
