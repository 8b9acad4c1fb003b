"""A real browser on a real server: pages that are watched for errors and for requests to other machines."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 120_000
"""Milliseconds: a machine may be busy with other things."""
SERIOUS = ("serious", "critical")


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium under Playwright; the test is skipped where either is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@contextmanager
def watched(opened: Any, width: int = 1280, dark: bool = False) -> Iterator[Any]:
    """A page of its own; at the end it must have shown no error, and asked for nothing but 127.0.0.1 and files."""
    context = opened.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", reduced_motion="reduce"
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    wrong: list[str] = []
    page.on("console", lambda said: wrong.append(f"{said.type}: {said.text}") if said.type != "log" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
    page.on("request", lambda request: wrong.append(request.url) if _is_foreign(request.url) else None)
    yield page
    context.close()
    assert wrong == []


def _is_foreign(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "file:///", "data:", "blob:"))


def shown(page: Any, url: str) -> Any:
    """Go to a page and wait until its script has drawn it."""
    page.goto(url)
    page.wait_for_selector("main[data-drawn]")
    return page


def axe_core() -> Path:
    """The axe-core script; the test is skipped where AXE_CORE does not name it."""
    path = os.environ.get("AXE_CORE", "")
    if not path:
        pytest.skip("axe-core is not there: npm install axe-core, and name its axe.min.js in AXE_CORE")
    return Path(path)


def accessibility(page: Any, script: Path) -> list[str]:
    """What axe-core finds serious or critical: rule and element."""
    page.evaluate(script.read_text("utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{one['id']}: {node['html'][:120]}" for one in found if one["impact"] in SERIOUS for node in one["nodes"]]


@contextmanager
def server(app: Any) -> Iterator[str]:
    """The address of an application that is served in a thread."""
    import uvicorn

    from cosae.browse.server.serve import listening

    with listening("127.0.0.1", 0) as listener:
        config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        running.should_exit = True
        thread.join(20)
