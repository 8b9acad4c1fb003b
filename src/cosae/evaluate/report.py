"""Runs → one self-contained HTML page, and the same summary as text for the terminal.

In: directories of runs. Out: one file that opens from disk with no network and no script: tables, and figures as
inline SVG. It begins with the norm facts, because they say whether the score can matter at all; then the summary;
then what it rests on; last, per run, recipe, seed, commit and stream digest. What a run lacks is said in a sentence.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from cosae.evaluate.figures import style_of
from cosae.evaluate.report_data import RunRecord, mapping, number, reach, read_run
from cosae.evaluate.report_figures import (
    Looks,
    exponent_figure,
    norm_histogram,
    quartile_figure,
    training_figure,
)
from cosae.evaluate.report_markup import Markup, count, fixed, join, percent, significant, tag
from cosae.evaluate.report_probing import (
    RULES,
    concept_figures,
    differences_figure,
    estimate,
    groups_of,
    means_figure,
    means_table,
)
from cosae.evaluate.report_style import CSS
from cosae.evaluate.report_tables import (
    difference_table,
    exponent_table,
    norm_facts,
    provenance,
    quartile_table,
    recovery_table,
    summary_rows,
    summary_table_html,
    swatch,
    table,
)
from cosae.evaluate.report_verdict import by_measure, claims, verdict
from cosae.types import CosaeError

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_RUNS_PER_TABLE = 3


def write_report(run_dirs: Sequence[Path | str], out: Path | str) -> Path:
    """The page of one or several runs, written to `out` in one step; an older page there is replaced.

    Returns the path. Raises CosaeError when there is no run, a path is not a run, its JSON is damaged, or the page
    cannot be written.
    """
    records = _records(run_dirs)
    looks = _looks(records)
    body: list[object] = [_title(records)]
    if len(records) > 1:
        body += _side_by_side(records, looks)
    body += [
        tag("section", *_run(record, looks, at), id=f"run{at}", class_="run" if len(records) > 1 else "only")
        for at, record in enumerate(records)
    ]
    body.append(_reading())
    return _write(Path(out), _page(", ".join(r.name for r in records), body))


def summary_table(run_dirs: Sequence[Path | str]) -> str:
    """The summary of one or several runs as plain text for a terminal, with what it allows one to say."""
    return "\n\n".join(_summary_text(record) for record in _records(run_dirs))


def _records(run_dirs: Sequence[Path | str]) -> list[RunRecord]:
    if not run_dirs:
        raise CosaeError(
            "a report needs at least one run; got none: give the directory that `train` or `demo` wrote"
        )
    return [read_run(path) for path in run_dirs]


def _looks(records: Iterable[RunRecord]) -> Looks:
    """One look per arm name, over all runs."""
    names = dict.fromkeys(arm for record in records for arm in record.arms)
    return {name: style_of(i) for i, name in enumerate(names)}


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
        raise CosaeError(
            f"the report must be written to a file; {out} is a directory: add a name such as report.html"
        )
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
        return tag("header", tag("h1", records[0].name))
    links = [
        tag("a", f"{r.name} ({r.setting})" if r.setting else r.name, href=f"#run{i}")
        for i, r in enumerate(records)
    ]
    return tag("header", tag("h1", f"{len(records)} runs side by side"), tag("nav", join(links, " · ")))


def _side_by_side(records: Sequence[RunRecord], looks: Looks) -> list[object]:
    facts = table(
        [
            "run",
            "setting",
            "largest / median",
            "removed by the filter",
            "R² of log-norm by token",
            "sd / mean of norms",
        ],
        [_norm_row(record) for record in records],
    )
    parts: list[object] = [tag("h3", "Norms"), facts, tag("h3", "Arms by run")]
    for start in range(0, len(records), _RUNS_PER_TABLE):
        parts.append(_compared(records[start : start + _RUNS_PER_TABLE], looks))
    said = [
        tag("li", tag("b", f"{r.name}"), f" ({r.setting}): " if r.setting else ": ", verdict(r))
        for r in records
    ]
    return [*parts, tag("ul", *said)]


def _norm_row(record: RunRecord) -> list[object]:
    norms = mapping(record.evaluation.get("norms"))
    trained = mapping(record.run.get("norm_facts"))
    removed = number(reach(norms, "filter", "removed_frac"))
    return [
        record.name,
        record.setting,
        significant(number(norms.get("largest_over_median")) or number(trained.get("max_over_median"))),
        percent(number(trained.get("filtered_frac")) if removed is None else removed, 2),
        fixed(number(reach(norms, "log_norm_by_token", "r2")), 2),
        fixed(number(norms.get("cv")), 2),
    ]


def _compared(records: Sequence[RunRecord], looks: Looks) -> Markup:
    """FVE with the median token's, its paired difference, and probing: a group of columns per run."""
    head = ["arm"]
    for record in records:
        group = (groups_of(record) or ["all"])[0]
        name = record.setting or record.name
        head += [f"{name}: FVE", "median token FVE", f"FVE minus {record.baseline}"]
        head += [f"AUROC, {group}"] if record.probing else []
    rows = []
    for arm in looks:
        if not any(arm in record.arms for record in records):
            continue
        row: list[object] = [swatch(arm, looks[arm])]
        for record in records:
            found = next((r for r in summary_rows(record) if r["arm"] == arm), None)
            claim = next((c for c in claims(record) if c.arm == arm and c.what == "FVE, sinks out"), None)
            row += [fixed(found[k], 4) if found else "–" for k in ("fve", "median_token_fve")]
            row.append(
                estimate({"mean": claim.difference, "low": claim.low, "high": claim.high}, "mean", 4, True)
                if claim
                else "–"
            )
            row += [estimate(found["auroc"], "mean") if found else "–"] if record.probing else []
        rows.append(row)
    return table(head, rows)


