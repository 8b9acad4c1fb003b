"""The frame of every page, and the files that it needs: one template, our own scripts and styles.

The style is the report's, with the browser's own on top of it.
"""

from __future__ import annotations

import functools
from importlib import resources

import jinja2

from cosae.io.escape import printable

PAGES = {
    "index": "Overview",
    "features": "Features",
    "feature": "Feature",
    "compare": "Compare",
    "score": "The score",
    "try": "Try a text",
}
"""File name → what its link says."""
HEADINGS = PAGES | {"compare": "Two features, two SAEs", "score": "The score on real tokens"}
FROM_DISK = (
    "default-src 'none'; script-src 'self' file:; style-src 'self' file:; img-src 'self' file: data:; base-uri 'none'"
)
"""The same for plain files, whose own origin is none; they connect to nothing."""
COMMON = ("core.js", "data.js", "plot.js", "tokens.js")
ASSETS = ("base.css", "browse.css", "icon.svg", *COMMON, *(f"{page}.js" for page in PAGES))


def render(page: str, title: str, live: bool, policy: str = "") -> str:
    """The HTML of a page; `title` names the store. policy: a Content-Security-Policy for pages without a server."""
    made = (
        _environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            pages=PAGES,
            heading=HEADINGS[page],
            title=printable(title)[:200],
            live=live,
            policy=policy,
            scripts=[*COMMON, f"{page}.js"],
        )
    )
    return made + "\n"


@functools.cache
def asset(name: str) -> bytes:
    """The content of one of ASSETS."""
    if name == "base.css":
        return resources.files("cosae").joinpath("report/templates/style.css").read_bytes()
    return resources.files(__package__).joinpath("assets", name).read_bytes()


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader(__package__)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
