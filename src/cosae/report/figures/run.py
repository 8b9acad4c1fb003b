"""Figures of a run other than probing: norms, reconstruction by norm quartile, exponents, training curves.

In: a RunRecord and how its arms look. Out: Markup of one <svg> each, or None where the run holds no such data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter

from markupsafe import Markup

from cosae.report.figures.svg import FAINT, WIDTH, Box, Looks, Panel, Style, bar, drawing, join, label, legend, padded
from cosae.report.format import fixed, percent, shortened, significant
from cosae.report.records import SINKS, ArmMetrics, Exponent, RunRecord

Curve = tuple[list[float], list[float]]

_BAR, _SINK = "#8fa3b8", "#d55e00"


def _keys(arms: Sequence[str], looks: Looks) -> tuple[Markup, float]:
    return legend([(arm, looks[arm]) for arm in arms], 70, 4, WIDTH - 80)


def norm_histogram(record: RunRecord) -> Markup | None:
    """Tokens by norm over the median, both axes logarithmic; sinks in their own colour."""
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
    panel = Panel.at((70, 46, WIDTH - 90, 200), ends, (0.6, 1.6 * max(counts)), "xy")
    keys, _ = legend([("tokens", Style(_BAR, "square")), ("of these, sinks", Style(_SINK, "square"))], 70, 4, WIDTH)
    parts: list[object] = [
        keys,
        panel.axes(x_label="norm of the activation over the median norm", y_label="tokens"),
        panel.column(1.0, "median"),
    ]
    for low, high, n, sink in zip(edges[:-1], edges[1:], counts, sinks, strict=True):
        hover = f"{significant(low)} to {significant(high)} × the median: {n:.0f} tokens, {sink:.0f} sinks"
        left = panel.x(low)
        right = left + max(panel.x(high) - left - 0.8, 1.0)
        parts += [bar(left, right, panel.y(v), panel.y.start, c, hover) for v, c in ((n, _BAR), (sink, _SINK)) if v > 0]
    return drawing(296, parts, "Histogram of activation norms over their median, sinks marked")


def quartile_figure(record: RunRecord, looks: Looks) -> Markup | None:
    """FVE and median token FVE (rows) by norm quartile, with sinks out and in (columns)."""
    shown = [arm for arm in looks if any(record.reconstruction(arm, sinks).by_norm_quartile for sinks in SINKS)]
    if not shown:
        return None
    keys, top = _keys(shown, looks)
    parts: list[object] = [keys]
    for i, (key, title) in enumerate((("fve", "FVE"), ("median_token_fve", "median token FVE"))):
        for j, (sinks, words) in enumerate(SINKS.items()):
            quartiles = {arm: record.reconstruction(arm, sinks).by_norm_quartile[:4] for arm in shown}
            values = {arm: [getattr(q, key) for q in of_arm] for arm, of_arm in quartiles.items()}
            ranges = [f"|x| {significant(q.norm_low)} – {significant(q.norm_high)}" for q in quartiles[shown[0]]]
            box = (70 + j * 510, top + 34 + i * 232, 440.0, 150.0)
            parts.append(_quartile_panel(values, ranges, looks, box, f"{title}, {words}"))
    return drawing(top + 34 + 232 + 150 + 44, parts, "Reconstruction by norm quartile, sinks out and in")


def _quartile_panel(
    values: Mapping[str, Sequence[float | None]], ranges: Sequence[str], looks: Looks, box: Box, title: str
) -> Markup:
    every = [v for row in values.values() for v in row if v is not None]
    within = [v for v in every if v > -1]
    low, high = padded(within or [0.0, 1.0], 0.1, 0.01)
    if len(within) < len(every):
        low = min(low, -0.25)
    panel = Panel.at(box, (-0.5, 3.5), (low, min(high, 1.02)))
    parts: list[object] = [panel.axes(title, x_ticks=[(q, f"Q{q + 1}") for q in range(4)])]
    parts += [label(panel.x(q), panel.y.start + 32, ends, "middle", FAINT, 11) for q, ends in enumerate(ranges)]
    step = min(13.0, 84.0 / max(len(values), 1))
    below: dict[int, list[tuple[str, float]]] = {q: [] for q in range(4)}
    for i, (arm, row) in enumerate(values.items()):
        shift = (i - (len(values) - 1) / 2) * step
        for q, value in enumerate(row):
            if value is not None:
                parts.append(panel.mark(q, value, looks[arm], f"{arm}, Q{q + 1}: {fixed(value, 4)}", shift))
                below[q] += [(arm, value)] if value < low else []
    return join([*parts, *(_below(panel, q, found, looks) for q, found in below.items())])


def _below(panel: Panel, q: int, below: Sequence[tuple[str, float]], looks: Looks) -> Markup:
    """The values of marks that lie under the axis, stacked beside them where the quartile leaves room."""
    x, anchor = (panel.x(q) + 48, "start") if q < 2 else (panel.x(q) - 48, "end")
    lowest = panel.y.start - 6
    return join(
        label(x, lowest - 13 * above, f"{shortened(arm, 22)} {fixed(value, 1)}", anchor, looks[arm].colour, 11)
        for above, (arm, value) in zip(range(len(below) - 1, -1, -1), below, strict=True)
    )


def exponent_figure(record: RunRecord, looks: Looks) -> Markup | None:
    """Mean exponent over training with its middle quantiles, and the histogram of per-feature exponents."""
    curves = _curves(record, looks, attrgetter("a"))
    exponents = {arm: one for arm in looks if (one := record.exponent(arm)) and _has_histogram(one)}
    shown = [arm for arm in looks if arm in curves or arm in exponents]
    if not shown:
        return None
    keys, top = _keys(shown, looks)
    parts: list[object] = [keys]
    if curves:
        parts.append(_exponent_curves(record, curves, looks, (70, top + 34, 440 if exponents else 930, 210)))
    if exponents:
        parts.append(_exponent_histograms(exponents, looks, (580 if curves else 70, top + 34, 440, 210)))
    return drawing(top + 296, parts, "Learned exponents over training and by feature")


def _has_histogram(exponent: Exponent) -> bool:
    edges, counts = exponent.histogram.edges, exponent.histogram.counts
    return len(edges) == len(counts) + 1 and sum(counts) > 0 and edges[-1] > edges[0]


def _exponent_curves(record: RunRecord, curves: Mapping[str, Curve], looks: Looks, box: Box) -> Markup:
    low = _curves(record, looks, lambda m: m.a_quantiles[1] if len(m.a_quantiles) == 5 else None)
    high = _curves(record, looks, lambda m: m.a_quantiles[3] if len(m.a_quantiles) == 5 else None)
    heights = [y for lines in (curves, low, high) for _, ys in lines.values() for y in ys]
    panel = Panel.at(box, (0, max(max(xs) for xs, _ in curves.values()) or 1), padded([*heights, 0.0]))
    parts: list[object] = [panel.axes("mean exponent a over training", "tokens (millions)")]
    parts.append(panel.row(0.0, "a = 0: cosine, norm ignored"))
    if panel.y.high > 0.93:
        parts.append(panel.row(1.0, "a = 1: inner product"))
    for arm, (xs, ys) in curves.items():
        if arm in low:
            parts.append(panel.band(low[arm][0], low[arm][1], high[arm][1], looks[arm].colour))
        parts.append(panel.line(xs, ys, looks[arm]))
        parts.append(panel.mark(xs[-1], ys[-1], looks[arm], f"{arm}: a = {fixed(ys[-1], 4)} at the end"))
    return join(parts)


def _exponent_histograms(exponents: Mapping[str, Exponent], looks: Looks, box: Box) -> Markup:
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
    panel = Panel.at(box, padded([*reached, 0.0]), (0, 1.08 * max(y for _, ys in steps.values() for y in ys)))
    parts: list[object] = [panel.axes("exponents of the features at the end", "exponent a", "density of features")]
    parts.append(panel.column(0.0))
    return join([*parts, *(panel.line(xs, ys, looks[arm], 1.6) for arm, (xs, ys) in steps.items())])


def training_figure(record: RunRecord, looks: Looks) -> Markup | None:
    """Loss, FVE of the training batches, L0 and dead share over tokens."""
    plots: Sequence[tuple[str, str, Callable[[float], str], str]] = (
        ("loss", "loss (as trained; frames differ in unit)", lambda v: significant(v, 4), "y"),
        ("fve", "FVE of the training batches", lambda v: fixed(v, 4), ""),
        ("l0", "L0 of the training batches", lambda v: fixed(v, 1), ""),
        ("dead_frac", "share of dead features", lambda v: percent(v, 2), ""),
    )
    curves = {key: _curves(record, looks, attrgetter(key)) for key, *_ in plots}
    shown = [arm for arm in looks if any(arm in lines for lines in curves.values())]
    if not shown:
        return None
    keys, top = _keys(shown, looks)
    parts: list[object] = [keys]
    for i, (key, title, written, log) in enumerate(plots):
        if curves[key]:
            box = (70 + (i % 2) * 510, top + 34 + (i // 2) * 238, 440.0, 150.0)
            parts.append(_training_panel(curves[key], looks, box, title, written, log))
    return drawing(top + 34 + 238 + 150 + 48, parts, "Training curves: loss, FVE, L0, dead share")


def _training_panel(
    lines: Mapping[str, Curve], looks: Looks, box: Box, title: str, written: Callable[[float], str], log: str
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


def _curves(record: RunRecord, looks: Looks, value: Callable[[ArmMetrics], float | None]) -> dict[str, Curve]:
    """Of each arm that logged the value: millions of tokens, and the values."""
    curves: dict[str, Curve] = {}
    for arm in looks:
        points = [
            (line.tokens / 1e6, found)
            for line in record.metrics
            if line.tokens is not None and arm in line.arms and (found := value(line.arms[arm])) is not None
        ]
        if points:
            curves[arm] = ([x for x, _ in points], [y for _, y in points])
    return curves