def _run(record: RunRecord, looks: Looks, at: int) -> list[object]:
    looks = {arm: looks[arm] for arm in record.arms}
    parts: list[object] = [tag("h2", f"{record.name}") if at or record.setting else Markup("")]
    parts = [_heading(record), *_warnings(record)]
    parts += [
        tag("h3", "Norms of the activations"),
        norm_facts(record),
        *_figure(norm_histogram(record), _NORMS),
    ]
    if not record.arms:
        return [*parts, tag("p", "The run names no arms."), tag("h3", "Provenance"), provenance(record)]
    parts += _summary(record, looks)
    parts += _reconstruction(record, looks)
    parts += _exponents(record, looks)
    parts += _probing(record, looks)
    recovered = recovery_table(record, looks)
    parts += [tag("h3", "Recovery of the known dictionary"), recovered] if recovered else []
    curves = training_figure(record, looks)
    parts.append(tag("h3", "Training"))
    parts += _figure(curves, _CURVES) if curves else [tag("p", "The run logged no training metrics.")]
    return [*parts, tag("h3", "Provenance"), provenance(record)]


def _heading(record: RunRecord) -> Markup:
    tokens = number(record.run.get("tokens"))
    facts = [
        f"setting: {record.setting}" if record.setting else "",
        f"{count(tokens)} training tokens" if tokens is not None else "",
        f"{count(number(record.evaluation.get('tokens')))} held-out tokens"
        if record.evaluation.get("tokens")
        else "",
        f"seed {record.run['seed']}" if record.run.get("seed") is not None else "",
        f"commit {str(record.run['commit'])[:12]}" if record.run.get("commit") else "",
    ]
    return join([tag("h2", record.name), tag("p", " · ".join(f for f in facts if f), class_="muted")])


def _warnings(record: RunRecord) -> list[object]:
    said = []
    if record.run.get("status") != "finished":
        said.append(
            f"This run is not finished (status: {record.run.get('status')}); what follows covers what there is so far."
        )
    if not record.evaluation:
        said.append("This run has not been evaluated, so there are no held-out numbers.")
    for arm, facts in record.arms.items():
        if facts.get("stopped"):
            said.append(
                f"The arm {arm} stopped before the end ({facts['stopped']}); its numbers come from its last good state."
            )
        if facts.get("a_moving") is True:
            said.append(f"The exponent of {arm} was still moving at the end: a longer run may end elsewhere.")
    return [tag("p", sentence, class_="warn") for sentence in said]


def _summary(record: RunRecord, looks: Looks) -> list[object]:
    parts: list[object] = [tag("h3", "Summary"), summary_table_html(record, looks)]
    reached = [row["l0"] for row in summary_rows(record) if row["l0"] is not None]
    if reached:
        parts.append(
            tag(
                "p",
                f"Held-out tokens, sinks out unless said otherwise. Inference L0 lies between {min(reached):.2f} and {max(reached):.2f}.",
                class_="muted",
            )
        )
    parts.append(tag("h4", "Against the baseline arm"))
    parts.append(tag("p", verdict(record), class_="verdict"))
    differences = difference_table(record, looks)
    if differences:
        sentences = by_measure(claims(record))
        parts += [differences, tag("ul", *(tag("li", s) for s in sentences))] if sentences else [differences]
    return parts


def _reconstruction(record: RunRecord, looks: Looks) -> list[object]:
    found = quartile_figure(record, looks)
    parts: list[object] = [tag("h3", "Reconstruction by norm quartile")]
    if found is None:
        return [*parts, tag("p", "The run holds no reconstruction by norm quartile.")]
    numbers = quartile_table(record, looks)
    return [*parts, *_figure(found, _QUARTILES), *([numbers] if numbers else [])]


def _exponents(record: RunRecord, looks: Looks) -> list[object]:
    found, numbers = exponent_figure(record, looks), exponent_table(record, looks)
    parts: list[object] = [tag("h3", "Learned exponents")]
    if found is None and numbers is None:
        return [*parts, tag("p", "No arm of this run learns or records an exponent.")]
    return [*parts, *_figure(found, _EXPONENTS), *([numbers] if numbers else [])]


