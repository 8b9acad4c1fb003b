"""Figures of probing: means with intervals, paired differences, and every concept.

In: a Probing record and how the run's arms look. Out: Markup of one <svg> each. Concepts that are plain from the token
(lexical) and those that need context (contextual) are kept apart: the first flatter every method, token identity too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from cosae.report.figures import svg
from cosae.report.figures.svg import Box, Looks, Panel, Style, drawing, join, label, legend, marker, padded
from cosae.report.format import fixed, shortened
from cosae.report.records import BASELINES, RULES, Estimate, Probing

_GREY = "#777777"
_FLOORS = {
    "token_identity": Style(_GREY, "circle", hollow=True),
    "norm": Style(_GREY, "square", hollow=True),
    "best_dimension": Style(_GREY, "triangle", hollow=True),
    "random_sae": Style(_GREY, "diamond", hollow=True),
    "logistic": Style("#1a1a1a", "bar"),
}
_ROWS_PER_FIGURE = 45

Values = Mapping[str, Sequence[float | None]]


def called(name: str) -> str:
    """An arm's or a baseline's name as it is written in figures and tables."""
    return BASELINES.get(name) or shortened(name, 27)


def means_figure(probing: Probing, looks: Looks) -> Markup | None:
    """Mean AUROC with its interval: one panel a group, one row an arm or baseline, one mark a rule."""
    names = [arm for arm in looks if arm in probing.summary]
    floors = [name for name in BASELINES if name in probing.summary]
    if not probing.groups or not names:
        return None
    rows = {name: 13 + 26.0 * i for i, name in enumerate(names)}
    rows |= {name: 26.0 * len(names) + 20 + 20.0 * i for i, name in enumerate(floors)}
    found = {(n, r, g): probing.mean(n, r, g) for n in rows for r in RULES for g in probing.groups}
    ends = padded([v for one in found.values() for v in (one.low, one.high, one.mean) if v is not None], 0.04)
    height, words = 26 * len(names) + 20 * len(floors) + 16, "mean AUROC over concepts"
    drawn = _by_group(found, rows, probing.groups, looks, ends, height, words)
    return drawing(62 + height + 46, drawn, "Mean probing AUROC with 95 % intervals, by group and selection rule")


def differences_figure(probing: Probing, looks: Looks, baseline: str | None) -> Markup | None:
    """Paired AUROC difference of each arm from the baseline, with its interval, by group and rule."""
    paired = {(a, r, g): probing.difference(a, r, g) for a in looks for r in RULES for g in probing.groups}
    names = [arm for arm in looks if any(key[0] == arm and row.arm for key, row in paired.items())]
    if not names:
        return None
    rows = {name: 17 + 26.0 * i for i, name in enumerate(names)}
    ends = padded([0.0, *(v for row in paired.values() for v in (row.low, row.high) if v is not None)], 0.06)
    versus = next((row.versus for row in paired.values() if row.versus), baseline or "the baseline")
    height, words = 26 * len(names) + 8, f"AUROC minus that of {shortened(versus, 24)}"
    found = {key: row.estimate for key, row in paired.items()}
    drawn = _by_group(found, rows, probing.groups, looks, ends, height, words, zero=True)
    return drawing(62 + height + 46, drawn, "Paired differences of probing AUROC with 95 % intervals")


def _by_group(
    found: Mapping[tuple[str, str, str], Estimate],
    rows: Mapping[str, float],
    groups: Sequence[str],
    looks: Looks,
    ends: tuple[float, float],
    height: float,
    words: str,
    zero: bool = False,
) -> list[object]:
    """A panel a group, in which each name has its row, and an arm a mark for each rule; `zero` draws a line there."""
    parts: list[object] = [_rule_key()]
    for j, group in enumerate(groups):
        panel = Panel.at((205 + j * 425, 62, 395 if len(groups) > 1 else 815, height), ends, (height, 0))
        parts.append(panel.axes(f"{group} concepts", words, y_ticks=(), vertical=True))
        parts += [panel.column(0.0, dash=None)] if zero else []
        for name, y in rows.items():
            style = looks.get(name) or _FLOORS[name]
            if j == 0:
                parts.append(label(195, panel.y(y) + 4, called(name), "end", svg.INK if name in looks else svg.MUTED))
            for k, rule in enumerate(RULES if name in looks else ["auroc"]):
                shift = (k - 0.5) * 9 if name in looks else 0
                look = Style(style.colour, style.shape, hollow=style.hollow or k == 1)
                parts.append(_interval(panel, found[name, rule, group], y + shift, look, f"{name}, {rule}"))
    return parts


def _rule_key() -> Markup:
    entries = [
        (f"filled: {RULES['auroc']}", Style(svg.MUTED, "circle")),
        (f"hollow: {RULES['mean_difference']}", Style(svg.MUTED, "circle", hollow=True)),
    ]
    return join(legend([entry], 205 + 250 * i, 4, 400)[0] for i, entry in enumerate(entries))


def _interval(panel: Panel, found: Estimate, y: float, style: Style, name: str) -> Markup:
    if found.mean is None:
        return Markup("")
    at, parts = panel.y(y), []
    if found.low is not None and found.high is not None:
        parts.append(svg.rule(panel.x(found.low), at, panel.x(found.high), at, style.colour, 1.4))
    hover = f"{name}: {fixed(found.mean, 4)} ({fixed(found.low, 4)} to {fixed(found.high, 4)})"
    return join([*parts, marker(panel.x(found.mean), at, style, hover, 4.0)])


def concept_figures(probing: Probing, looks: Looks, baseline: str | None, rule: str, group: str) -> list[Markup]:
    """Every concept of a group: AUROC of each arm and baseline, and the difference from the baseline arm."""
    concepts = probing.concepts
    values = {name: probing.scores(name, rule) for name in (*looks, *BASELINES)}
    values = {name: found for name, found in values.items() if len(found) == len(concepts)}
    chosen = [i for i, concept in enumerate(concepts) if concept.group == group]
    arms = [arm for arm in looks if arm in values]
    if not arms or not chosen:
        return []

    def mean(i: int) -> float:
        there = [v for arm in arms if (v := values[arm][i]) is not None]
        return sum(there) / len(there) if there else 0.0

    chosen.sort(key=mean, reverse=True)
    size = -(-len(chosen) // -(-len(chosen) // _ROWS_PER_FIGURE))
    figures = []
    for part in (chosen[start : start + size] for start in range(0, len(chosen), size)):
        shown = {name: [found[i] for i in part] for name, found in values.items()}
        names = [concepts[i].name for i in part]
        figures.append(_concept_figure(names, shown, looks, baseline, f"{group}, {RULES[rule]}"))
    return figures


def _concept_figure(concepts: Sequence[str], values: Values, looks: Looks, baseline: str | None, title: str) -> Markup:
    styles = {name: looks.get(name) or _FLOORS[name] for name in values}
    keys, top = legend([(BASELINES.get(name, name), style) for name, style in styles.items()], 20, 4, svg.WIDTH - 40)
    height, paired = 17 * len(concepts), baseline in values
    known = [v for row in values.values() for v in row if v is not None]
    ends, rows = padded(known, 0.03), (len(concepts) - 0.5, -0.5)
    panel = Panel.at((215, top + 34, 480 if paired else 800, height), ends, rows)
    ticks = [(k, shortened(name, 30)) for k, name in enumerate(concepts)]
    parts: list[object] = [
        keys,
        panel.axes(f"AUROC, {title}", "AUROC on held-out files", y_ticks=ticks, vertical=True),
    ]
    for name in sorted(values, key=looks.__contains__):  # arms are drawn over baselines
        parts += _marks(panel, values[name], styles[name], concepts, called(name), False)
    if paired:
        parts.append(_concept_differences(concepts, values, looks, str(baseline), (730, top + 34, 290, height)))
    return drawing(top + 34 + height + 46, parts, f"Probing by concept: {title}")


def _concept_differences(concepts: Sequence[str], values: Values, looks: Looks, baseline: str, box: Box) -> Markup:
    gaps = {
        arm: [None if v is None or b is None else v - b for v, b in zip(row, values[baseline], strict=True)]
        for arm, row in values.items()
        if arm in looks and arm != baseline
    }
    ends = padded([0.0, *(gap for row in gaps.values() for gap in row if gap is not None)], 0.05)
    panel = Panel.at(box, ends, (len(concepts) - 0.5, -0.5))
    rows = [(float(k), "") for k in range(len(concepts))]
    parts: list[object] = [
        panel.axes(f"minus {shortened(baseline, 30)}", "difference in AUROC", y_ticks=rows, vertical=True),
        panel.column(0.0, dash=None),
    ]
    for arm, row in gaps.items():
        parts += _marks(panel, row, looks[arm], concepts, arm, True)
    return join(parts)


def _marks(
    panel: Panel, row: Sequence[float | None], style: Style, concepts: Sequence[str], name: str, sign: bool
) -> list[Markup]:
    """One mark a concept, each on its own row."""
    return [
        panel.mark(value, k, style, f"{concepts[k]}, {name}: {fixed(value, 4, sign)}", size=3.6)
        for k, value in enumerate(row)
        if value is not None
    ]
