"""The probing part of a report: means with intervals, paired differences, and every concept.

In: a RunRecord and the looks of its arms. Out: Markup. Concepts plain from the token (lexical) and those that need
context (contextual) stand apart throughout: the first flatter every method, token identity included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cosae.report.figures import INK, MUTED, WIDTH, Panel, Style, drawing, label, legend, marker, padded, stroke
from cosae.report.format import fixed, shortened
from cosae.report.markup import Markup, join, tag
from cosae.report.records import RunRecord, items, mapping, number, numbers, reach
from cosae.report.run_figures import Looks

GROUPS = ("contextual", "lexical")
RULES = {"auroc": "latent chosen by AUROC", "mean_difference": "latent chosen by mean difference"}
TABLE_RULES = {
    "auroc": "AUROC",
    "mean_difference": "mean difference",
    "standardised_difference": "standardised difference",
}
BASELINES = {
    "token_identity": ("token identity", Style("#777777", "circle", hollow=True)),
    "norm": ("norm alone", Style("#777777", "square", hollow=True)),
    "best_dimension": ("best residual dimension", Style("#777777", "triangle", hollow=True)),
    "random_sae": ("random SAE", Style("#777777", "diamond", hollow=True)),
    "logistic": ("full logistic probe", Style("#1a1a1a", "bar")),
}
_ROWS_PER_FIGURE = 45


def summary(record: RunRecord, name: str, rule: str, group: str, metric: str = "auroc") -> Mapping[str, Any]:
    """Mean, low and high of an arm (by rule) or of a baseline; empty when there is none."""
    rules = mapping(reach(record.probing, "summary", name))
    # a baseline chooses no latent; a random SAE may have been given either rule
    chosen = rules.get(rule) if rule in rules else rules.get("baseline")
    return mapping(reach(chosen, group, metric))


def groups_of(record: RunRecord) -> list[str]:
    """The groups that have concepts, contextual first."""
    there = {mapping(c).get("group") for c in items(record.probing.get("concepts"))}
    return [g for g in GROUPS if g in there]


def per_concept(record: RunRecord, name: str, rule: str, metric: str = "auroc") -> list[float | None]:
    """One value per concept of an arm or a baseline; empty when there is none."""
    if name in BASELINES:
        found = mapping(reach(record.probing, "baselines", name))
        found = mapping(found[rule]) if isinstance(found.get(rule), Mapping) else found
    else:
        found = mapping(reach(record.probing, "arms", name, rule))
    return numbers(found.get(metric))


def paired(record: RunRecord, arm: str, rule: str, group: str, metric: str = "auroc") -> Mapping[str, Any]:
    """The paired difference of an arm from the baseline; empty when there is none."""
    wanted = {"arm": arm, "rule": rule, "group": group, "metric": metric}
    for row in map(mapping, items(record.probing.get("paired"))):
        if all(row.get(key) == value for key, value in wanted.items()):
            return row
    return {}


def means_figure(record: RunRecord, looks: Looks) -> Markup | None:
    """Mean AUROC with its interval: one panel a group, one row an arm or baseline, one mark a rule."""
    groups = groups_of(record)
    names = [arm for arm in looks if mapping(reach(record.probing, "summary", arm))]
    floors = [b for b in BASELINES if mapping(reach(record.probing, "summary", b))]
    if not groups or not names:
        return None
    found = [summary(record, n, r, g) for n in names + floors for r in RULES for g in groups]
    ends = padded([v for f in found for k in ("low", "high", "mean") if (v := number(f.get(k))) is not None], 0.04)
    height = 26 * len(names) + 20 * len(floors) + 16
    parts: list[object] = [
        _rule_key(),
    ]
    for j, group in enumerate(groups):
        box = (205 + j * 425, 62, 395 if len(groups) > 1 else 815, height)
        panel = Panel.at(box, ends, (height, 0))
        parts.append(panel.axes(f"{group} concepts", "mean AUROC over concepts", y_ticks=(), vertical=True))
        for y, name, style in _rows(names, floors, looks):
            if j == 0:
                parts.append(label(195, panel.y(y) + 4, _called(name), "end", INK if name in looks else MUTED))
            for k, rule in enumerate(RULES if name in looks else ["auroc"]):
                shift = (k - 0.5) * 9 if name in looks else 0
                look = Style(style.colour, style.shape, hollow=style.hollow or k == 1)
                parts.append(_interval(panel, summary(record, name, rule, group), y + shift, look, f"{name}, {rule}"))
    return drawing(62 + height + 46, parts, "Mean probing AUROC with 95 % intervals, by group and selection rule")


def _rows(names: Sequence[str], floors: Sequence[str], looks: Looks) -> list[tuple[float, str, Style]]:
    rows = [(13 + 26.0 * i, name, looks[name]) for i, name in enumerate(names)]
    start = 26.0 * len(names) + 20
    return rows + [(start + 20.0 * i, name, BASELINES[name][1]) for i, name in enumerate(floors)]


def _called(name: str) -> str:
    return BASELINES[name][0] if name in BASELINES else shortened(name, 27)


def _rule_key() -> Markup:
    entries = [
        ("filled: " + RULES["auroc"], Style(MUTED, "circle")),
        ("hollow: " + RULES["mean_difference"], Style(MUTED, "circle", hollow=True)),
    ]
    return join([legend([(words, style)], 205 + 250 * i, 4, 400)[0] for i, (words, style) in enumerate(entries)])


def _interval(panel: Panel, found: Mapping[str, Any], y: float, style: Style, name: str, key: str = "mean") -> Markup:
    middle, low, high = (number(found.get(k)) for k in (key, "low", "high"))
    if middle is None:
        return Markup("")
    at, parts = panel.y(y), []
    if low is not None and high is not None:
        parts.append(stroke(panel.x(low), at, panel.x(high), at, style.colour, 1.4))
    hover = f"{name}: {fixed(middle, 4)} ({fixed(low, 4)} to {fixed(high, 4)})"
    return join([*parts, marker(panel.x(middle), at, style, hover, 4.0)])


def differences_figure(record: RunRecord, looks: Looks) -> Markup | None:
    """Paired AUROC difference of each arm from the baseline, with its interval, by group and rule."""
    groups = groups_of(record)
    names = [a for a in looks if any(paired(record, a, r, g) for r in RULES for g in groups)]
    if not names:
        return None
    rows = [paired(record, a, r, g) for a in names for r in RULES for g in groups]
    ends = padded([0.0, *(v for f in rows for k in ("low", "high") if (v := number(f.get(k))) is not None)], 0.06)
    height = 26 * len(names) + 8
    versus = next((str(row.get("versus")) for row in rows if row.get("versus")), record.baseline or "the baseline")
    parts: list[object] = [_rule_key()]
    for j, group in enumerate(groups):
        panel = Panel.at((205 + j * 425, 62, 395 if len(groups) > 1 else 815, height), ends, (height, 0))
        parts.append(
            panel.axes(f"{group} concepts", f"AUROC minus that of {shortened(versus, 24)}", y_ticks=(), vertical=True)
        )
        parts.append(panel.column(0.0, dash=None))
        for i, name in enumerate(names):
            if j == 0:
                parts.append(label(195, panel.y(13 + 26.0 * i) + 8, _called(name), "end", INK))
            for k, rule in enumerate(RULES):
                look = Style(looks[name].colour, looks[name].shape, hollow=k == 1)
                row = paired(record, name, rule, group)
                parts.append(
                    _interval(panel, row, 17 + 26.0 * i + (k - 0.5) * 9, look, f"{name}, {rule}", "difference")
                )
    return drawing(62 + height + 46, parts, "Paired differences of probing AUROC with 95 % intervals")


def concept_figures(record: RunRecord, looks: Looks, rule: str, group: str) -> list[Markup]:
    """Every concept of a group: AUROC of each arm and baseline, and the difference from the baseline arm."""
    concepts = [mapping(c) for c in items(record.probing.get("concepts"))]
    arms = {arm: per_concept(record, arm, rule) for arm in looks}
    arms = {arm: values for arm, values in arms.items() if len(values) == len(concepts)}
    floors = {b: per_concept(record, b, rule) for b in BASELINES}
    floors = {b: values for b, values in floors.items() if len(values) == len(concepts)}
    chosen = [i for i, c in enumerate(concepts) if c.get("group") == group]
    if not arms or not chosen:
        return []

    def mean(i: int) -> float:
        there = [v for values in arms.values() if (v := values[i]) is not None]
        return sum(there) / len(there) if there else 0.0

    chosen.sort(key=mean, reverse=True)
    parts = -(-len(chosen) // _ROWS_PER_FIGURE)
    size = -(-len(chosen) // parts)
    return [
        _concept_figure(record, looks, concepts, chosen[s : s + size], arms, floors, f"{group}, {RULES[rule]}")
        for s in range(0, len(chosen), size)
    ]


def _concept_figure(
    record: RunRecord,
    looks: Looks,
    concepts: Sequence[Mapping[str, Any]],
    chosen: Sequence[int],
    arms: Mapping[str, list[float | None]],
    floors: Mapping[str, list[float | None]],
    title: str,
) -> Markup:
    entries = [(arm, looks[arm]) for arm in arms] + [BASELINES[b] for b in floors]
    keys, top = legend(entries, 20, 4, WIDTH - 40)
    height, base = 17 * len(chosen), record.baseline if record.baseline in arms else None
    values = [v for rows in (arms, floors) for row in rows.values() for i in chosen if (v := row[i]) is not None]
    left = Panel.at((215, top + 34, 480 if base else 800, height), padded(values, 0.03), (len(chosen) - 0.5, -0.5))
    names = [(k, shortened(str(concepts[i].get("name", "")), 30)) for k, i in enumerate(chosen)]
    parts: list[object] = [
        keys,
        left.axes(f"AUROC, {title}", "AUROC on held-out files", y_ticks=names, vertical=True),
    ]
    for rows, style in ((floors, {b: BASELINES[b][1] for b in floors}), (arms, looks)):
        for name, row in rows.items():
            for k, i in enumerate(chosen):
                if (value := row[i]) is not None:
                    hover = f"{concepts[i].get('name', '')}, {_called(name)}: {fixed(value, 4)}"
                    parts.append(left.mark(value, k, style[name], hover, size=3.6))
    if base:
        parts.append(_concept_differences(looks, concepts, chosen, arms, base, (730, top + 34, 290, height)))
    return drawing(top + 34 + height + 46, parts, f"Probing by concept: {title}")


def _concept_differences(
    looks: Looks,
    concepts: Sequence[Mapping[str, Any]],
    chosen: Sequence[int],
    arms: Mapping[str, list[float | None]],
    base: str,
    box: tuple[float, float, float, float],
) -> Markup:
    gaps = {
        arm: [None if (v := row[i]) is None or (b := arms[base][i]) is None else v - b for i in chosen]
        for arm, row in arms.items()
        if arm != base
    }
    ends = padded([0.0, *(g for row in gaps.values() for g in row if g is not None)], 0.05)
    panel = Panel.at(box, ends, (len(chosen) - 0.5, -0.5))
    rows = [(float(k), "") for k in range(len(chosen))]
    parts: list[object] = [
        panel.axes(f"minus {shortened(base, 30)}", "difference in AUROC", y_ticks=rows, vertical=True)
    ]
    parts.append(panel.column(0.0, dash=None))
    for arm, row in gaps.items():
        for k, gap in enumerate(row):
            if gap is not None:
                hover = f"{concepts[chosen[k]].get('name', '')}, {arm}: {fixed(gap, 4, sign=True)}"
                parts.append(panel.mark(gap, k, looks[arm], hover, size=3.6))
    return join(parts)


def means_table(record: RunRecord, looks: Looks) -> Markup:
    """AUROC and average precision with intervals, by rule and group; baselines below the arms."""
    groups = [*groups_of(record), "all"]
    metrics = {"auroc": "AUROC", "average_precision": "average precision"}
    head = tag(
        "tr",
        tag("th", ""),
        tag("th", "rule"),
        *(tag("th", f"{m}, {g}", class_="n") for m in metrics.values() for g in groups),
    )
    rows = []
    for name in [*looks, *BASELINES]:
        for rule in TABLE_RULES if name in looks else ["auroc"]:
            found = [summary(record, name, rule, g, m) for m in metrics for g in groups]
            if any(found):
                words = TABLE_RULES[rule] if name in looks else "–"
                cells = [tag("td", estimate(f, "mean"), class_="n") for f in found]
                rows.append(
                    tag(
                        "tr",
                        tag("th", _called(name), scope="row"),
                        tag("td", words, class_="name"),
                        *cells,
                        class_=None if name in looks else "floor",
                    )
                )
    return tag("table", tag("thead", head), tag("tbody", *rows))


def estimate(found: Mapping[str, Any], key: str, digits: int = 3, sign: bool = False) -> Markup:
    """A number with its interval in small below it; a dash when there is none."""
    middle, low, high = (number(found.get(k)) for k in (key, "low", "high"))
    if middle is None or low is None or high is None:
        return Markup(fixed(middle, digits, sign))
    return join(
        [
            fixed(middle, digits, sign),
            tag("small", f"{fixed(low, digits, sign)} to {fixed(high, digits, sign)}"),
        ]
    )
