"""Figures of probing: means with intervals, paired differences, and every concept.

In: a Probing record and how the run's arms look. Out: Figures. Concepts that are plain from the token (lexical) and
those that need context (contextual) are kept apart: the first flatter every method, token identity too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from cosae.report.figures import svg
from cosae.report.figures.svg import COLUMN, Figure, Looks, Panel, Style, drawing, join, label, marker, padded
from cosae.report.format import fixed, shortened
from cosae.report.records import BASELINES, RULES, Probing
from cosae.report.texts import Estimate

_FLOORS = {
    "token_identity": Style(svg.MUTED, "circle", hollow=True),
    "norm": Style(svg.MUTED, "square", hollow=True),
    "best_dimension": Style(svg.MUTED, "triangle", hollow=True),
    "random_sae": Style(svg.MUTED, "diamond", hollow=True),
    "logistic": Style(svg.INK, "bar"),
}
_RULE_KEYS = [
    (f"filled: {RULES['auroc']}", Style(svg.MUTED, "circle")),
    (f"hollow: {RULES['mean_difference']}", Style(svg.MUTED, "circle", hollow=True)),
]
_ROWS_PER_FIGURE = 45
_LEFT = 172
"""Room for names beside a panel."""

Values = Mapping[str, Sequence[float | None]]


def called(name: str) -> str:
    """An arm's or a baseline's name as it is written in figures and tables."""
    return BASELINES.get(name) or shortened(name, 27)


def means_figure(probing: Probing, looks: Looks) -> Figure | None:
    """Mean AUROC with its interval: one panel a group, one row an arm or baseline, one mark a rule."""
    names = [arm for arm in looks if arm in probing.summary]
    floors = [name for name in BASELINES if name in probing.summary]
    if not probing.groups or not names:
        return None
    rows = {name: 13 + 26.0 * i for i, name in enumerate(names)}
    rows |= {name: 26.0 * len(names) + 20 + 20.0 * i for i, name in enumerate(floors)}
    found = {(n, r, g): probing.mean(n, r, g) for n in rows for r in RULES for g in probing.groups}
    height, words = 26 * len(names) + 20 * len(floors) + 16, "mean AUROC over concepts"
    return Figure(by_panel(found, rows, _titles(probing), looks, [], 0.04, height, words), _RULE_KEYS)


def differences_figure(probing: Probing, looks: Looks, baseline: str | None) -> Figure | None:
    """Paired AUROC difference of each arm from the baseline, with its interval, by group and rule."""
    paired = {(a, r, g): probing.difference(a, r, g) for a in looks for r in RULES for g in probing.groups}
    names = [arm for arm in looks if any(key[0] == arm and row.arm for key, row in paired.items())]
    if not names:
        return None
    rows = {name: 17 + 26.0 * i for i, name in enumerate(names)}
    versus = next((row.versus for row in paired.values() if row.versus), baseline or "the baseline")
    height, words = 26 * len(names) + 8, f"AUROC minus that of {shortened(versus, 24)}"
    found = {key: row.estimate for key, row in paired.items()}
    return Figure(by_panel(found, rows, _titles(probing), looks, [0.0], 0.06, height, words), _RULE_KEYS)


def _titles(probing: Probing) -> dict[str, str]:
    return {group: f"{group} concepts" for group in probing.groups}


def by_panel(
    found: Mapping[tuple[str, str, str], Estimate],
    rows: Mapping[str, float],
    titles: Mapping[str, str],
    looks: Looks,
    lines: Sequence[float],
    room: float,
    height: float,
    words: str,
    kinds: Sequence[str] = tuple(RULES),
) -> list[Markup]:
    """A panel a title, in which each name has its row, and an arm a mark for each kind; upright lines at `lines`.

    found: by name, kind and the title's key; of what is no arm, the first kind alone is drawn
    """
    known = [v for one in found.values() for v in (one.low, one.high, one.mean) if v is not None]
    ends, panels = padded([*lines, *known], room), []
    for group, title in titles.items():
        panel = Panel.at((_LEFT, 30, COLUMN - _LEFT - 12, height), ends, (height, 0))
        parts: list[object] = [panel.axes(title, words, y_ticks=(), vertical=True)]
        parts += [panel.column(at, dash=None) for at in lines]
        for name, y in rows.items():
            style, colour = looks.get(name) or _FLOORS[name], svg.INK if name in looks else svg.MUTED
            parts.append(label(_LEFT - 8, panel.y(y) + 4, called(name), "end", colour))
            for k, rule in enumerate(kinds if name in looks else kinds[:1]):
                shift = (k - 0.5) * 9 if name in looks else 0
                look = Style(style.colour, style.shape, hollow=style.hollow or k == 1)
                parts.append(_interval(panel, found[name, rule, group], y + shift, look, f"{name}, {rule}"))
        told = ", ".join(f"{called(name)} {fixed(found[name, kinds[0], group].mean)}" for name in rows)
        panels.append(drawing(height + 76, parts, f"{words}, with 95 % intervals: {title}", COLUMN, told))
    return panels


def _interval(panel: Panel, found: Estimate, y: float, style: Style, name: str) -> Markup:
    if found.mean is None:
        return Markup("")
    at, parts = panel.y(y), []
    if found.low is not None and found.high is not None:
        parts.append(svg.rule(panel.x(found.low), at, panel.x(found.high), at, style.colour, 1.4))
    hover = f"{name}: {fixed(found.mean, 4)} ({fixed(found.low, 4)} to {fixed(found.high, 4)})"
    return join([*parts, marker(panel.x(found.mean), at, style, hover, 4.0)])


def concept_figure(probing: Probing, looks: Looks, baseline: str | None, rule: str, group: str) -> Figure | None:
    """Every concept of a group, best first: the difference of each arm from the baseline arm, or AUROC without one."""
    values, chosen = by_concept(probing, looks, rule, group)
    base = values.get(str(baseline))
    arms = [arm for arm in looks if arm in values and arm != baseline] or [arm for arm in looks if arm in values]
    paired = base is not None and baseline not in arms
    size = -(-len(chosen) // max(-(-len(chosen) // _ROWS_PER_FIGURE), 1))
    panels = []
    for part in (chosen[start : start + size] for start in range(0, len(chosen), max(size, 1))):
        shown = {
            arm: [_minus(values[arm][i], base[i]) if base and paired else values[arm][i] for i in part] for arm in arms
        }
        names, title = [probing.concepts[i].name for i in part], f"{group}, {RULES[rule]}"
        words = f"AUROC minus that of {shortened(str(baseline), 24)}" if paired else "AUROC on held-out files"
        panels.append(_concept_panel(names, shown, looks, title, words, paired))
    return Figure(panels, [(arm, looks[arm]) for arm in arms]) if panels else None


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def by_concept(probing: Probing, looks: Looks, rule: str, group: str) -> tuple[Values, list[int]]:
    """AUROC by arm, then by baseline, and the group's concepts, best first."""
    concepts = probing.concepts
    found = {name: probing.scores(name, rule) for name in (*looks, *BASELINES)}
    values = {name: row for name, row in found.items() if len(row) == len(concepts)}
    arms = [arm for arm in looks if arm in values]
    chosen = [i for i, concept in enumerate(concepts) if concept.group == group] if arms else []

    def mean(i: int) -> float:
        there = [v for arm in arms if (v := values[arm][i]) is not None]
        return sum(there) / len(there) if there else 0.0

    return values, sorted(chosen, key=mean, reverse=True)


def _concept_panel(concepts: Sequence[str], values: Values, looks: Looks, title: str, words: str, zero: bool) -> Markup:
    """One row a concept, one mark a series; `zero` draws a line there."""
    height, known = 17 * len(concepts), [v for row in values.values() for v in row if v is not None]
    ends = padded([*known, *([0.0] if zero else [])], 0.04)
    panel = Panel.at((_LEFT + 16, 30, COLUMN - _LEFT - 28, height), ends, (len(concepts) - 0.5, -0.5))
    ticks = [(float(k), shortened(name, 28)) for k, name in enumerate(concepts)]
    parts: list[object] = [panel.axes(title, words, y_ticks=ticks, vertical=True)]
    parts += [panel.column(0.0, dash=None)] if zero else []
    for name, row in values.items():
        at = [(panel.x(value), panel.y(k)) for k, value in enumerate(row) if value is not None]
        parts.append(svg.marks(at, looks[name]))
    return drawing(height + 76, parts, f"{title}, by concept", COLUMN)
