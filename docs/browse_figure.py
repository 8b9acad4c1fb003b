"""The figure of browse.md: a feature of two SAEs side by side, as the feature browser shows it.

    python docs/browse_figure.py STORE OUT.png [FEATURE]

STORE is a feature store of two SAEs (`cosae browse SAE SAE --out STORE`). Without FEATURE the pair that is most alike,
of features that fire often. Needs playwright and an installed Chromium.
"""

from __future__ import annotations

import base64
import shutil
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlencode

from cosae.browse.server import serve
from cosae.browse.store.reader import FeatureStore, open_store

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 760, 1150
LEAST_FIRINGS = 30


def best_match(store: FeatureStore) -> tuple[int, int]:
    """The pair of features with the highest correlation whose first fires often enough to have examples."""
    one, other = store.saes[:2]
    firings = store.columns(one.name)["firings"]
    pairs = store.compare_saes(one.name, other.name).shared
    return next((a, b) for a, b, *_ in pairs if firings[a] >= LEAST_FIRINGS)


def main(folder: Path, out: Path, feature: int | None = None) -> None:
    from playwright.sync_api import sync_playwright

    store = open_store(folder)
    one, other = store.saes[:2]
    a, b = best_match(store)
    if feature is not None:
        match = next(m for m in store.feature(one.name, feature).matches if m.sae == other.name)
        a, b = feature, match.id if match.id is not None else b
    path = next(filter(None, map(shutil.which, BROWSERS)))
    said: list[str] = []
    threading.Thread(target=serve, args=(store,), kwargs={"port": 0, "log": said.append}, daemon=True).start()
    while not said:
        time.sleep(0.1)
    site = said[0].split()[2]
    with sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        shots = []
        for sae, id in ((one.name, a), (other.name, b)):
            page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.set_default_timeout(120_000)
            page.goto(f"{site}feature.html?{urlencode({'sae': sae, 'id': id})}")
            page.wait_for_selector("main[data-drawn]")
            shots.append(page.screenshot())
        both = chromium.new_page(viewport={"width": 2 * WIDTH, "height": HEIGHT})
        both.goto("about:blank")
        both.evaluate(
            """async (shots) => {
              document.body.style.margin = 0;
              document.body.style.display = "flex";
              for (const shot of shots) {
                const image = new Image();
                image.src = `data:image/png;base64,${shot}`;
                await image.decode();
                document.body.append(image);
              }
            }""",
            [base64.b64encode(shot).decode() for shot in shots],
        )
        both.screenshot(path=str(out))
        chromium.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
