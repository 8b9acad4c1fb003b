"""The feature browser as a person uses it: Chromium on the real server, and on the plain files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the extra browse is not installed")
pytest.importorskip("pyarrow", reason="the extra browse is not installed")

from cosae.browse.server import write_static
from cosae.browse.server.app import application
from cosae.browse.server.notes import Notes
from cosae.browse.server.shell import PAGES
from cosae.browse.store.reader import FeatureStore, open_store
from tests.support.browser import accessibility, axe_core, browser, server, shown, watched
from tests.support.feature_stores import HOSTILE, write_store

pytestmark = pytest.mark.browser

EVIL = "<img src=x onerror=alert(1)>/b"
"""A name of an SAE."""
SAES = ("standard", EVIL)
SOME = {"index": "", "features": "", "feature": "?sae=standard&id=4", "compare": "", "score": "?id=4", "try": ""}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureStore]:
    found = open_store(write_store(tmp_path_factory.mktemp("browser") / "store", 130, SAES))
    yield found
    found.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def site(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(application(store, Notes(tmp_path_factory.mktemp("notes") / "notes"))) as address:
        yield address


@pytest.fixture(scope="module")
def disk(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"{write_static(store, tmp_path_factory.mktemp('disk') / 'site').as_uri()}/"


def numbers(page: Any, selector: str) -> list[float]:
    """The exact values that elements of the page keep."""
    found = page.eval_on_selector_all(selector, "all => all.map(one => one.dataset.value)")
    return [float(value) for value in found]


@pytest.mark.parametrize("where", ["site", "disk"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)], ids=["laptop", "phone"])
def test_every_page_is_drawn_without_an_error(
    where: str, width: int, dark: bool, chromium: Any, request: pytest.FixtureRequest
) -> None:
    address = request.getfixturevalue(where)
    with watched(chromium, width, dark) as page:
        for name in PAGES:
            shown(page, f"{address}{name}.html{SOME[name]}")
            assert page.locator("main .warn").count() == (name == "try"), name
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            assert page.evaluate("typeof window.alerted") == "undefined"
            sizes = page.evaluate(
                """[...document.querySelectorAll("svg text")].map((text) => {
                  const drawn = text.closest("svg");
                  return parseFloat(getComputedStyle(text).fontSize) * drawn.getBoundingClientRect().width
                    / drawn.viewBox.baseVal.width;
                })"""
            )
            assert min(sizes, default=12) >= 9, name


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_serious(dark: bool, site: str, chromium: Any) -> None:
    script = axe_core()
    with watched(chromium, dark=dark) as page:
        for name in PAGES:
            shown(page, f"{site}{name}.html{SOME[name]}")
            page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true;")
            assert accessibility(page, script) == [], name


@pytest.mark.parametrize("where", ["site", "disk"])
def test_the_table_sorts_filters_searches_and_turns_pages(
    where: str, chromium: Any, store: FeatureStore, request: pytest.FixtureRequest
) -> None:
    address, columns = request.getfixturevalue(where), store.columns("standard")

    def rows(page: Any) -> list[int]:
        page.wait_for_selector("main[data-drawn]")
        return [int(i) for i in page.eval_on_selector_all("tr[data-id]", "all => all.map(one => one.dataset.id)")]

    with watched(chromium) as page:
        shown(page, f"{address}features.html")
        order = np.argsort(-columns["density"], kind="stable")
        assert rows(page) == order[:50].tolist()
        first = int(order[0])
        for name in ("density", "largest", "norm_driven", "firing_norm", "auroc"):
            shown_value = numbers(page, f"tr[data-id='{first}'] td[data-column={name}] [data-value]")[0]
            assert shown_value == pytest.approx(columns[name][first], rel=1e-6)
        page.click("th >> text=norm-driven share")
        assert rows(page) == np.argsort(-np.nan_to_num(columns["norm_driven"], nan=-1), kind="stable")[:50].tolist()
        page.click("th >> text=norm-driven share")
        assert rows(page)[0] == int(np.nanargmin(columns["norm_driven"]))
        assert page.get_attribute("th:has-text('norm-driven share')", "aria-sort") == "ascending"
        page.click("nav[aria-label='Pages of the table'] >> text=last")
        assert rows(page)[-1] == 0, "the dead feature has no such number and comes last"
        page.click("summary:has-text('Filters')")
        page.fill("[name=least_density]", "0.01")
        page.fill("[name=most_density]", "0.2")
        page.click("button:has-text('Show')")
        found = rows(page)
        expected = np.flatnonzero((columns["density"] >= 0.01) & (columns["density"] <= 0.2))
        assert sorted(found) == expected.tolist()[:50] or set(found) <= set(expected.tolist())
        assert f"{len(expected)} of 130" in page.inner_text("caption")
        page.goto(f"{address}features.html?sae=standard&dead=yes")
        assert rows(page) == [0]
        assert "never fires" in page.inner_text("tr[data-id='0']")
        page.fill("[name=q]", "WORD7")
        page.select_option("[name=in]", "token")
        page.goto(f"{address}features.html?sae=standard&q=WORD7&in=token&limit=200")
        spelled = {id: store.row("standard", id).tokens for id in range(130)}
        hit = {id for id, tokens in spelled.items() if any("word7" in store.spell(t) for t in tokens)}
        assert set(rows(page)) == hit
        page.fill("[name=q]", "17")
        page.select_option("[name=in]", "id")
        page.press("[name=q]", "Enter")
        page.wait_for_url(re.compile("q=17"))
        assert rows(page) == [17]


def test_a_feature_shows_the_store_s_numbers(site: str, chromium: Any, store: FeatureStore) -> None:
    feature = store.feature(EVIL, 4)
    with watched(chromium) as page:
        shown(page, f"{site}feature.html?sae={EVIL}&id=4")
        tiles = numbers(page, "#numbers .tile b [data-value]")
        row = feature.row
        assert tiles == pytest.approx([row.density, row.largest, row.norm_driven, row.firing_norm, row.auroc], rel=1e-6)
        top = feature.group("top")
        assert numbers(page, "#examples .example") == pytest.approx([one.value for one in top], rel=1e-6)
        tokens = numbers(page, "#examples .example:first-child .token")
        assert tokens == pytest.approx(top[0].value_W.tolist(), rel=1e-6)
        logits = numbers(page, "table.logits [data-value]")
        assert logits == pytest.approx([value for _, value in (*feature.promoted, *feature.suppressed)], rel=1e-6)
        page.click("button[data-group=random]")
        values = [one.value for one in feature.group("random")]
        assert numbers(page, "#examples .example") == pytest.approx(values, rel=1e-6)
        page.click("button[data-group=interval]")
        assert page.locator("#examples h3").count() == 5


def test_a_token_tells_its_value_on_hover_and_by_keyboard(site: str, chromium: Any, store: FeatureStore) -> None:
    one = store.feature("standard", 4).group("top")[0]
    with watched(chromium) as page:
        shown(page, f"{site}feature.html?sae=standard&id=4")
        told = page.locator("#examples .example:first-child output.told")
        assert f"position {one.position}" in told.inner_text()
        page.locator("#examples .example:first-child .token").nth(0).hover()
        assert f"position {one.position - one.at}" in told.inner_text()
        page.locator("#examples .example:first-child .token[tabindex='0']").focus()
        page.keyboard.press("End")
        last = len(one.ids_W) - 1
        assert f"position {one.position - one.at + last}" in told.inner_text()
        assert f"{float(one.r_W[last]):.3g}"[:3] in told.inner_text()
        page.select_option("[name=around]", "4")
        assert page.locator("#examples .example:first-child .token").count() <= 9
        page.check("[name=breaks]")
        page.reload()
        page.wait_for_selector("main[data-drawn]")
        assert page.is_checked("[name=breaks]"), "the choice is kept"


def test_hostile_tokens_and_names_stay_text(site: str, disk: str, chromium: Any) -> None:
    with watched(chromium) as page:
        page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
        for address in (site, disk):
            shown(page, f"{address}features.html?sae={EVIL}&limit=200")
            text = page.inner_text("main")
            assert HOSTILE[0][:20] in text
            assert "\u202e" not in text
            assert "⟨202E⟩" in text
            assert "⟨0000⟩" in text
            assert page.locator("main script, main img").count() == 0
            assert max(map(len, page.locator(".piece").all_inner_texts())) < 60
            shown(page, f"{address}feature.html?sae={EVIL}&id=1")
            assert EVIL in page.inner_text("h1")
            assert page.locator("main script, main img, main b img").count() == 0


def test_two_saes_and_two_features_are_compared(site: str, chromium: Any, store: FeatureStore) -> None:
    with watched(chromium) as page:
        shown(page, f"{site}compare.html")
        pairs = store.compare_saes(*SAES).shared
        assert f"{len(pairs)} pairs" in page.inner_text("main")
        first = page.locator("table.shared tbody tr").first
        assert [float(v) for v in first.locator("[data-value]").all_inner_texts()] == pytest.approx(
            [round(pairs[0][2], 3), round(pairs[0][3], 3)], abs=1e-3
        )
        first.locator("text=compare").click()
        page.wait_for_selector("main[data-drawn]")
        match = next(one for one in store.feature("standard", pairs[0][0]).matches if one.sae == EVIL)
        assert f"{match.correlation:.3g}"[:4] in page.inner_text("#together")
        assert page.locator(".token.differs").count() > 0
        assert page.locator(".under").count() % 2 == 0


def test_the_slider_changes_who_fires_as_the_formula_says(site: str, chromium: Any, store: FeatureStore) -> None:
    feature, info = store.feature(EVIL, 4), store.sae(EVIL)
    places: dict[tuple[int, int], tuple[float, float, float]] = {}
    for one in feature.examples:
        for at in np.flatnonzero(one.counted_W):
            key = one.sequence, one.position - one.at + int(at)
            places.setdefault(key, (float(one.r_W[at]), float(one.kappa_W[at]), float(one.value_W[at])))
    r, kappa, value = np.array(list(places.values())).T
    with watched(chromium) as page:
        shown(page, f"{site}score.html?sae={EVIL}&id=4")
        before = page.locator("#order tbody th").all_inner_texts()
        curve = page.get_attribute("#cut", "d")
        for a in (0.0, 1.0):
            page.locator("#a").fill(str(a))
            score = np.exp(feature.log_gain) * info.median_r**feature.exponent * (r / info.median_r) ** a * kappa
            fires = score > np.sort(score)[::-1][int((value != 0).sum()) :][0]
            kept, new = int((fires & (value != 0)).sum()), int((fires & (value == 0)).sum())
            assert f"{kept} that fire now, {new} new ones" in page.inner_text("#outcome")
            assert page.locator("#order tbody th").all_inner_texts() != before
            assert page.get_attribute("#cut", "d") != curve
            highest = numbers(page, "#order tbody tr:first-child td:nth-of-type(3) [data-value]")[0]
            worth = r**0.25 * score  # the store's value exponent
            assert highest == pytest.approx(worth[fires | (value != 0)].max(), rel=1e-3)
        order = page.locator("#order tbody th").all_inner_texts()
        page.locator("#delta").fill("2")
        assert page.locator("#order tbody th").all_inner_texts() != order
        page.select_option("[name=rule]", "same")
        assert f"{int((score > feature.threshold).sum())} of {len(r)} tokens fire" in page.inner_text("#outcome")


def test_a_point_of_the_scatter_opens_its_feature(site: str, chromium: Any) -> None:
    with watched(chromium) as page:
        shown(page, f"{site}features.html?sae=standard")
        page.select_option("[name=y]", "auroc")
        page.locator(".scatter").focus()
        page.keyboard.press("ArrowRight")
        named = page.inner_text(".scatter + .told")
        assert "AUROC" in named
        page.keyboard.press("Enter")
        page.wait_for_url(re.compile("feature.html"))
        page.wait_for_selector("main[data-drawn]")
        found = re.search(r"feature (\d+)", named)
        assert found is not None
        assert page.inner_text("h1").startswith(f"Feature {found[1]} of standard")


def test_a_note_is_found_after_a_restart(chromium: Any, store: FeatureStore, tmp_path: Path) -> None:
    text = "fires on <b>commas</b> \u202e"
    for turn in range(2):
        with server(application(store, Notes(tmp_path / "notes"))) as address, watched(chromium) as page:
            shown(page, f"{address}feature.html?sae={EVIL}&id=9")
            if turn == 0:
                page.click("summary:has-text('Note')")
                page.fill("#note textarea", text)
                page.fill("#note [name=tags]", "comma, first")
                page.check("#note [name=bookmark]")
                page.click("#note button")
                page.wait_for_selector("#note output:has-text('Saved')")
            else:
                assert page.input_value("#note textarea") == text
                assert page.input_value("#note [name=tags]") == "comma, first"
                assert page.is_checked("#note [name=bookmark]")
                shown(page, f"{address}index.html")
                assert "comma, first" in page.inner_text("table.notes")


def test_what_is_wrong_is_said_on_the_page(site: str, disk: str, chromium: Any) -> None:
    with chromium.new_context() as context:
        page = context.new_page()
        shown(page, f"{site}feature.html?sae=standard&id=99999")
        assert "out of range" in page.inner_text("main .warn")
        shown(page, f"{disk}features.html?sae=nobody")
        assert "no SAE" in page.inner_text("main .warn")
