"""The tables and sentences of a run: norm facts, arms, paired differences, quartiles, exponents, provenance.

In: a RunRecord and the looks of its arms. Out: Markup. FVE never stands without the median token's FVE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cosae.report.figures import Style, marker
from cosae.report.format import count, fixed, percent, significant
from cosae.report.markup import Markup, join, tag
from cosae.report.probing import BASELINES, RULES, estimate, groups_of, summary
from cosae.report.records import RunRecord, finite, items, mapping, number, reach
from cosae.report.run_figures import Looks
from cosae.report.verdict import Claim, claims


def table(
    head: Sequence[object],
    rows: Sequence[Sequence[object]],
    classes: Sequence[str | None] = (),
    over: Sequence[tuple[str, int]] = (),
) -> Markup:
    """A table whose first column names the row and whose others are aligned as numbers.

    classes are those of the rows; over are headings, each with the number of columns it spans, above the others.
    """
    spans = [tag("th", words, colspan=n, scope="colgroup", class_="over") for words, n in over]
    above = [tag("tr", tag("td", ""), *spans)] if over else []
    first = {1 + sum(n for _, n in over[:i]) for i in range(1, len(over))}

    def aligned(column: int) -> str | None:
        return ("n first" if column in first else "n") if column else None

    top = [tag("th", cell, class_=aligned(i), scope="col") for i, cell in enumerate(head)]
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, class_=aligned(i)) for i, cell in enumerate(row[1:], start=1)),
            class_=classes[at] if at < len(classes) else None,
        )
        for at, row in enumerate(rows)
    ]
    return tag("div", tag("table", tag("thead", *above, tag("tr", *top)), tag("tbody", *body)), class_="wide")


def swatch(arm: str, style: Style | None) -> Markup:
    """An arm's name behind its mark."""
    kept = "name" if len(arm) <= 24 else None
    if style is None:
        return tag("span", arm, class_=kept)
    mark = tag("svg", marker(7, 7, style, size=4.8), viewBox="0 0 14 14", class_="swatch", aria_hidden="true")
    return tag("span", mark, arm, class_=kept)


def norm_summary(record: RunRecord) -> Markup:
    """The facts that say whether the score can matter here at all, as tiles."""
    norms, trained = mapping(record.evaluation.get("norms")), mapping(record.run.get("norm_summary"))
    removed = mapping(norms.get("filter"))
    frac = number(removed.get("removed_frac"))
    frac = number(trained.get("filtered_frac")) if frac is None else frac
    largest = number(norms.get("largest_over_median")) or number(trained.get("max_over_median"))
    kept = number(reach(norms, "sinks_out", "largest_over_median"))
    by_token = mapping(norms.get("log_norm_by_token"))
    first = number(norms.get("position_0_over_median"))
    without = f"{fixed(number(reach(norms, 'sinks_out', 'cv')), 2)} without sinks" if norms else ""
    tiles = [
        (_times(largest), "largest norm over the median", f"{_times(kept)} without sinks" if kept else ""),
        (percent(frac, 2), "of tokens removed by the filter", _removed(record, removed)),
        (fixed(number(by_token.get("r2")), 2), "of log-norm variance predicted by the token", _predicted(by_token)),
        (fixed(number(norms.get("cv")), 2), "standard deviation of the norm over its mean", without),
        (_times(first), "norm at position 0 over the median", "" if first is not None else "no positions known"),
    ]
    shown = [
        tag("div", tag("b", big), tag("span", what), tag("small", more), class_="tile") for big, what, more in tiles
    ]
    return tag("div", *shown, class_="tiles")


def _times(value: float | None) -> str:
    return "–" if value is None else f"{significant(value)} ×"


def _removed(record: RunRecord, removed: Mapping[str, Any]) -> str:
    tokens = number(removed.get("removed_tokens"))
    held = f"{count(tokens)} held-out tokens with {percent(number(removed.get('variance_frac')), 1)} of the variance"
    none = "no held-out token" if removed else ""
    return "; ".join(words for words in (_policy(record), held if tokens else none) if words)


