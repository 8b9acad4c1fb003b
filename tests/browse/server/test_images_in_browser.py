"""Features of a vision model: top images with their patches tinted, in Chromium, on the server and from disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("uvicorn", reason="the extra browse is not installed")
pytest.importorskip("transformers", reason="the extra lm is not installed")

import cosae
from cosae.browse.server import write_static
from cosae.browse.server.app import application
from cosae.browse.server.notes import Notes
from cosae.browse.store.reader import FeatureStore, open_store
from cosae.run.explore.browse import prepare
from cosae.run.requests import BrowseRequest
from cosae.sae.calibrate import calibrate
from cosae.sae.file import save
from tests.support.browser import browser, server, shown, watched

DATA = {"model": "embedded-vision", "corpus": "digits", "inputs": "images", "site": "resid_post.2"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureStore]:
    """Of an SAE that was not trained, on a few hundred images."""
    place = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(400, 64, generator=generator)
    sae = cosae.SAE.build(d_in=64, d_sae=24, score="cosine", selector="topk", k=3, seed=0, sample=sample)
    calibrate(sae, sample)
    sae.metadata.update({**DATA, "recipe": {"data": DATA}})
    save(sae, place / "sae")
    found = open_store(prepare([place / "sae"], BrowseRequest(tokens=4000), out=place / "store"))
    yield found
    found.close()


def test_a_store_of_images_knows_where_places_lie_and_what_they_show(store: FeatureStore) -> None:
    assert store.read.layout is not None
    assert store.read.layout.grid == (4, 4)
    assert store.read.window == 17
    name = store.saes[0].name
    fires = int(store.columns(name)["firings"].argmax())
    one = store.feature(name, fires).examples[0]
    assert len(one.ids_W) == 17
    assert [store.spell(int(token)) for token in one.ids_W[:3]] == ["class token", "row 0, column 0", "row 0, column 1"]
    assert one.document is not None
    assert one.document.startswith("digit ")
    picture = store.picture(one.sequence)
    assert picture is not None
    assert picture.startswith(b"\x89PNG")
    assert store.picture(10**6) is None


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_patches_are_tinted_and_told(store: FeatureStore, tmp_path: Path, width: int) -> None:
    name = store.saes[0].name
    fires = int(store.columns(name)["firings"].argmax())
    disk = write_static(store, tmp_path / "site").as_uri()
    with browser() as chromium, server(application(store, Notes(tmp_path / "notes"))) as site:
        for address in (site, f"{disk}/"):
            with watched(chromium, width) as page:
                shown(page, f"{address}feature.html?sae={name}&id={fires}")
                bottom = page.eval_on_selector(".picture", "one => one.getBoundingClientRect().bottom")
                assert width > 400 or bottom < 850, "a phone's first screen shows pictures"
                check_pictures(page)


def check_pictures(page: Any) -> None:
    pictures = page.locator(".picture")
    assert pictures.count() > 3
    assert pictures.first.locator(".patches .token").count() == 16
    assert pictures.first.locator(".specials .token").count() == 1
    assert page.eval_on_selector(".picture img", "image => image.naturalWidth") == 8
    here = pictures.first.locator(".here")
    assert "t" in (here.get_attribute("class") or "")
    corner = pictures.first.locator(".patches .token").first
    corner.hover()
    assert "row 0, column 0" in page.locator(".example output").first.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
