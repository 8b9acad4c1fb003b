"""HTML and SVG as text in which everything untrusted is escaped unless it says it is markup.

In: Python values. Out: `Markup`. A plain string that reaches `tag` is text: arm names, concept names, paths
and recipe strings cannot become elements, however they are spelled.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"


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


def fixed(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number with so many decimals, a true minus sign, and a dash for None."""
    if value is None:
        return NONE
    if abs(value) >= 1e4:
        return f"{value:{'+' if sign else ''},.0f}".replace("-", MINUS)
    if float(f"{value:.{digits}f}") == 0:
        value = 0.0
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", MINUS)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return NONE if value is None else f"{fixed(100 * value, digits)} %"


def count(value: float | None) -> str:
    """A whole number with thousands set apart by thin spaces."""
    return NONE if value is None else f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def significant(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits."""
    return NONE if value is None else f"{value:.{digits}g}".replace("-", MINUS)


def shortened(value: str, length: int) -> str:
    """The string, cut to `length` characters with an ellipsis."""
    return value if len(value) <= length else value[: length - 1] + "…"
