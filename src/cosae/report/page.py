"""Runs → one self-contained HTML page, and the same summary as text for the terminal.

The page opens from disk with no network and no script: tables, and figures as inline SVG. Its structure and sentences
stand in templates/, where everything that is not Markup is escaped. It begins with the answer and what to know before
any number; then contents and glossary; then of each run the norms of the activations, which say whether the score can
matter at all, the summary, what it rests on, and where it comes from.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import jinja2

from cosae.errors import CosaeError
from cosae.io.atomic import write_text, written
from cosae.io.escape import printable
from cosae.report import format, sinks, tables
from cosae.report.figures import probing, run
from cosae.report.figures.svg import DARK, style_of
from cosae.report.lenient import read_record
from cosae.report.read import read_runs
from cosae.report.records import RULES, FilterPolicy, RunRecord
from cosae.report.terminal import text_table
from cosae.report.verdict import answer, claims
from cosae.shown import spelled_out


def write_report(run_dirs: Sequence[Path | str], out: Path | str) -> Path:
    """The page of one or several runs, written to `out` in one step; an older page there is replaced.

    Returns the path. Raises CosaeError when there is no run, a path is not a run, its JSON is damaged, or the
    page cannot be written.
    """
    records = read_runs(run_dirs)
    names = dict.fromkeys(arm for record in records for arm in record.arms)
    looks = {name: style_of(i) for i, name in enumerate(names)}  # one look per arm name, over all runs
    return write_page(Path(out), "run.html.j2", records=records, looks=looks)


def summary_table(run_dirs: Sequence[Path | str]) -> str:
    """The summary of one or several runs as plain text for a terminal, with what it allows one to say.

    Raises CosaeError as `write_report` does.
    """
    texts = []
    for record in read_runs(run_dirs):
        head, rows = tables.summary_text(record)
        said = [f"{name}: {sentence}" for name, sentence in sinks.sentences(record)]
        notes = [*tables.summary_notes(record), *answer(record).text(), *said]
        texts.append(text_table(head, rows, title=record.title, notes=notes))
    return "\n\n".join(texts)


def write_page(out: Path, template: str, **context: object) -> Path:
    """A page from one of the templates, written in one step; returns its path.

    Raises CosaeError for a folder and where it cannot be written; what stood there before is untouched then.
    """
    if out.is_dir():
        raise CosaeError(f"the report must be written to a file; {out} is a directory: add a name such as report.html")
    page = _environment().get_template(template).render(context)
    with written(out, "choose another place for the report"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, printable(page, keep="\n\N{NARROW NO-BREAK SPACE}"))  # names may hold what turns text around
    return out


def sections(record: RunRecord) -> dict[str, str]:
    """Key and heading of every section of a run's part, in their order; what the run lacks has none."""
    evaluation = record.evaluation
    of_arms = {
        "summary": "Summary",
        "quartiles": "Reconstruction by norm quartile",
        "exponents": "Learned exponents",
        **({} if evaluation.texts and not record.probing else {"probing": "Sparse probing"}),
        **({"texts": "Probing of whole texts"} if evaluation.texts else {}),
        **({"recovery": "Recovery of the known dictionary"} if evaluation.recovery else {}),
        **({"features": "Features"} if any(evaluation.features.values()) or record.explained else {}),
        "training": "Training",
        **({"events": "Events"} if record.events else {}),
    }
    named = {"norms": "Norms of the activations"}
    named |= {"sinks": "Attention sinks"} if evaluation.sinks and (record.has_sinks or evaluation.texts) else {}
    named |= of_arms if record.arms else {}
    return {**named, "provenance": "Provenance"}


@functools.cache
def _environment() -> jinja2.Environment:
    """Templates with what they may call: number formats as filters, tables, figures and verdicts by name."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cosae.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: made for name, made in vars(format).items() if callable(made)} | {
        "repr": repr,
        "spelled_out": spelled_out,
    }
    environment.globals |= {
        "tables": tables,
        "sinks": sinks,
        "run_figures": run,
        "probing_figures": probing,
        "rules": RULES,
        "claims": claims,
        "answer": answer,
        "sections": sections,
        "dark": DARK,
        "policy_of": lambda run: read_record(FilterPolicy, run.filter.get("policy")),
        "arms_of": lambda record, looks: {arm: looks[arm] for arm in record.arms},
    }
    return environment
