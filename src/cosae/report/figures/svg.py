"""Inline SVG: scales, axes, lines, marks and legends, enough for a report and no more.

In: numbers and names. Out: Markup of one self-contained <svg>; plain strings are escaped. Hues are those of Okabe and
Ito, which people with any common colour vision tell apart, dark enough for small text on white; `DARK` has each one's
twin for a dark page, where style.css puts it. Each series also has its own shape, so that a page in grey still reads.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import quantiles

from markupsafe import Markup

from cosae.report.format import MINUS

INK, MUTED, FAINT, GRID, PAPER = "#1a1a1a", "#5c5f66", "#9a9ca1", "#e6e7ea", "#fff"
WIDTH = 1040
_COLOURS = (INK, "#0072b2", "#b84a00", "#00795a", "#a64a80", "#8a6200", "#5656c8", "#7d5148")
_LIGHT_ON_DARK = ("#ececec", "#56b4e9", "#ff9a57", "#3cc79f", "#e79bc4", "#e6b03c", "#a9a9f5", "#c9a094")
DARK = dict(zip(_COLOURS, _LIGHT_ON_DARK, strict=True)) | {
    MUTED: "#a8abb3",
    FAINT: "#6d7178",
    GRID: "#2c2f36",
    PAPER: "#15171b",
}
"""Each colour's twin on a dark page."""
_VOID = ("line", "rect", "path")
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
    """Ends of a scale that holds the values with a little room on both sides; around one value 2 % of it."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = max((high - low) * share, least if high > low else max(0.02 * abs(high), least))
    return low - room, high + room


def bulk(values: Sequence[float], least: float = 0.05) -> list[float]:
    """The values without those that would flatten the others: three times the middle half, or more, away from it."""
    if len(values) < 4:
        return list(values)
    first, _, third = quantiles(values, n=4, method="inclusive")
    away = 3 * max(third - first, least)
    return [value for value in values if first - away <= value <= third + away]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """The values of ticks with as few digits as tell each from the others."""
    digits = 1
    gaps = [abs(b - a) for a, b in itertools.pairwise(ticks) if a != b]
    near = 0.01 * min(gaps) if gaps else 0.0
    while digits < 9 and any(abs(float(f"{tick:.{digits}g}") - tick) > near + 1e-12 * abs(tick) for tick in ticks):
        digits += 1
    return [_tick_text(tick, digits) for tick in ticks]


def _tick_text(value: float, digits: int) -> str:
    if abs(value) < 1e-12:
        return "0"
    text = f"{value:.{digits - 1}e}"
    if 1e-5 <= abs(value) < 1e5:
        text = f"{float(text):.9f}".rstrip("0").rstrip(".")
    else:
        number, power = text.split("e")
        text = f"{number}e{int(power)}"
    return text.replace("-", MINUS)


def label(
    x: float, y: float, words: object, anchor: str = "start", colour: str = MUTED, size: int = 12, **attributes: object
) -> Markup:
    """Text at a point; anchor is start, middle or end."""
    return tag("text", words, x=x, y=y, text_anchor=anchor, fill=colour, font_size=size, **attributes)


def _texts(at: Sequence[tuple[float, float, str]], anchor: str) -> Markup:
    """Many small labels; what they have in common is said once."""
    words = [tag("text", words, x=round(x, 1), y=round(y, 1)) for x, y, words in at]
    return tag("g", *words, text_anchor=anchor, fill=MUTED, font_size=12) if words else Markup("")


def bar(left: float, right: float, top: float, base: float, colour: str, hover: str = "") -> Markup:
    """A filled rectangle in pixels, with hover text."""
    inside = tag("title", hover) if hover else ""
    return tag("rect", inside, x=left, y=top, width=right - left, height=base - top, fill=colour)


def bars(boxes: Iterable[tuple[float, float, float]], base: float, colour: str) -> Markup:
    """Many bars (left, right, top) of one colour as one path, without hover text."""
    drawn = "".join(
        f"M{_numbers(x, base)}V{_numbers(top)}H{_numbers(right)}V{_numbers(base)}" for x, right, top in boxes
    )
    return tag("path", d=drawn, fill=colour) if drawn else Markup("")


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
        xs = _named(self.x.ticks(5)) if x_ticks is None else x_ticks
        ys = _named(self.y.ticks(5)) if y_ticks is None else y_ticks
        rows = [f"M{_numbers(left, self.y(v))}H{_numbers(right)}" for v, _ in ys]
        columns = [f"M{_numbers(self.x(v), top)}V{_numbers(bottom)}" for v, _ in xs] if vertical else []
        grid = "".join([*rows, *columns])
        parts: list[object] = [tag("path", d=grid, stroke=GRID, fill="none")] if grid else []
        parts.append(_texts([(left - 7, self.y(value) + 4, words) for value, words in ys], "end"))
        parts.append(_texts([(self.x(value), bottom + 17, words) for value, words in xs], "middle"))
        parts.append(rule(left, bottom, right, bottom, FAINT))
        if title:
            parts.append(tag("text", title, x=left, y=top - 10, fill=INK, font_size=13, font_weight=600))
        if x_label:
            parts.append(label((left + right) / 2, bottom + 35, x_label, "middle"))
        if y_label:
            at, middle = left - 41, (top + bottom) / 2
            parts.append(label(at, middle, y_label, "middle", transform=f"rotate(-90 {at:.1f} {middle:.1f})"))
        return join(parts)

    def line(self, xs: Sequence[float], ys: Sequence[float], style: Style, width: float = 1.8) -> Markup:
        """A line through the points."""
        return tag(
            "path", d=_through(self._pixels(xs, ys)), fill="none", stroke=style.colour, stroke_width=width,
            stroke_dasharray=style.dash, stroke_linejoin="round",
        )  # fmt: skip

    def band(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> Markup:
        """The area between two lines."""
        outline = [*self._pixels(xs, high), *reversed(self._pixels(xs, low))]
        return tag("path", d=f"{_through(outline)}z", fill=colour, fill_opacity=0.13)

    def _pixels(self, xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
        return [(self.x(x), self.y(y)) for x, y in zip(xs, ys, strict=True)]

    def mark(self, x: float, y: float, style: Style, hover: str = "", shift: float = 0.0, size: float = 4.4) -> Markup:
        """One mark, moved along x by `shift` pixels."""
        return marker(self.x(x) + shift, self.y(y), style, hover, size)

    def column(self, x: float, words: str = "", dash: str | None = "4 3") -> Markup:
        """A vertical line through the panel, with words at its top."""
        at, top = self.x(x), self.y.end
        line = rule(at, top, at, self.y.start, MUTED, dash=dash)
        return line + label(at + 4, top + 11, words) if words else line

    def row(self, y: float, words: str) -> Markup:
        """A dashed horizontal line through the panel, with words at its right end, inside the panel."""
        at, right = self.y(y), self.x.end
        line = rule(self.x.start, at, right, at, MUTED, dash="4 3")
        return line + label(right - 4, at + (14 if at - self.y.end < 16 else -5), words, "end")


def rule(
    x1: float, y1: float, x2: float, y2: float, colour: str = GRID, width: float = 1, dash: str | None = None
) -> Markup:
    """A straight line in pixels."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=colour, stroke_width=width, stroke_dasharray=dash)


