"""Inline SVG: scales, axes, lines, marks and legends, enough for a report and no more.

In: numbers and names. Out: Markup of one self-contained <svg>, with hover text on every mark; plain strings are
escaped. Colours are those of Okabe and Ito, which people with any common colour vision tell apart; each series also
has its own shape, so that a page printed in grey still reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from cosae.report.format import MINUS, shortened

INK, MUTED, FAINT, GRID = "#1a1a1a", "#5c5f66", "#9a9ca1", "#e6e7ea"
WIDTH = 1040
_COLOURS = ("#1a1a1a", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b")
_VOID = ("line", "rect", "circle", "polygon", "polyline")
_SHAPES = ("circle", "square", "triangle", "diamond", "wedge", "plus", "cross", "bar")


def join(parts: Iterable[object]) -> Markup:
    """Parts one after the other, each escaped unless it is Markup."""
    return Markup("").join(part if isinstance(part, Markup) else Markup(escape(str(part))) for part in parts)


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element. class_ stands for class, an underscore for a hyphen; an attribute of None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = join(children)
    return Markup(f"<{name}{written}>{inside}</{name}>" if inside or name not in _VOID else f"<{name}{written}/>")


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Style:
    """How one series looks in every figure of a page. A hollow style is a floor or a ceiling, not an arm."""

    colour: str
    shape: str
    dash: str | None = None
    hollow: bool = False


Looks = Mapping[str, Style]
"""How each arm is drawn, the same in every figure of a page."""
Box = tuple[float, float, float, float]
"""Left, top, width and height in pixels."""


def style_of(index: int) -> Style:
    """The look of the index-th series; after eight the colours come again with other shapes and dashes."""
    turn = index // len(_COLOURS)
    return Style(
        _COLOURS[index % len(_COLOURS)],
        _SHAPES[(index + turn) % len(_SHAPES)],
        None if turn == 0 else f"{3 + 2 * turn} 3",
    )


@dataclass(frozen=True)
class Scale:
    """Data to pixels: low .. high (either may be larger) to start .. end; what lies outside goes to the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        at = min(max(value, min(low, high)), max(low, high))
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return self.start + (self.end - self.start) * ((at - low) / (high - low) if high != low else 0.5)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values inside the scale."""
        return _log_ticks(self.low, self.high, about) if self.log else _round_ticks(self.low, self.high, about)


def _round_ticks(low: float, high: float, about: int) -> list[float]:
    if not high > low:
        return [low]
    rough = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, about: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(ticks) >= min(about, 3):
            break
    every = max(-(-len(ticks) // (2 * about)), 1)
    return ticks[::every]


def padded(values: Sequence[float], share: float = 0.06, least: float = 1e-3) -> tuple[float, float]:
    """Ends of a scale that holds the values with a little room on both sides."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = max((high - low) * share, least)
    return low - room, high + room


def tick_text(value: float) -> str:
    """A tick's value, as short as it goes."""
    if value != 0 and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("-", MINUS)
    return f"{value:.4g}".replace("-", MINUS)


def label(
    x: float, y: float, words: object, anchor: str = "start", colour: str = MUTED, size: int = 12, **attributes: object
) -> Markup:
    """Text at a point; anchor is start, middle or end."""
    return tag("text", words, x=x, y=y, text_anchor=anchor, fill=colour, font_size=size, **attributes)


def bar(left: float, right: float, top: float, base: float, colour: str, hover: str = "") -> Markup:
    """A filled rectangle in pixels, with hover text."""
    inside = tag("title", hover) if hover else ""
    return tag("rect", inside, x=left, y=top, width=right - left, height=base - top, fill=colour)


