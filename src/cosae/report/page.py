"""Runs → one self-contained HTML page, and the same summary as text for the terminal.

In: directories of runs. Out: one file that opens from disk with no network and no script: tables, and figures
as inline SVG. It begins with the norm facts, because they say whether the score can matter at all; then the
summary; then what it rests on; last, per run, recipe, seed, commit and stream digest.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError
from cosae.report.figures import style_of
from cosae.report.format import NONE, fixed, percent, significant
from cosae.report.markup import Markup, join, tag
from cosae.report.probing import RULES, estimate, groups_of
from cosae.report.records import RunRecord, mapping, number, reach, read_run
from cosae.report.run_figures import Looks
from cosae.report.sections import reading, run_section
from cosae.report.style import CSS
from cosae.report.tables import summary_rows, swatch, table
from cosae.report.terminal import text_table
from cosae.report.verdict import claims, verdict

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_RUNS_PER_TABLE = 2


def write_report(run_dirs: Sequence[Path | str], out: Path | str) -> Path:
    """The page of one or several runs, written to `out` in one step; an older page there is replaced.

    Returns the path. Raises CosaeError when there is no run, a path is not a run, its JSON is damaged, or the
    page cannot be written.
    """
    records = _records(run_dirs)
    looks = _looks(records)
    body: list[object] = [_title(records)]
    if len(records) > 1:
        body += _side_by_side(records, looks)
    for at, record in enumerate(records):
        place = "run" if len(records) > 1 else "only"
        body.append(tag("section", *run_section(record, looks), id=f"run{at}", class_=place))
    body.append(reading())
    return write_page(Path(out), ", ".join(r.name for r in records), body)


def summary_table(run_dirs: Sequence[Path | str]) -> str:
    """The summary of one or several runs as plain text for a terminal, with what it allows one to say.

    Raises CosaeError as `write_report` does.
    """
    return "\n\n".join(_summary_text(record) for record in _records(run_dirs))


def _records(run_dirs: Sequence[Path | str]) -> list[RunRecord]:
    if not run_dirs:
        raise CosaeError("a report needs at least one run; got none: give the directory that `train` or `demo` wrote")
    return [read_run(path) for path in run_dirs]


def _looks(records: Iterable[RunRecord]) -> Looks:
    """One look per arm name, over all runs."""
    names = dict.fromkeys(arm for record in records for arm in record.arms)
    return {name: style_of(i) for i, name in enumerate(names)}


def write_page(out: Path, title: str, body: Sequence[object]) -> Path:
    """One self-contained page in the report's style, written in one step; returns its path. Raises CosaeError."""
    return _write(out, _page(title, body))


