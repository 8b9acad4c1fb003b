"""The figure of browse.md on images: a feature of the embedded vision model, its top images with patches tinted.

    python docs/images_figure.py STORE OUT.png [WIDTH] [FEATURE]

STORE is a feature store over images (`cosae browse RUN --out STORE` of a run on the corpus digits). Without FEATURE the
one, of those that fire often, that tells a concept best. Needs playwright and an installed Chromium.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlencode

import numpy as np

from cosae.browse.server import serve
from cosae.browse.store.reader import FeatureStore, open_store

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HEIGHT = 1000
LEAST_FIRINGS = 150


def best_feature(store: FeatureStore) -> int:
    """The feature with the highest AUROC for a concept, of those that fire often enough."""
    columns = store.columns(store.saes[0].name)
    return int(np.argmax(np.where(columns["firings"] >= LEAST_FIRINGS, columns["auroc"], 0.0)))


def main(folder: Path, out: Path, width: int = 1280, feature: int | None = None) -> None:
    from playwright.sync_api import sync_playwright

    store = open_store(folder)
    said: list[str] = []
    threading.Thread(target=serve, args=(store,), kwargs={"port": 0, "log": said.append}, daemon=True).start()
    while not said:
        time.sleep(0.1)
    chosen = {"sae": store.saes[0].name, "id": best_feature(store) if feature is None else feature}
    path = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": width, "height": HEIGHT})
        page.set_default_timeout(120_000)
        page.goto(f"{said[0].split()[2]}feature.html?{urlencode(chosen)}")
        page.wait_for_selector("main[data-drawn]")
        page.screenshot(path=str(out))
        chromium.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5]))