@dataclass(frozen=True)
class Panel:
    """A plotting area with its two scales; the methods draw in data units."""

    x: Scale
    y: Scale

    @classmethod
    def at(cls, box: Box, x: tuple[float, float], y: tuple[float, float], log: str = "") -> Panel:
        """A panel that fills the box; log names the logarithmic axes ("", "x", "y", "xy")."""
        left, top, width, height = box
        return cls(Scale(*x, left, left + width, "x" in log), Scale(*y, top + height, top, "y" in log))

    def axes(
        self,
        title: str = "",
        x_label: str = "",
        y_label: str = "",
        x_ticks: Sequence[tuple[float, str]] | None = None,
        y_ticks: Sequence[tuple[float, str]] | None = None,
        vertical: bool = False,
    ) -> Markup:
        """Grid, ticks and labels. Given ticks replace the round ones; vertical also draws the x grid."""
        left, right, bottom, top = self.x.start, self.x.end, self.y.start, self.y.end
        xs = [(t, tick_text(t)) for t in self.x.ticks(7)] if x_ticks is None else x_ticks
        ys = [(t, tick_text(t)) for t in self.y.ticks(5)] if y_ticks is None else y_ticks
        parts: list[object] = []
        for value, words in ys:
            parts.append(rule(left, self.y(value), right, self.y(value)))
            parts.append(label(left - 7, self.y(value) + 4, words, "end"))
        for value, words in xs:
            if vertical:
                parts.append(rule(self.x(value), top, self.x(value), bottom))
            parts.append(label(self.x(value), bottom + 17, words, "middle"))
        parts.append(rule(left, bottom, right, bottom, FAINT))
        if title:
            parts.append(tag("text", title, x=left, y=top - 10, fill=INK, font_size=13, font_weight=600))
        if x_label:
            parts.append(label((left + right) / 2, bottom + 35, x_label, "middle"))
        if y_label:
            at, middle = left - 46, (top + bottom) / 2
            parts.append(label(at, middle, y_label, "middle", transform=f"rotate(-90 {at:.1f} {middle:.1f})"))
        return join(parts)

    def line(self, xs: Sequence[float], ys: Sequence[float], style: Style, width: float = 1.8) -> Markup:
        """A line through the points."""
        return tag(
            "polyline", points=_points(self._pixels(xs, ys)), fill="none", stroke=style.colour, stroke_width=width,
            stroke_dasharray=style.dash, stroke_linejoin="round",
        )  # fmt: skip

    def band(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> Markup:
        """The area between two lines."""
        outline = _points([*self._pixels(xs, high), *reversed(self._pixels(xs, low))])
        return tag("polygon", points=outline, fill=colour, fill_opacity=0.13)

    def _pixels(self, xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
        return [(self.x(x), self.y(y)) for x, y in zip(xs, ys, strict=True)]

    def mark(self, x: float, y: float, style: Style, hover: str = "", shift: float = 0.0, size: float = 4.4) -> Markup:
        """One mark, moved along x by `shift` pixels."""
        return marker(self.x(x) + shift, self.y(y), style, hover, size)

    def column(self, x: float, words: str = "", dash: str | None = "4 3") -> Markup:
        """A vertical line through the panel, with words at its top."""
        at, top = self.x(x), self.y.end
        line = rule(at, top, at, self.y.start, MUTED, dash=dash)
        return line + label(at + 4, top + 11, words, size=11) if words else line

    def row(self, y: float, words: str) -> Markup:
        """A dashed horizontal line through the panel, with words at its right end."""
        at, right = self.y(y), self.x.end
        line = rule(self.x.start, at, right, at, MUTED, dash="4 3")
        return line + label(right - 4, at - 5, words, "end", size=11)


def rule(
    x1: float, y1: float, x2: float, y2: float, colour: str = GRID, width: float = 1, dash: str | None = None
) -> Markup:
    """A straight line in pixels."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=colour, stroke_width=width, stroke_dasharray=dash)


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _box(x: float, y: float) -> list[tuple[float, float]]:
    return [(-x, -y), (x, -y), (x, y), (-x, y)]


_ARM = [(0.42, -1.35), (0.42, -0.42), (1.35, -0.42), (1.35, 0.42), (0.42, 0.42), (0.42, 1.35)]
_PLUS = [*_ARM, *((-x, -y) for x, y in _ARM)]
_OUTLINES: Mapping[str, Sequence[tuple[float, float]]] = {
    "square": _box(0.88, 0.88),
    "bar": _box(0.35, 1.3),
    "triangle": [(0, -1.15), (1.1, 0.8), (-1.1, 0.8)],
    "wedge": [(0, 1.15), (1.1, -0.8), (-1.1, -0.8)],
    "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
    "plus": _PLUS,
    "cross": [((x - y) * math.sqrt(0.5), (x + y) * math.sqrt(0.5)) for x, y in _PLUS],
}
"""Corners of the marks of size 1."""


def marker(x: float, y: float, style: Style, hover: str = "", size: float = 4.4) -> Markup:
    """A mark at a point in pixels, with hover text."""
    inside = tag("title", hover) if hover else ""
    paint = {
        "fill": "#fff" if style.hollow else style.colour,
        "stroke": style.colour if style.hollow else "#fff",
        "stroke_width": 1.4 if style.hollow else 0.8,
    }
    if style.shape == "circle":
        return tag("circle", inside, cx=x, cy=y, r=size, **paint)
    corners = _points((x + dx * size, y + dy * size) for dx, dy in _OUTLINES[style.shape])
    return tag("polygon", inside, points=corners, **paint)


def legend(entries: Sequence[tuple[str, Style]], left: float, top: float, width: float) -> tuple[Markup, float]:
    """Names with their marks, wrapped to the width; and the height they took."""
    x, y, parts = left, top + 10, []
    for name, style in entries:
        words = shortened(name, 40)
        needed = 36 + 6.3 * len(words)
        if x > left and x + needed > left + width:
            x, y = left, y + 20
        parts += [marker(x + 6, y, style, size=4.8), label(x + 16, y + 4, words, colour=INK)]
        x += needed
    return join(parts), y + 12 - top


def drawing(height: float, parts: Sequence[object], described: str, width: float = WIDTH) -> Markup:
    """The parts as one <svg> that scales with the page."""
    return tag(
        "svg", *parts, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width:.0f} {height:.0f}",
        role="img", aria_label=described,
    )  # fmt: skip
