"""Figures of a run other than probing: norms, reconstruction by norm quartile, exponents, training curves.

In: a RunRecord and how its arms look. Out: a Figure, or None where the run holds no such data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter

from markupsafe import Markup

from cosae.report.figures import svg
from cosae.report.figures.svg import COLUMN, Box, Figure, Looks, Panel, Style, bars, bulk, drawing, join, label, padded
from cosae.report.format import fixed, percent, shortened, significant
from cosae.report.records import SINKS, ArmMetrics, Exponent, RunRecord

Curve = tuple[list[float], list[float]]

_BAR, _SINK = "#0072b2", "#b84a00"
_BOX: Box = (56, 30, COLUMN - 66, 160)
_POINTS = 250
"""Of a curve, at most: more cannot be told apart in a panel."""


def _keys(arms: Sequence[str], looks: Looks) -> list[tuple[str, Style]]:
    return [(arm, looks[arm]) for arm in arms]


def norm_histogram(record: RunRecord) -> Figure | None:
    """Tokens by norm over the median, both axes logarithmic; sinks as narrower bars of their own colour."""
    norms = record.evaluation.norms
    median, edges, counts = norms.median, list(norms.histogram.edges), norms.histogram.counts
    sinks = norms.histogram.sink_counts or (0.0,) * len(counts)
    if not median or len(edges) != len(counts) + 1 or len(sinks) != len(counts) or max(counts, default=0) <= 0:
        return None
    edges = [e / median for e in edges]
    if edges[0] <= 0 or edges[-1] <= edges[0]:
        return None
    margin = (edges[-1] / edges[0]) ** 0.03
    ends = (edges[0] / margin, edges[-1] * margin)
    panel = Panel.at((56, 16, COLUMN - 66, 174), ends, (0.6, 4 * max(counts)), "xy")
    axes = panel.axes(x_label="norm of the activation over the median norm", y_label="tokens")
    parts: list[object] = [axes, panel.column(1.0, "median")]
    for values, colour, narrower in ((counts, _BAR, 0.0), (sinks, _SINK, 0.25)):
        boxes = []
        for low, high, n in zip(edges[:-1], edges[1:], values, strict=True):
            left, width = panel.x(low), max(panel.x(high) - panel.x(low) - 0.6, 1.0)
            inset = narrower * width if width > 4 else 0.0
            boxes += [(left + inset, left + width - inset, panel.y(n))] if n > 0 else []
        parts.append(bars(boxes, panel.y.start, colour))
    told = (
        f"Norms lie between {significant(edges[0])} and {significant(edges[-1])} × the median; {sum(sinks):.0f} sinks."
    )
    drawn = drawing(236, parts, "Histogram of activation norms over their median", COLUMN, told)
    return Figure([drawn], [("tokens", Style(_BAR, "square")), ("of these, sinks", Style(_SINK, "bar"))])


def quartile_figure(record: RunRecord, looks: Looks) -> Figure | None:
    """FVE and median token FVE by norm quartile, with sinks out and in: four panels."""
    shown = [arm for arm in looks if any(record.reconstruction(arm, sinks).by_norm_quartile for sinks in SINKS)]
    if not shown:
        return None
    panels = []
    for key, title in (("fve", "FVE"), ("median_token_fve", "median token FVE")):
        for sinks, words in SINKS.items():
            quartiles = {arm: record.reconstruction(arm, sinks).by_norm_quartile[:4] for arm in shown}
            values = {arm: [getattr(q, key) for q in of_arm] for arm, of_arm in quartiles.items()}
            ranges = [f"{significant(q.norm_low)}–{significant(q.norm_high)}" for q in quartiles[shown[0]]]
            panels.append(_quartile_panel(values, ranges, looks, f"{title}, {words}"))
    return Figure(panels, _keys(shown, looks))


def _quartile_panel(
    values: Mapping[str, Sequence[float | None]], ranges: Sequence[str], looks: Looks, title: str
) -> Markup:
    """Marks by quartile. Values that would flatten the others are written in a strip below, with their marks."""
    every = [v for row in values.values() for v in row if v is not None]
    inside = bulk([v for v in every if v > -1]) or bulk(every)
    low, high = padded(inside or [0.0, 1.0], 0.08, 0.01)
    outside: dict[int, list[tuple[str, float]]] = {q: [] for q in range(4)}
    panel = Panel.at(_BOX, (-0.5, 3.5), (low, high))
    marks: list[object] = []
    step = min(13.0, 84.0 / max(len(values), 1))
    for i, (arm, row) in enumerate(values.items()):
        shift = (i - (len(values) - 1) / 2) * step
        for q, value in enumerate(row):
            if value is not None and low <= value <= high:
                marks.append(panel.mark(q, value, looks[arm], f"{arm}, Q{q + 1}: {fixed(value, 4)}", shift))
            elif value is not None:
                outside[q].append((arm, value))
    strip = _off_scale(panel, outside, looks)
    bottom = panel.y.start + (20 + 15 * max(map(len, outside.values())) if strip else 0)
    names = [label(panel.x(q), bottom + 17, f"Q{q + 1}", "middle") for q in range(4)]
    names += [label(panel.x(q), bottom + 32, ends, "middle") for q, ends in enumerate(ranges)]
    names.append(label((panel.x.start + panel.x.end) / 2, bottom + 48, "quartile and range of |x|", "middle"))
    parts = [panel.axes(title, x_ticks=()), *marks, strip, *names]
    told = "; ".join(f"{arm} {', '.join(fixed(v, 3) for v in row)}" for arm, row in values.items())
    return drawing(bottom + 56, parts, f"{title}, by norm quartile", COLUMN, f"From Q1 to Q4: {told}")


def _off_scale(panel: Panel, outside: Mapping[int, Sequence[tuple[str, float]]], looks: Looks) -> Markup:
    """Marks that lie outside the axis, each with its value, in a strip below it."""
    if not any(outside.values()):
        return Markup("")
    top = panel.y.start
    parts: list[object] = [
        label(panel.x.start - 7, top + 20, "off", "end"),
        label(panel.x.start - 7, top + 34, "scale", "end"),
    ]
    for q, found in outside.items():
        for i, (arm, value) in enumerate(found):
            y, hover = top + 16 + 15 * i, f"{arm}, Q{q + 1}: {fixed(value, 4)}"
            parts.append(svg.marker(panel.x(q) - 26, y, looks[arm], hover))
            parts.append(label(panel.x(q) - 17, y + 4, significant(value), colour=svg.INK))
    return join(parts)


def exponent_figure(record: RunRecord, looks: Looks) -> Figure | None:
    """Mean exponent over training with its middle quantiles, and the histogram of per-feature exponents."""
    curves = _curves(record, looks, attrgetter("a"))
    exponents = {arm: one for arm in looks if (one := record.exponent(arm)) and _has_histogram(one)}
    panels = [_exponent_curves(record, curves, looks)] if curves else []
    panels += [_exponent_histograms(exponents, looks)] if exponents else []
    shown = [arm for arm in looks if arm in curves or arm in exponents]
    return Figure(panels, _keys(shown, looks)) if panels else None


def _has_histogram(exponent: Exponent) -> bool:
    edges, counts = exponent.histogram.edges, exponent.histogram.counts
    return len(edges) == len(counts) + 1 and sum(counts) > 0 and edges[-1] > edges[0]


def _exponent_curves(record: RunRecord, curves: Mapping[str, Curve], looks: Looks) -> Markup:
    low = _curves(record, looks, lambda m: m.a_quantiles[1] if len(m.a_quantiles) == 5 else None)
    high = _curves(record, looks, lambda m: m.a_quantiles[3] if len(m.a_quantiles) == 5 else None)
    heights = [y for lines in (curves, low, high) for _, ys in lines.values() for y in ys]
    panel = Panel.at(_BOX, (0, max(max(xs) for xs, _ in curves.values()) or 1), padded([*heights, 0.0]))
    parts: list[object] = [panel.axes("mean exponent a over training", "tokens (millions)")]
    parts.append(panel.row(0.0, "a = 0: cosine, norm ignored"))
    if panel.y.high > 0.93:
        parts.append(panel.row(1.0, "a = 1: inner product"))
    for arm, (xs, ys) in curves.items():
        if arm in low and len(low[arm][0]) == len(high[arm][0]):
            parts.append(panel.band(low[arm][0], low[arm][1], high[arm][1], looks[arm].colour))
        parts.append(panel.line(xs, ys, looks[arm]))
        parts.append(panel.mark(xs[-1], ys[-1], looks[arm], f"{arm}: a = {fixed(ys[-1], 4)} at the end"))
    return drawing(236, parts, "Mean exponent over training", COLUMN, _ends(curves, lambda v: fixed(v, 3)))


def _exponent_histograms(exponents: Mapping[str, Exponent], looks: Looks) -> Markup:
    """Step lines of the density, so that bins of different widths compare."""
    steps: dict[str, Curve] = {}
    for arm, one in exponents.items():
        edges, counts = one.histogram.edges, one.histogram.counts
        xs, ys = [edges[0]], [0.0]
        for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True):
            density = n / sum(counts) / (high - low) if high > low else 0.0
            xs, ys = [*xs, low, high], [*ys, density, density]
        steps[arm] = ([*xs, edges[-1]], [*ys, 0.0])
    reached = [x for xs, _ in steps.values() for x in (xs[0], xs[-1])]
    panel = Panel.at(_BOX, padded([*reached, 0.0]), (0, 1.08 * max(y for _, ys in steps.values() for y in ys)))
    axes = panel.axes("exponents of the features at the end", "exponent a", "density of features")
    parts: list[object] = [axes, panel.column(0.0)]
    for arm, (xs, ys) in steps.items():
        most = max(range(len(ys)), key=ys.__getitem__)
        parts.append(panel.line(xs, ys, looks[arm], 1.6))
        parts.append(panel.mark(xs[most], ys[most], looks[arm], arm, size=3.8))
    return drawing(236, parts, "Density of the features' exponents at the end", COLUMN, ", ".join(steps))


def training_figure(record: RunRecord, looks: Looks) -> Figure | None:
    """Loss, FVE of the training batches, L0 and dead share over tokens."""
    plots: Sequence[tuple[str, str, Callable[[float], str], str]] = (
        ("loss", "loss (as trained; frames differ in unit)", lambda v: significant(v, 4), "y"),
        ("fve", "FVE of the training batches", lambda v: fixed(v, 4), ""),
        ("l0", "L0 of the training batches", lambda v: fixed(v, 1), ""),
        ("dead_frac", "share of dead features", lambda v: percent(v, 2), ""),
    )
    curves = {key: _curves(record, looks, attrgetter(key)) for key, *_ in plots}
    shown = [arm for arm in looks if any(arm in lines for lines in curves.values())]
    panels = [_training_panel(curves[key], looks, words, how, log) for key, words, how, log in plots if curves[key]]
    return Figure(panels, _keys(shown, looks)) if panels else None


def _training_panel(
    lines: Mapping[str, Curve], looks: Looks, title: str, written: Callable[[float], str], log: str
) -> Markup:
    every = [y for _, ys in lines.values() for y in ys]
    if log and min(every) > 0:
        ends = (min(every) * 0.93, max(every) * 1.07)
    else:
        # a first step far below the rest would flatten everything that follows
        ends, log = padded([max(y, -1.0) for y in every], 0.06, 1e-3), ""
        ends = (max(ends[0], 0.0), ends[1]) if min(every) >= 0 else ends
    panel = Panel.at(_BOX, (0, max(xs[-1] for xs, _ in lines.values()) or 1), ends, log)
    parts: list[object] = [panel.axes(title, "tokens (millions)")]
    for arm, (xs, ys) in lines.items():
        parts.append(panel.line(xs, ys, looks[arm], 1.5))
        parts.append(panel.mark(xs[-1], ys[-1], looks[arm], f"{arm}: {written(ys[-1])} at the end", size=3.8))
    if min(every) < panel.y.low:
        parts.append(label(panel.x.start + 5, panel.y.start - 6, f"lowest, off scale: {significant(min(every))}"))
    return drawing(236, parts, title, COLUMN, _ends(lines, written))


def _ends(lines: Mapping[str, Curve], written: Callable[[float], str]) -> str:
    return "At the end: " + ", ".join(f"{shortened(arm, 40)} {written(ys[-1])}" for arm, (_, ys) in lines.items())


def _curves(record: RunRecord, looks: Looks, value: Callable[[ArmMetrics], float | None]) -> dict[str, Curve]:
    """Of each arm that logged the value: millions of tokens, and the values, thinned evenly to `_POINTS`."""
    curves: dict[str, Curve] = {}
    for arm in looks:
        points = [
            (line.tokens / 1e6, found)
            for line in record.metrics
            if line.tokens is not None and arm in line.arms and (found := value(line.arms[arm])) is not None
        ]
        every = -(-len(points) // _POINTS)
        if points := points[:-1][:: max(every, 1)] + points[-1:]:
            curves[arm] = ([x for x, _ in points], [y for _, y in points])
    return curves
