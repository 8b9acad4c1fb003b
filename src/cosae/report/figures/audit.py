"""Figures of an audit: reconstruction and L0 by norm quartile, and how many firings of each feature are norm-driven."""

from __future__ import annotations

from collections.abc import Sequence

from cosae.report.figures.svg import COLUMN, Figure, Panel, bar, drawing, label, style_of
from cosae.report.format import fixed
from cosae.report.lenient import Numbers

_N_BINS = 20


def quartile_figure(quartiles: Sequence[Numbers]) -> Figure:
    """Median token FVE and L0 by norm quartile: a panel each."""
    panels = []
    for title, key in (("median token FVE", "median_token_fve"), ("L0", "l0")):
        values = {q: v for q, one in enumerate(quartiles) if (v := getattr(one, key)) is not None}
        low, high = min(0.0, *values.values(), 0.0), max(1e-9, *values.values(), 1e-9)
        panel = Panel.at((56, 30, COLUMN - 66, 170), (-0.6, 3.6), (1.15 * low, 1.15 * high))
        parts: list[object] = [panel.axes(title, x_ticks=[(float(q), f"Q{q + 1}") for q in range(4)])]
        for q, value in values.items():
            left, right = panel.x(q - 0.34), panel.x(q + 0.34)
            top, base = sorted((panel.y(value), panel.y(0.0)))
            parts.append(bar(left, right, top, base, style_of(1).colour))
            parts.append(label((left + right) / 2, base + 14 if value < 0 else top - 5, fixed(value, 2), "middle"))
        told = ", ".join(f"Q{q + 1} {fixed(value, 2)}" for q, value in values.items())
        panels.append(drawing(230, parts, f"{title} by norm quartile", COLUMN, told))
    return Figure(panels)


def shares_figure(share_F: Sequence[float | None]) -> Figure | None:
    """Histogram over features of the share of firings that appear or disappear with the norm; None without any."""
    values = [v for v in share_F if v is not None]
    if not values:
        return None
    bins = [min(max(int(value * _N_BINS), 0), _N_BINS - 1) for value in values]
    counts = [bins.count(i) for i in range(_N_BINS)]
    panel = Panel.at((56, 16, COLUMN - 66, 174), (0.0, 1.0), (0.0, 1.08 * max(counts)))
    parts: list[object] = [panel.axes(x_label="share of a feature's firings that are norm-driven", y_label="features")]
    for i, n in enumerate(counts):
        left, right = panel.x(i / _N_BINS) + 1, panel.x((i + 1) / _N_BINS) - 1
        hover = f"{i / _N_BINS:.2f} to {(i + 1) / _N_BINS:.2f}: {n} features"
        parts += [bar(left, right, panel.y(n), panel.y(0.0), style_of(2).colour, hover)] if n else []
    told = (
        f"{counts[0]} of {len(values)} features lie below {1 / _N_BINS:.2f}, {sum(counts[_N_BINS // 2 :])} above 0.5."
    )
    return Figure([drawing(236, parts, "Norm-driven share by feature", COLUMN, told)])