def _probing(record: RunRecord, looks: Looks) -> list[object]:
    parts: list[object] = [tag("h3", "Sparse probing")]
    if not record.probing:
        return [
            *parts,
            tag(
                "p",
                "This run was not probed: concepts need tokens of the embedded corpus, which activations from elsewhere do not have.",
            ),
        ]
    parts += _figure(means_figure(record, looks), _MEANS)
    parts += _figure(differences_figure(record, looks), _GAPS)
    parts.append(tag("div", means_table(record, looks), class_="wide"))
    for rule in RULES:
        for group in groups_of(record):
            figures = concept_figures(record, looks, rule, group)
            parts += [part for figure in figures for part in _figure(figure, _CONCEPTS)]
    return parts


def _figure(drawn: Markup | None, caption: str) -> list[object]:
    return [] if drawn is None else [tag("figure", drawn, tag("figcaption", caption))]


_NORMS = "Norms of held-out activations. Both axes are logarithmic."
_QUARTILES = (
    "Quartiles of |x| among the held-out tokens of each setting. FVE is about the quartile's own mean; the median token's "
    "is about the mean of all tokens shown. A mark at the lower edge lies below it; its value stands beside it."
)
_EXPONENTS = "Left: the exponent over training, its mean and middle half over features. Right: the features' exponents at the end."
_MEANS = (
    "One latent per concept, chosen on training files and scored on held-out files. Bars are 95 % bootstrap intervals over "
    "concepts. Grey rows need no SAE: they are the floors, and the full logistic probe is the ceiling."
)
_GAPS = "Paired by concept: the bootstrap draws the same concepts for both arms. A bar that crosses 0 tells the arms not apart."
_CONCEPTS = "One row a concept, best first. Grey: floors and ceiling. Right: each arm minus the baseline arm on the same concept."
_CURVES = "Measured on training batches while training; the held-out numbers above are what counts."


def _reading() -> Markup:
    said = (
        "FVE: 1 − Σ|x − x̂|² / Σ|x − mean x|², about the global mean of the tokens measured, summed in float64.",
        "Median token FVE: the median over tokens of 1 − |x − x̂|² / |x − mean x|²; a few huge tokens cannot carry it.",
        "Sinks: the tokens that the run's filter removes; out, they are left out of every number, the mean included.",
        "Dead: features that fired on none of the tokens measured. L0: mean number of codes other than 0.",
        "a: the exponent of the norm in the score exp(b)·|x − c|^a·cos(x − c, w): 0 ignores the norm, 1 is an inner product.",
        "Intervals: 95 % percentile bootstrap, over documents for FVE and over concepts for probing, with the same resamples "
        "for all arms; they say how far other documents or concepts would move a number, not how far another seed would.",
    )  # fmt: skip
    return tag("section", tag("h3", "How to read the numbers"), tag("ul", *(tag("li", s) for s in said)))


def _summary_text(record: RunRecord) -> str:
    """Columns of one run, right-aligned, and the verdict below."""
    gaps = {c.arm: c for c in claims(record) if c.what == "FVE, sinks out"}
    head = ["arm", "FVE", "median token", "L0", "dead", "a"]
    head += ["AUROC by AUROC", "by mean diff."] if record.probing else []
    head += [f"FVE - {record.baseline} (95 %)"] if gaps else []
    rows = [head]
    for row in summary_rows(record):
        cells = [_printable(row["arm"]), fixed(row["fve"], 4), fixed(row["median_token_fve"], 4)]
        cells += [fixed(row["l0"], 2), percent(row["dead_frac"]), fixed(row["a"], 3)]
        cells += [fixed(number(row[rule].get("mean"))) for rule in RULES] if record.probing else []
        if gaps:
            gap = gaps.get(row["arm"])
            ends = f" ({fixed(gap.low, 4, True)} to {fixed(gap.high, 4, True)})" if gap else ""
            cells.append(f"{fixed(gap.difference, 4, True)}{ends}" if gap else "–")
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    group = (groups_of(record) or ["all"])[0]
    notes = [f"AUROC over {group} concepts, one latent each."] if record.probing else []
    title = f"{record.name} ({record.setting})" if record.setting else record.name
    return "\n".join(
        [_printable(title), *lines, *notes, *(str(w) for w in _plain_warnings(record)), verdict(record)]
    )


def _plain_warnings(record: RunRecord) -> list[str]:
    said = [] if record.evaluation else ["Not evaluated: there are no held-out numbers."]
    said += [
        f"{_printable(arm)} stopped: {_printable(str(f['stopped']))}"
        for arm, f in record.arms.items()
        if f.get("stopped")
    ]
    return said


def _printable(words: str) -> str:
    """Without control characters: a name must not move a terminal's cursor."""
    return "".join(c if c.isprintable() else "?" for c in words)