def _policy(record: RunRecord) -> str:
    """The filter's policy in words; whatever is written there when it is an unknown one."""
    policy = mapping(mapping(record.run.get("filter")).get("policy"))
    words = {
        "none": "no filter",
        "position_0": "drops position 0",
        "norm": f"drops norms of at least {significant(number(policy.get('factor')))} × the median",
    }.get(str(policy.get("kind")), "")
    special = "drops special tokens" if policy.get("drop_special") is True else ""
    return "; ".join(w for w in (words or str(policy.get("kind") or ""), special) if w)


def _predicted(by_token: Mapping[str, Any]) -> str:
    if not by_token:
        return "not measured: no token ids"
    folds, unit = significant(number(by_token.get("folds"))), by_token.get("split_by", "document")
    return f"R² on held-out {unit}s, {folds}-fold, sinks left out"


def summary_rows(record: RunRecord) -> list[dict[str, Any]]:
    """What the summary says of each arm, as numbers: the page and the terminal show the same."""
    group = (groups_of(record) or ["all"])[0]
    rows = []
    for arm in record.arms:
        out, inside = record.reconstruction(arm, "out"), record.reconstruction(arm, "in")
        exponent = mapping(reach(record.evaluation, "exponents", arm))
        rows.append(
            {
                "arm": arm,
                "fve": number(out.get("fve")),
                "median_token_fve": number(out.get("median_token_fve")),
                "fve_in": number(inside.get("fve")),
                "median_token_fve_in": number(inside.get("median_token_fve")),
                "l0": number(out.get("l0")),
                "dead_frac": number(out.get("dead_frac")),
                "a": next((v for k in ("mean", "value") if (v := number(exponent.get(k))) is not None), None),
                "a_kind": str(exponent.get("kind", "")),
                **{rule: summary(record, arm, rule, group) for rule in RULES},
            }
        )
    return rows


def summary_table_html(record: RunRecord, looks: Looks) -> Markup:
    """Arm by FVE, median token FVE, L0, dead share, a, and probing by both rules; floors and ceiling below."""
    group = (groups_of(record) or [""])[0]
    probed = bool(record.probing)
    head = ["arm", "FVE", "median token FVE", "FVE, sinks in", "median token, sinks in", "L0", "dead", "a"]
    head += [f"AUROC, {group}: {words}" for words in RULES.values()] if probed else []
    rows: list[list[object]] = []
    classes: list[str | None] = []
    for row in summary_rows(record):
        name = join([swatch(row["arm"], looks.get(row["arm"])), _note(record, row["arm"])])
        cells = [fixed(row[k], 4) for k in ("fve", "median_token_fve", "fve_in", "median_token_fve_in")]
        cells += [fixed(row["l0"], 2), percent(row["dead_frac"]), _exponent(row)]
        rows.append([name, *cells, *((estimate(row[r], "mean") for r in RULES) if probed else ())])
        classes.append(None)
    for baseline, (words, _) in BASELINES.items() if probed else ():
        found = [summary(record, baseline, rule, group) for rule in RULES]
        if any(found):
            rows.append([words, *[""] * 7, *(estimate(f, "mean") for f in found)])
            classes.append("floor")
    return table(head, rows, classes)


def _exponent(row: Mapping[str, Any]) -> Markup:
    words = {"fixed": "fixed", "per_feature": "mean of features"}.get(row["a_kind"], "")
    return join([fixed(row["a"], 3), tag("small", words)] if words and row["a"] is not None else [fixed(row["a"], 3)])


def _note(record: RunRecord, arm: str) -> Markup:
    metadata = record.arms[arm]
    made = " · ".join(str(metadata[k]) for k in ("score", "selector", "frame") if metadata.get(k))
    made += " · baseline" if arm == record.baseline else ""
    notes = [f"stopped: {metadata['stopped']}"] if metadata.get("stopped") else []
    notes += ["a still moving at the end"] if metadata.get("a_moving") is True else []
    return join([tag("small", made), *(tag("small", note, class_="note") for note in notes)])


