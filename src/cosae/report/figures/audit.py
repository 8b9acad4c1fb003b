"""Figures of an audit: reconstruction and L0 by norm quartile, and how many firings of each feature are norm-driven."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from cosae.report.figures.svg import Panel, bar, drawing, label, style_of
from cosae.report.format import fixed
from cosae.report.lenient import Numbers

_N_BINS = 20


def quartile_figure(quartiles: Sequence[Numbers]) -> Markup:
    """Median token FVE and L0 by norm quartile."""
    parts: list[object] = []
    for at, (title, key) in enumerate((("median token FVE", "median_token_fve"), ("L0", "l0"))):
        values = {q: v for q, one in enumerate(quartiles) if (v := getattr(one, key)) is not None}
        low, high = min(0.0, *values.values(), 0.0), max(1e-9, *values.values(), 1e-9)
        panel = Panel.at((60 + 520 * at, 34, 430, 180), (-0.6, 3.6), (1.15 * low, 1.15 * high))
        parts.append(panel.axes(title, x_ticks=[(float(q), f"Q{q + 1}") for q in range(4)]))
        for q, value in values.items():
            left, right = panel.x(q - 0.34), panel.x(q + 0.34)
            top, base = sorted((panel.y(value), panel.y(0.0)))
            parts.append(bar(left, right, top, base, style_of(1).colour))
            parts.append(label((left + right) / 2, top - 5, fixed(value, 2), "middle"))
    return drawing(250, parts, "Median token FVE and L0 by norm quartile")


def shares_figure(share_F: Sequence[float | None]) -> Markup | None:
    """Histogram over features of the share of firings that appear or disappear with the norm; None without any."""
    values = [v for v in share_F if v is not None]
    if not values:
        return None
    bins = [min(int(value * _N_BINS), _N_BINS - 1) for value in values]
    counts = [bins.count(i) for i in range(_N_BINS)]
    panel = Panel.at((70, 20, 960, 170), (0.0, 1.0), (0.0, 1.08 * max(counts)))
    parts: list[object] = [panel.axes(x_label="share of a feature's firings that are norm-driven", y_label="features")]
    for i, n in enumerate(counts):
        left, right = panel.x(i / _N_BINS) + 1, panel.x((i + 1) / _N_BINS) - 1
        parts.append(bar(left, right, panel.y(n), panel.y(0.0), style_of(2).colour))
    return drawing(250, parts, "Norm-driven share by feature")