def _page(title: str, body: Sequence[object]) -> str:
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="only light"),
        tag("title", f"cosae: {title}"),
        tag("style", Markup(CSS)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', *body), lang='en')}\n"


def _write(out: Path, page: str) -> Path:
    """Temporary file beside the target, then a rename: a reader never sees half a page."""
    if out.is_dir():
        raise CosaeError(f"the report must be written to a file; {out} is a directory: add a name such as report.html")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(page.encode("utf-8", "replace"))
            Path(temporary).chmod(0o644)
            Path(temporary).replace(out)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CosaeError(f"the report cannot be written to {out}: {error.strerror or error}") from None
    return out


def _title(records: Sequence[RunRecord]) -> Markup:
    if len(records) == 1:
        return tag("header", tag("p", "cosae report", class_="muted"))
    links = [tag("a", _titled(record), href=f"#run{i}") for i, record in enumerate(records)]
    return tag(
        "header",
        tag("p", "cosae report", class_="muted"),
        tag("h1", f"{len(records)} runs side by side"),
        tag("nav", join(links, " · ")),
    )


def _titled(record: RunRecord) -> str:
    named = not record.setting or record.setting == record.name
    return record.name if named else f"{record.name} ({record.setting})"


def _side_by_side(records: Sequence[RunRecord], looks: Looks) -> list[object]:
    head = ["run", "largest / median", "removed by the filter", "R² of log-norm by token", "sd / mean of norms"]
    parts: list[object] = [tag("h3", "Norms"), table(head, [_norm_row(record) for record in records])]
    parts.append(tag("h3", "Arms by run"))
    for start in range(0, len(records), _RUNS_PER_TABLE):
        parts.append(_compared(records[start : start + _RUNS_PER_TABLE], looks))
    said = [tag("li", tag("b", f"{_titled(r)}: "), verdict(r)) for r in records]
    return [*parts, tag("ul", *said)]


def _norm_row(record: RunRecord) -> list[object]:
    norms = mapping(record.evaluation.get("norms"))
    trained = mapping(record.run.get("norm_summary"))
    removed = number(reach(norms, "filter", "removed_frac"))
    return [
        _titled(record),
        significant(number(norms.get("largest_over_median")) or number(trained.get("max_over_median"))),
        percent(number(trained.get("filtered_frac")) if removed is None else removed, 2),
        fixed(number(reach(norms, "log_norm_by_token", "r2")), 2),
        fixed(number(norms.get("cv")), 2),
    ]


def _compared(records: Sequence[RunRecord], looks: Looks) -> Markup:
    """FVE with the median token's, its paired difference, and probing: a group of columns per run."""
    head: list[object] = ["arm"]
    over = []
    for record in records:
        group = (groups_of(record) or ["all"])[0]
        columns = ["FVE", "median token FVE", f"FVE minus {record.baseline}"]
        if record.probing:
            columns += [f"AUROC, {group}, by AUROC", f"AUROC, {group}, by mean diff."]
        head += columns
        over.append((_titled(record), len(columns)))
    rows = [
        [swatch(arm, looks[arm]), *(cell for record in records for cell in _compared_cells(record, arm))]
        for arm in looks
        if any(arm in record.arms for record in records)
    ]
    return table(head, rows, over=over)


def _compared_cells(record: RunRecord, arm: str) -> list[object]:
    found: dict[str, Any] = next((row for row in summary_rows(record) if row["arm"] == arm), {})
    claim = next((c for c in claims(record) if c.arm == arm and c.what == "FVE, sinks out"), None)
    gap = {"mean": claim.difference, "low": claim.low, "high": claim.high} if claim else {}
    return [
        fixed(found.get("fve"), 4),
        fixed(found.get("median_token_fve"), 4),
        estimate(gap, "mean", 4, sign=True),
        *(estimate(found.get(rule, {}), "mean") for rule in (RULES if record.probing else ())),
    ]


def _summary_text(record: RunRecord) -> str:
    """The summary of one run and its verdict."""
    gaps = {c.arm: c for c in claims(record) if c.what == "FVE, sinks out"}
    head = ["arm", "FVE", "median", "L0", "dead", "a"]
    head += ["AUROC", "by mean"] if record.probing else []
    head += [f"FVE - {record.baseline}"] if gaps else []
    rows = []
    for row in summary_rows(record):
        cells = [row["arm"], fixed(row["fve"], 4), fixed(row["median_token_fve"], 4)]
        cells += [fixed(row["l0"], 2), percent(row["dead_frac"]), fixed(row["a"], 3)]
        cells += [fixed(number(row[rule].get("mean"))) for rule in RULES] if record.probing else []
        if gaps:
            gap = gaps.get(row["arm"])
            ends = f" [{fixed(gap.low, 4, True)}, {fixed(gap.high, 4, True)}]" if gap else ""
            cells.append(f"{fixed(gap.difference, 4, True)}{ends}" if gap else NONE)
        rows.append(cells)
    return text_table(head, rows, title=_titled(record), notes=[*_notes(record), verdict(record)])


def _notes(record: RunRecord) -> list[str]:
    said = ["Held-out tokens without sinks; median: the median token's FVE; brackets: 95 % paired bootstrap."]
    if record.probing:
        group = (groups_of(record) or ["all"])[0]
        said.append(f"AUROC: {group} concepts, one latent each, chosen by AUROC, or by mean difference.")
    said = said if record.evaluation else ["Not evaluated: there are no held-out numbers."]
    return said + [
        f"{arm} stopped: {metadata['stopped']}" for arm, metadata in record.arms.items() if metadata.get("stopped")
    ]
