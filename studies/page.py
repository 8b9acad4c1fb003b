"""A claim's folder: RESULT.md, numbers.json and figure.svg, all written from numbers and none by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cosae.io.lines import finite
from cosae.report.figures.svg import INK, Panel, drawing, label, style_of, tag
from studies.results import Estimate, record, seeds

STUDIES = Path(__file__).parent
VERDICTS = ("supported", "not supported", "opposite", "cannot be seen at this scale")


@dataclass(frozen=True)
class Result:
    """What one claim came to.

    verdict   one of VERDICTS
    figures   our numbers in one line, for docs/CLAIMS.md
    tables    (caption, head, rows of cells)
    text      paragraphs below the tables
    numbers   everything above as plain values
    """

    verdict: str
    figures: str
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[object]]]]
    text: Sequence[str]
    numbers: Mapping[str, Any]
    figure: Markup
    sets: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper (arXiv 2606.15054), what an audit of its code remarks on it, and where it is tried here."""

    folder: str
    letter: str
    title: str
    paper: str
    audit: str

    @property
    def command(self) -> str:
        """The one command that tries it."""
        return f"python -m studies.{self.folder}"


def write(claim: Claim, result: Result) -> Path:
    """RESULT.md, numbers.json and figure.svg of a claim."""
    assert result.verdict in VERDICTS
    place = STUDIES / claim.folder
    lines = [f"# ({claim.letter}) {claim.title}", "", f"**{result.verdict.capitalize()}.** {result.figures}", ""]
    lines += [
        "| | |",
        "|---|---|",
        f"| the paper | {claim.paper} |",
        f"| what an audit of its code remarks | {claim.audit} |",
    ]
    lines += [f"| try it | `{claim.command}` |", f"| seeds | {_seeds(result.sets)} |", ""]
    for caption, head, rows in result.tables:
        lines += [caption, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows] + [""]
    lines += ["![figure](figure.svg)", ""]
    for paragraph in result.text:
        lines += [paragraph, ""]
    lines += [_provenance(result.sets), ""]
    (place / "RESULT.md").write_text("\n".join(lines), encoding="utf-8")
    (place / "figure.svg").write_text(result.figure + "\n", encoding="utf-8")
    plain = {
        "claim": claim.folder,
        "letter": claim.letter,
        "title": claim.title,
        "paper": claim.paper,
        "audit": claim.audit,
        "command": claim.command,
        "verdict": result.verdict,
        "figures": result.figures,
        "numbers": result.numbers,
    }
    text = json.dumps(finite(plain), indent=1, ensure_ascii=False, allow_nan=False)
    (place / "numbers.json").write_text(text + "\n", encoding="utf-8")
    print(f"{claim.title}: {result.verdict}. {result.figures}")
    return place / "RESULT.md"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value).replace("|", "\\|")


def _seeds(sets: Sequence[str]) -> str:
    return "; ".join(f"`{name}` {', '.join(map(str, seeds(name)))}" for name in sets)


def _provenance(sets: Sequence[str]) -> str:
    """Commits, packages and hardware of the runs the numbers come from."""
    records = [record(name, seed) for name in sets for seed in seeds(name)]
    commits = sorted({str(one["commit"])[:12] for one in records})
    packages = records[0]["packages"]
    processors = sorted({str(one["hardware"]["processor"]) for one in records})
    return (
        f"Runs of commit {', '.join(commits)}; torch {packages['torch']}, Python {packages['python']}; "
        f"{', '.join(processors)}, 1 thread. Recipes: `studies/runsets.py`; all numbers: `numbers.json`."
    )


def intervals(rows: Sequence[tuple[str, Estimate]], x_label: str) -> Markup:
    """One row per contestant: the mean difference and its interval, against a line at 0."""
    finite_rows = [(name, one) for name, one in rows if abs(one.low) != float("inf")]
    ends = [0.0, *(v for _, one in finite_rows for v in (one.low, one.high))]
    room = 0.06 * (max(ends) - min(ends) or 1.0)
    height = 26 * len(finite_rows)
    panel = Panel.at((330, 14, 680, height), (min(ends) - room, max(ends) + room), (len(finite_rows) - 0.5, -0.5))
    parts: list[object] = [panel.axes(x_label=x_label, y_ticks=[], vertical=True), panel.column(0.0)]
    for at, (name, one) in enumerate(finite_rows):
        y = panel.y(at)
        parts.append(label(320, y + 4, name, "end", INK, 13))
        left, right = panel.x(one.low), panel.x(one.high)
        parts.append(tag("line", x1=left, y1=y, x2=right, y2=y, stroke=style_of(1).colour, stroke_width=2))
        parts.append(panel.mark(one.mean, at, style_of(1), f"{name}: {one}"))
    return drawing(height + 66, parts, x_label)


def curves(series: Sequence[tuple[str, Sequence[float], Sequence[float]]], x_label: str, y_label: str) -> Markup:
    """Lines with marks, one per series, named at their right ends."""
    xs = [x for _, one, _ in series for x in one]
    ys = [y for _, _, one in series for y in one]
    room = 0.06 * (max(ys) - min(ys) or 1.0)
    panel = Panel.at((80, 16, 700, 300), (min(xs), max(xs)), (min(ys) - room, max(ys) + room))
    parts: list[object] = [panel.axes(x_label=x_label, y_label=y_label)]
    for at, (name, one_x, one_y) in enumerate(series):
        style = style_of(at)
        parts.append(panel.line(one_x, one_y, style))
        parts += [panel.mark(x, y, style, f"{name}: {y:.4f} at {x:g}") for x, y in zip(one_x, one_y, strict=True)]
        parts.append(label(790, panel.y(one_y[-1]) + 4, name, "start", INK, 13))
    return drawing(372, parts, y_label)