def difference_tables(record: RunRecord, looks: Looks) -> list[Markup]:
    """Paired differences from the baseline, reconstruction then probing: a row an arm, a column a measure."""
    found = claims(record)
    split = [[c for c in found if "FVE" in c.what], [c for c in found if "FVE" not in c.what]]
    return [_difference_table(record, looks, part) for part in split if part]


def _difference_table(record: RunRecord, looks: Looks, found: Sequence[Claim]) -> Markup:
    measures = list(dict.fromkeys(claim.what for claim in found))
    cells = {(claim.arm, claim.what): claim for claim in found}
    rows = [
        [swatch(arm, looks.get(arm)), *(_difference(cells.get((arm, what))) for what in measures)]
        for arm in record.arms
        if any(claim.arm == arm for claim in found)
    ]
    return table([f"minus {record.baseline}", *measures], rows)


def _difference(claim: Claim | None) -> Markup:
    if claim is None:
        return Markup("–")
    digits = 4 if "FVE" in claim.what else 3
    ends = f"{fixed(claim.low, digits, True)} to {fixed(claim.high, digits, True)}"
    decided = claim.verdict != "includes 0"
    return tag(
        "span",
        tag("b" if decided else "span", fixed(claim.difference, digits, True)),
        tag("small", ends),
        tag("small", claim.verdict),
        class_="apart" if decided else "level",
    )


def quartile_table(record: RunRecord, looks: Looks) -> Markup | None:
    """FVE about the quartile's own mean / median token FVE, per arm and norm quartile, sinks out then in."""
    rows = []
    for sinks in ("out", "in"):
        for arm in record.arms:
            quartiles = [mapping(q) for q in items(record.reconstruction(arm, sinks).get("by_norm_quartile"))]
            if quartiles:
                rows.append(
                    [
                        swatch(arm, looks.get(arm)),
                        sinks,
                        *(
                            f"{fixed(number(q.get('fve')))} / {fixed(number(q.get('median_token_fve')))}"
                            for q in quartiles
                        ),
                        *(fixed(number(q.get("norm_ratio")), 2) for q in quartiles),
                    ]
                )
    if not rows:
        return None
    names = [f"Q{i + 1}" for i in range(4)]
    head = ["arm", "sinks", *(f"{n}: FVE / median token" for n in names), *(f"{n}: |x̂| / |x|" for n in names)]
    return table(head, rows)


def exponent_table(record: RunRecord, looks: Looks) -> Markup | None:
    """Each arm's exponent at the end."""
    rows = []
    for arm in record.arms:
        found = mapping(reach(record.evaluation, "exponents", arm))
        if found:
            mean = number(found.get("mean"))
            mean = number(found.get("value")) if mean is None else mean
            quantiles = ", ".join(fixed(q, 3) for q in finite(found.get("quantiles")))
            state = record.arms[arm].get("a_moving")
            moving = "–" if state is None else "still moving" if state else "settled"
            kind = str(found.get("kind", "")).replace("_", " ")
            if kind == "fixed":
                moving = "–"
            rows.append([swatch(arm, looks.get(arm)), kind, fixed(mean, 4), quantiles or "–", moving])
    return table(["arm", "exponent", "mean", "quantiles over features", "at the end"], rows) if rows else None


def recovery_table(record: RunRecord, looks: Looks) -> Markup | None:
    """Where the activations come from a known dictionary: what was recovered of it, a row a number."""
    found = {arm: mapping(reach(record.evaluation, "recovery", arm)) for arm in record.arms}
    found = {arm: row for arm, row in found.items() if row}
    keys = list(dict.fromkeys(k for row in found.values() for k, v in row.items() if number(v) is not None))
    if not keys:
        return None
    rows = [[str(k).replace("_", " "), *(_measured(number(row.get(k))) for row in found.values())] for k in keys]
    return table(["", *(swatch(arm, looks.get(arm)) for arm in found)], rows)


def _measured(value: float | None) -> str:
    return count(value) if value is not None and abs(value) >= 2 and value == int(value) else fixed(value, 4)
