"""An audit as one self-contained HTML page: what is asked, the answers, the figures behind them.

In: the mapping that `cosae audit` writes as audit.json. Out: Markup. Names, token texts and paths come from files of
others: everything is escaped (`report_markup`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cosae.evaluate.verdict import NORM_DRIVEN
from cosae.report.figures import Panel, drawing, label, style_of
from cosae.report.format import count, fixed, percent
from cosae.report.markup import Markup, tag
from cosae.report.tables import table

HISTOGRAM_BINS = 20


def audit_page(result: Mapping[str, Any]) -> list[object]:
    """The body of the page."""
    saes: Sequence[Mapping[str, Any]] = result["saes"]
    body: list[object] = [
        tag("header", tag("p", "cosae audit", class_="muted"), tag("h1", "Is this SAE fooled by norm?")),
        _overview(saes) if len(saes) > 1 else "",
    ]
    for found in saes:
        body.append(tag("section", *_section(found)))
    body.append(_reading(result))
    return body


def _overview(saes: Sequence[Mapping[str, Any]]) -> Markup:
    head = [
        "SAE",
        "fooled by norm",
        "norm-driven firings",
        "FVE",
        "median token FVE",
        "L0",
        "longest / shortest quarter",
    ]
    rows = []
    for found in saes:
        out = found["reconstruction"]["sinks_out"]
        quarters = [q["l0"] for q in out["by_norm_quartile"]]
        ratio = quarters[-1] / quarters[0] if quarters[0] else None
        rows.append(
            [
                found["name"],
                found["verdict"]["fooled"],
                percent(found["norm_driven"]["sinks_out"]["share"]),
                fixed(out["fve"]),
                fixed(out["median_token_fve"]),
                fixed(out["l0"], 1),
                fixed(ratio, 2),
            ]
        )
    return table(head, rows)


def _section(found: Mapping[str, Any]) -> list[object]:
    made = found["sae"]
    source = found["source"]
    where = source.get("activations") or f"{source.get('model')}, {source.get('site')}, {source.get('corpus')}"
    where += f", injected {source['inject']}" if source.get("inject") else ""
    metadata = (
        f"{made['score']} × {made['selector']}, frame {made['frame']}, {count(made['d_sae'])} features, "
        f"k {made['k']} · {count(found['tokens'])} tokens of {where}"
    )
    parts: list[object] = [
        tag("h2", found["name"]),
        tag("p", metadata, class_="muted"),
        tag(
            "p",
            f"Fooled by norm: {found['verdict']['fooled']}. {_sentence(found['verdict']['because'])}",
            class_="verdict",
        ),
    ]
    if found.get("warning"):
        parts.append(tag("p", _sentence(found["warning"]), class_="warn"))
    parts.append(_answers(found["lines"]))
    quarters = _quarters(found)
    parts.append(tag("figure", quarters, tag("figcaption", _QUARTERS)))
    shares = _shares(found)
    if shares is not None:
        parts.append(tag("figure", shares, tag("figcaption", _SHARES)))
    if found["sinks"]["n_sinks"]:
        parts += [tag("h3", "Sinks"), _sink_table(found["sinks"])]
    return parts


def _answers(lines: Sequence[Mapping[str, str]]) -> Markup:
    """Topic, answer and its evidence; what is worth a look is marked in words and colour."""
    rows = []
    for line in lines:
        mark = tag("span", "look", class_="note") if line["level"] == "look" else ""
        answer = tag("td", line["sentence"], tag("small", line["evidence"]))
        rows.append(tag("tr", tag("th", line["topic"], mark and " · ", mark, scope="row"), answer))
    return tag("div", tag("table", tag("tbody", *rows)), class_="wide")


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "."


def _quarters(found: Mapping[str, Any]) -> Markup:
    """Median token FVE and L0 by norm quartile, sinks out."""
    quartiles = found["reconstruction"]["sinks_out"]["by_norm_quartile"]
    named = (("median token FVE", [q["median_token_fve"] for q in quartiles]), ("L0", [q["l0"] for q in quartiles]))
    parts: list[object] = []
    for at, (title, values) in enumerate(named):
        known = [v for v in values if v is not None] or [0.0]
        low, high = min(0.0, *known), max(*known, 1e-9)
        panel = Panel.at((60 + 520 * at, 34, 430, 180), (-0.6, 3.6), (1.15 * low, 1.15 * high))
        ticks = [(float(q), f"Q{q + 1}") for q in range(4)]
        parts += [panel.axes(title, x_ticks=ticks), *_bars(panel, values)]
    return drawing(250, parts, "Median token FVE and L0 by norm quartile")


def _bars(panel: Panel, values: Sequence[float | None]) -> list[object]:
    parts: list[object] = []
    for q, value in enumerate(values):
        if value is not None:
            left, right = panel.x(q - 0.34), panel.x(q + 0.34)
            top, base = sorted((panel.y(value), panel.y(0.0)))
            colour = style_of(1).colour
            parts.append(tag("rect", x=left, y=top, width=right - left, height=base - top, fill=colour))
            parts.append(label((left + right) / 2, top - 5, fixed(value, 2), "middle"))
    return parts


def _shares(found: Mapping[str, Any]) -> Markup | None:
    """Histogram over features of the share of firings that come or go with the length."""
    share_F = found["norm_driven"]["sinks_out"]["per_feature"]["share"]
    values = [v for v in share_F if v is not None]
    if found["norm_driven"]["invariant"] or not values:
        return None
    counts = [0] * HISTOGRAM_BINS
    for value in values:
        counts[min(int(value * HISTOGRAM_BINS), HISTOGRAM_BINS - 1)] += 1
    panel = Panel.at((70, 20, 960, 170), (0.0, 1.0), (0.0, 1.08 * max(counts)))
    parts: list[object] = [panel.axes(x_label="share of a feature's firings that are norm-driven", y_label="features")]
    for i, n in enumerate(counts):
        left, right = panel.x(i / HISTOGRAM_BINS), panel.x((i + 1) / HISTOGRAM_BINS)
        size = {"x": left + 1, "y": panel.y(n), "width": right - left - 2, "height": panel.y(0.0) - panel.y(n)}
        parts.append(tag("rect", fill=style_of(2).colour, **size))
    return drawing(250, parts, "Norm-driven share by feature")


def _sink_table(sinks: Mapping[str, Any]) -> Markup:
    tokens = [
        [repr(text) if text is not None else (f"id {token}" if token >= 0 else "no tokens known"), count(n)]
        for text, token, n in sinks["spelled"]
    ]
    return table(["token", "sinks"], tokens)


def _reading(result: Mapping[str, Any]) -> Markup:
    said = [
        "Norm-driven: every token keeps the direction of x − c and gets the median length r; a firing that appears or "
        f"vanishes is norm-driven. Above {percent(NORM_DRIVEN, 0)} of firings the verdict is yes: a rule of thumb.",
        "Sinks: position 0, special tokens and tokens of at least so many times the median length as asked; left out "
        "wherever it is not said otherwise.",
        "FVE: fraction of variance explained about the mean of the tokens measured; a few long tokens cannot carry the "
        "median token's. L0: features that fire per token, by the file's own inference threshold.",
        f"Made {result['written_at']} with cosae {result['packages'].get('cosae')}, commit "
        f"{result.get('commit') or 'unknown'}, seed {result['seed']}.",
    ]
    return tag("section", tag("h3", "How to read this"), tag("ul", *(tag("li", s) for s in said), class_="fine"))


_QUARTERS = "By quartile of |x|, shortest tokens first, sinks left out."
_SHARES = "Features by the share of their firings that come or go with the token's length, sinks left out."