def _through(points: Iterable[tuple[float, float]]) -> str:
    """A path through points: each step from the one before, as rounded there, so that errors do not add up."""
    steps, at = "", (0.0, 0.0)
    for x, y in points:
        step = (round(x - at[0], 1), round(y - at[1], 1))
        steps += ("l" if steps else "M") + _numbers(*step)
        at = (at[0] + step[0], at[1] + step[1])
    return steps


def _named(ticks: Sequence[float]) -> list[tuple[float, str]]:
    return list(zip(ticks, tick_texts(ticks), strict=True))


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
    return tag("path", inside, d=_outlined(x, y, _shape(style.shape, size)), **_paint(style))


def marks(points: Iterable[tuple[float, float]], style: Style, size: float = 3.6) -> Markup:
    """Many marks of one series as one path, which takes a fraction of the bytes; without hover text."""
    shape = _shape(style.shape, size)
    drawn = "".join(_outlined(x, y, shape) for x, y in points)
    return tag("path", d=drawn, **_paint(style)) if drawn else Markup("")


def _outlined(x: float, y: float, shape: tuple[float, float, str]) -> str:
    return f"M{_numbers(x + shape[0], y + shape[1])}{shape[2]}"


@functools.cache
def _shape(name: str, size: float) -> tuple[float, float, str]:
    """Where a mark's outline begins, from its middle, and the outline as a path from there."""
    if name == "circle":
        r = _numbers(size)
        return -size, 0.0, f"a{r} {r} 0 1 0 {_numbers(2 * size)} 0a{r} {r} 0 1 0{_numbers(-2 * size)} 0"
    outline = _OUTLINES[name]
    steps = [size * (b - a) for one, other in itertools.pairwise(outline) for a, b in zip(one, other, strict=True)]
    return size * outline[0][0], size * outline[0][1], f"l{_numbers(*steps)}z"


def _numbers(*values: float) -> str:
    """Numbers of a path to a tenth of a pixel, in as few characters as SVG can read."""
    text = ""
    for value in values:
        word = f"{value:.1f}".removesuffix(".0").replace("-0.", "-.").removeprefix("0") or "0"
        word = "0" if word == "-0" else word
        text += word if not text or word.startswith("-") else f" {word}"
    return text


def _paint(style: Style) -> dict[str, object]:
    return {
        "fill": PAPER if style.hollow else style.colour,
        "stroke": style.colour if style.hollow else PAPER,
        "stroke_width": 1.4 if style.hollow else 0.8,
    }


def drawing(height: float, parts: Sequence[object], title: str, width: float = WIDTH, told: str = "") -> Markup:
    """The parts as one <svg> that scales with the page; `told` says in words what the figure shows."""
    words = [tag("title", title), *([tag("desc", told)] if told else [])]
    return tag(
        "svg", *words, *parts, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width:.0f} {height:.0f}", role="img"
    )


COLUMN = 460
"""Width of a figure's panels: on a phone one fills the screen, and its text can be read there."""


@dataclass(frozen=True)
class Figure:
    """Panels side by side where there is room, below one another elsewhere, and the series that all of them show.

    panels  one <svg> each, COLUMN wide
    keys    names of the series with their looks
    """

    panels: Sequence[Markup]
    keys: Sequence[tuple[str, Style]] = ()
