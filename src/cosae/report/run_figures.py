"""The figures of a run other than probing: norms, reconstruction by norm quartile, exponents, training curves.

In: a RunRecord and the looks of its arms. Out: Markup of one <svg> each, or None where the run holds no such data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cosae.report.figures import FAINT, WIDTH, Panel, Style, drawing, label, legend, padded
from cosae.report.format import fixed, percent, shortened, significant
from cosae.report.markup import Markup, join, tag
from cosae.report.records import RunRecord, finite, items, mapping, number, reach

Looks = Mapping[str, Style]
"""How each arm is drawn, the same in every figure of the page."""

_BAR, _SINK = "#8fa3b8", "#d55e00"


def norm_histogram(record: RunRecord) -> Markup | None:
    """Tokens by norm over the median, both axes logarithmic; sinks in their own colour."""
    norms = mapping(record.evaluation.get("norms"))
    median = number(norms.get("median"))
    edges, counts = finite(reach(norms, "histogram", "edges")), finite(reach(norms, "histogram", "counts"))
    sinks = finite(reach(norms, "histogram", "sink_counts")) or [0.0] * len(counts)
    if not median or len(edges) != len(counts) + 1 or len(sinks) != len(counts) or max(counts, default=0) <= 0:
        return None
    edges = [e / median for e in edges]
    if edges[0] <= 0 or edges[-1] <= edges[0]:
        return None
    room = (edges[-1] / edges[0]) ** 0.03
    panel = Panel.at((70, 46, WIDTH - 90, 200), (edges[0] / room, edges[-1] * room), (0.6, 1.6 * max(counts)), "xy")
    parts: list[object] = [
        panel.axes(x_label="norm of the activation over the median norm", y_label="tokens"),
        panel.column(1.0, "median"),
    ]
    for low, high, n, sink in zip(edges[:-1], edges[1:], counts, sinks, strict=True):
        hover = f"{significant(low)} to {significant(high)} × the median: {n:.0f} tokens, {sink:.0f} sinks"
        parts += [_bar(panel, low, high, n, _BAR, hover), _bar(panel, low, high, sink, _SINK, hover)]
    keys, _ = legend(
        [("tokens", Style(_BAR, "square")), ("of these, sinks", Style(_SINK, "square"))],
        70,
        4,
        WIDTH,
    )
    return drawing(296, [keys, *parts], "Histogram of activation norms over their median, sinks marked")


def _bar(panel: Panel, low: float, high: float, n: float, colour: str, hover: str) -> Markup:
    if n <= 0:
        return Markup("")
    left, top = panel.x(low), panel.y(n)
    width = max(panel.x(high) - left - 0.8, 1.0)
    return tag("rect", tag("title", hover), x=left, y=top, width=width, height=panel.y.start - top, fill=colour)


def quartile_figure(record: RunRecord, looks: Looks) -> Markup | None:
    """FVE and median token FVE (rows) by norm quartile, with sinks in and out (columns)."""
    rows = (("fve", "FVE"), ("median_token_fve", "median token FVE"))
    columns = (("out", "sinks out"), ("in", "sinks in"))
    shown = [arm for arm in looks if record.reconstruction(arm, "out") or record.reconstruction(arm, "in")]
    if not shown:
        return None
    keys, top = legend([(arm, looks[arm]) for arm in shown], 70, 4, WIDTH - 80)
    parts: list[object] = [keys]
    for i, (key, title) in enumerate(rows):
        for j, (sinks, words) in enumerate(columns):
            values = {arm: _quartiles(record, arm, sinks, key) for arm in shown}
            box = (70 + j * 510, top + 34 + i * 232, 440.0, 150.0)
            parts.append(_quartile_panel(record, values, looks, box, f"{title}, {words}", (sinks, shown[0])))
    return drawing(top + 34 + 232 + 150 + 44, parts, "Reconstruction by norm quartile, sinks out and in")


def _quartiles(record: RunRecord, arm: str, sinks: str, key: str) -> list[float | None]:
    found = [number(mapping(q).get(key)) for q in items(record.reconstruction(arm, sinks).get("by_norm_quartile"))]
    return (found + [None] * 4)[:4]


def _quartile_panel(
    record: RunRecord,
    values: Mapping[str, list[float | None]],
    looks: Looks,
    box: tuple[float, float, float, float],
    title: str,
    ends_of: tuple[str, str],
) -> Markup:
    every = [v for row in values.values() for v in row if v is not None]
    within = [v for v in every if v > -1]
    low, high = padded(within or [0.0, 1.0], 0.1, 0.01)
    cut = len(within) < len(every)
    low, high = (min(low, -0.25) if cut else low), min(high, 1.02)
    panel = Panel.at(box, (-0.5, 3.5), (low, high))
    ranges = items(record.reconstruction(ends_of[1], ends_of[0]).get("by_norm_quartile"))
    parts: list[object] = [panel.axes(title, x_ticks=[(q, f"Q{q + 1}") for q in range(4)])]
    for q, entry in enumerate(ranges[:4]):
        ends = " – ".join(significant(number(mapping(entry).get(k))) for k in ("norm_low", "norm_high"))
        parts.append(label(panel.x(q), panel.y.start + 32, f"|x| {ends}", "middle", FAINT, 11))
    step = min(13.0, 84.0 / max(len(values), 1))
    for i, (arm, row) in enumerate(values.items()):
        shift = (i - (len(values) - 1) / 2) * step
        for q, value in enumerate(row):
            if value is None:
                continue
            parts.append(panel.mark(q, value, looks[arm], f"{arm}, Q{q + 1}: {fixed(value, 4)}", shift))
    for q in range(4):
        below = [(arm, row[q]) for arm, row in values.items() if (row[q] or 0.0) < low]
        parts.append(_below(panel, q, below, looks))
    return join(parts)


def _below(panel: Panel, q: int, below: Sequence[tuple[str, float | None]], looks: Looks) -> Markup:
    """The values of marks that lie under the axis, stacked beside them where the quartile leaves room."""
    side, anchor = (48, "start") if q < 2 else (-48, "end")
    return join(
        label(
            panel.x(q) + side,
            panel.y.start - 6 - 13 * (len(below) - 1 - i),
            f"{shortened(arm, 22)} {fixed(value, 1)}",
            anchor,
            looks[arm].colour,
            11,
        )
        for i, (arm, value) in enumerate(below)
    )


def exponent_figure(record: RunRecord, looks: Looks) -> Markup | None:
    """Mean exponent over training with its middle quantiles, and the histogram of per-feature exponents."""
    curves = {arm: _curve(record, arm, "a") for arm in looks}
    curves = {arm: curve for arm, curve in curves.items() if curve[0]}
    histograms = {}
    for arm in looks:
        histogram = reach(record.evaluation, "exponents", arm, "histogram")
        edges, counts = finite(mapping(histogram).get("edges")), finite(mapping(histogram).get("counts"))
        if len(edges) == len(counts) + 1 and sum(counts) > 0 and edges[-1] > edges[0]:
            histograms[arm] = (edges, counts)
    if not curves and not histograms:
        return None
    keys, top = legend([(arm, looks[arm]) for arm in looks if arm in curves or arm in histograms], 70, 4, WIDTH - 80)
    parts: list[object] = [keys]
    if curves:
        parts.append(_exponent_curves(record, curves, looks, (70, top + 34, 440 if histograms else 930, 210)))
    if histograms:
        parts.append(_exponent_histograms(histograms, looks, (580 if curves else 70, top + 34, 440, 210)))
    return drawing(top + 296, parts, "Learned exponents over training and by feature")


def _exponent_curves(
    record: RunRecord,
    curves: Mapping[str, tuple[list[float], list[float]]],
    looks: Looks,
    box: tuple[float, float, float, float],
) -> Markup:
    bands = {arm: _bands(record, arm) for arm in curves}
    heights = [v for _, ys in curves.values() for v in ys] + [v for b in bands.values() for v in b[1] + b[2]]
    panel = Panel.at(box, (0, max(max(xs) for xs, _ in curves.values()) or 1), padded([*heights, 0.0]))
    parts: list[object] = [panel.axes("mean exponent a over training", "tokens (millions)")]
    parts.append(panel.row(0.0, "a = 0: cosine, norm ignored"))
    if panel.y.high > 0.93:
        parts.append(panel.row(1.0, "a = 1: inner product"))
    for arm, (xs, ys) in curves.items():
        if bands[arm][0]:
            parts.append(panel.band(*bands[arm], looks[arm].colour))
        parts.append(panel.line(xs, ys, looks[arm]))
        parts.append(panel.mark(xs[-1], ys[-1], looks[arm], f"{arm}: a = {fixed(ys[-1], 4)} at the end"))
    return join(parts)


def _bands(record: RunRecord, arm: str) -> tuple[list[float], list[float], list[float]]:
    """Millions of tokens, second and fourth of the five quantiles of a per-feature exponent."""
    rows = []
    for at, values in _logged(record, arm):
        quantiles = finite(values.get("a_quantiles"))
        if len(quantiles) == 5:
            rows.append((at, quantiles[1], quantiles[3]))
    return [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]


def _exponent_histograms(
    histograms: Mapping[str, tuple[list[float], list[float]]],
    looks: Looks,
    box: tuple[float, float, float, float],
) -> Markup:
    """Step lines of the density, so that bins of different widths compare."""
    steps = {}
    for arm, (edges, counts) in histograms.items():
        xs, ys = [edges[0]], [0.0]
        for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True):
            density = n / sum(counts) / (high - low) if high > low else 0.0
            xs, ys = [*xs, low, high], [*ys, density, density]
        steps[arm] = ([*xs, edges[-1]], [*ys, 0.0])
    reached = [x for edges, _ in histograms.values() for x in (edges[0], edges[-1])]
    tallest = max(y for _, ys in steps.values() for y in ys)
    panel = Panel.at(box, padded([*reached, 0.0]), (0, 1.08 * tallest))
    parts: list[object] = [panel.axes("exponents of the features at the end", "exponent a", "density of features")]
    parts.append(panel.column(0.0))
    parts += [panel.line(xs, ys, looks[arm], 1.6) for arm, (xs, ys) in steps.items()]
    return join(parts)


def training_figure(record: RunRecord, looks: Looks) -> Markup | None:
    """Loss, FVE of the training batches, L0 and dead share over tokens."""
    plots: Sequence[tuple[str, str, Callable[[float], str], str]] = (
        ("loss", "loss (as trained; frames differ in unit)", lambda v: significant(v, 4), "y"),
        ("fve", "FVE of the training batches", lambda v: fixed(v, 4), ""),
        ("l0", "L0 of the training batches", lambda v: fixed(v, 1), ""),
        ("dead_frac", "share of dead features", lambda v: percent(v, 2), ""),
    )
    curves = {key: {arm: _curve(record, arm, key) for arm in looks} for key, *_ in plots}
    shown = [arm for arm in looks if any(curves[key][arm][0] for key, *_ in plots)]
    if not shown:
        return None
    keys, top = legend([(arm, looks[arm]) for arm in shown], 70, 4, WIDTH - 80)
    parts: list[object] = [keys]
    for i, (key, title, written, log) in enumerate(plots):
        lines = {arm: curves[key][arm] for arm in shown if curves[key][arm][0]}
        if lines:
            box = (70 + (i % 2) * 510, top + 34 + (i // 2) * 238, 440.0, 150.0)
            parts.append(_training_panel(lines, looks, box, title, written, log))
    return drawing(top + 34 + 238 + 150 + 48, parts, "Training curves: loss, FVE, L0, dead share")


def _training_panel(
    lines: Mapping[str, tuple[list[float], list[float]]],
    looks: Looks,
    box: tuple[float, float, float, float],
    title: str,
    written: Callable[[float], str],
    log: str,
) -> Markup:
    every = [y for _, ys in lines.values() for y in ys]
    if log and min(every) > 0:
        ends = (min(every) * 0.93, max(every) * 1.07)
    else:
        # a first step far below the rest would flatten everything that follows
        ends, log = padded([max(y, -1.0) for y in every], 0.06, 1e-3), ""
        ends = (max(ends[0], 0.0), ends[1]) if min(every) >= 0 else ends
    panel = Panel.at(box, (0, max(xs[-1] for xs, _ in lines.values()) or 1), ends, log)
    parts: list[object] = [panel.axes(title, "tokens (millions)")]
    for arm, (xs, ys) in lines.items():
        parts.append(panel.line(xs, ys, looks[arm], 1.5))
        parts.append(panel.mark(xs[-1], ys[-1], looks[arm], f"{arm}: {written(ys[-1])} at the end", size=3.8))
    return join(parts)


def _logged(record: RunRecord, arm: str) -> list[tuple[float, Mapping[str, Any]]]:
    """What was logged of an arm, each with the millions of tokens seen."""
    rows = []
    for line in record.metrics:
        at, values = number(line.get("tokens")), mapping(reach(line, "arms", arm))
        if at is not None and values:
            rows.append((at / 1e6, values))
    return rows


def _curve(record: RunRecord, arm: str, key: str) -> tuple[list[float], list[float]]:
    points = [(at, number(values.get(key))) for at, values in _logged(record, arm)]
    kept = [(at, value) for at, value in points if value is not None]
    return [at for at, _ in kept], [value for _, value in kept]
