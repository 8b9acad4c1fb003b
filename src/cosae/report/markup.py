"""HTML and SVG as text in which everything untrusted is escaped unless it says it is markup.

In: Python values. Out: `Markup`. A plain string that reaches `tag` is text: arm names, concept names, paths
and recipe strings cannot become elements, however they are spelled.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any


class Markup(str):
    """Text that already is HTML or SVG."""

    __slots__ = ()


def text(value: object) -> Markup:
    """The value as escaped text; Markup passes as it is."""
    return value if isinstance(value, Markup) else Markup(escape(str(value), quote=True))


def join(parts: Iterable[object], between: str = "") -> Markup:
    """Parts one after the other, each escaped unless it is Markup."""
    return Markup(text(between).join(text(p) for p in parts))


def tag(name: str, /, *children: object, **attributes: Any) -> Markup:
    """One element. class_ stands for class, an underscore for a hyphen; an attribute of None is left out."""
    inside = join(children)
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    void = name in ("meta", "br", "hr", "line", "rect", "circle", "path", "polygon", "polyline") and not inside
    return Markup(f"<{name}{written}/>" if void else f"<{name}{written}>{inside}</{name}>")


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
