"""The commands of `cosae` for SAEs and stores that exist: inspect, audit, eval, calibrate."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from cosae.cli.options import progress
from cosae.cli.stores import inspect_store
from cosae.run.requests import EvalOptions, EvalRequest


@dataclass(frozen=True)
class Inspect:
    """Print as JSON what a saved SAE is (score, selector, width, provenance), all SAEs of a run, or a store."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved SAE, of a run or of a store."""


@dataclass(frozen=True)
class Audit:
    """Test whether the features of saved SAEs follow content or norm. Nothing is trained.

    Reads SAEs of cosae, SAELens, dictionary_learning, sparsify, Gemma Scope and the paper. Prints the answers, and
    writes audit.json and audit.html to --out. Example: cosae audit runs/first/arms/standard
    """

    saes: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders or files of SAEs, or a run's folder for all of its SAEs. Those of one site get the same tokens."""
    request: Annotated[EvalRequest, tyro.conf.arg(name="")] = field(default_factory=EvalRequest)
    out: Path = Path("audit")
    """Folder for audit.json and audit.html."""
    quiet: bool = False
    """Do not print progress."""


@dataclass(frozen=True)
class Eval:
    """Measure saved SAEs side by side. Nothing is trained.

    The measurement is one of reconstruction, norms, sinks, geometry, exponents, probing, matching, discovery, splice,
    causal, patching, gradients, recovery. An SAE is [NAME=]PATH[,PATH…]; several paths are SAEs of different seeds. A
    run's folder stands for all of its SAEs.
    Example: cosae eval probing A=run/arms/standard B=run/arms/cosine --texts reviews.jsonl
    """

    measurement: Annotated[str, tyro.conf.Positional]
    """What to measure."""
    saes: Annotated[tuple[str, ...], tyro.conf.Positional]
    """SAEs of one site, of any format that `audit` reads, or a run's folder. The others are compared with the first."""
    options: Annotated[EvalOptions, tyro.conf.arg(name="")] = field(default_factory=EvalOptions)
    request: Annotated[EvalRequest, tyro.conf.arg(name="")] = field(default_factory=EvalRequest)
    out: Path | None = None
    """JSON file for all numbers."""
    quiet: bool = False
    """Do not print progress."""


@dataclass(frozen=True)
class Calibrate:
    """Set a saved SAE's threshold anew on a text, and write it as a new SAE. No weight changes.

    A threshold that gives L0 32 on one text gives another L0 on others. Reads the formats of `audit`, writes cosae's.
    Prints L0 and reconstruction before and after, on tokens that set no threshold.
    Example: cosae calibrate runs/first/arms/standard --corpus my_texts/ --out standard_on_my_texts
    """

    sae: Annotated[Path, tyro.conf.Positional]
    """Folder or file of an SAE, of any format that cosae reads. It is left as it is."""
    out: Path
    """Folder for the new SAE; nothing may be there."""
    k: float | None = None
    """Mean number of features to fire per token, sinks left out. Default: what its file was calibrated to, else its
    own k."""
    jumprelu: bool = False
    """Write a topk or batch_topk SAE as jumprelu: a threshold for each feature, by which it fires as often on the text
    as before."""
    request: Annotated[EvalRequest, tyro.conf.arg(name="")] = field(default_factory=EvalRequest)
    quiet: bool = False
    """Do not print progress."""


def inspect(command: Inspect) -> int:
    from cosae.activations.store.reader import find_stores
    from cosae.run.saes import saes_in

    if stores := find_stores(command.source):
        print(json.dumps([inspect_store(place) for place in stores], indent=2))
        return 0
    found = {name: _inspected(path) for name, path in saes_in(command.source).items()}
    print(json.dumps(found or _inspected(command.source), indent=2))
    return 0


def _inspected(path: Path) -> dict[str, Any]:
    from cosae.sae.file import load

    sae = load(path)
    measured = {"calibrated": sae.calibrated, "a_mean": float(sae.scale_a.detach().mean())}
    if sae.value_exponent is not None:
        measured["value_exponent_mean"] = float(sae.value_exponent.detach().mean())
    provenance = {k: v for k, v in sae.metadata.items() if k != "recipe"}
    return {**sae.cfg.to_dict(), **measured, "provenance": provenance}


def audit(command: Audit) -> int:
    from cosae.report.audit import audit_text
    from cosae.run.audit import run_audit

    print(audit_text(run_audit(command.saes, command.request, command.out, progress(command.quiet))))
    print(f"\nReport: {command.out / 'audit.html'}")
    return 0


def evaluate(command: Eval) -> int:
    from cosae.run.evaluate import evaluate, screen

    asked = command.measurement, command.saes, command.request, command.options
    print(screen(evaluate(*asked, out=command.out, progress=progress(command.quiet))))
    return 0


def calibrate(command: Calibrate) -> int:
    from cosae.run.explore.calibrate import recalibrate, screen

    asked = command.sae, command.request, command.out, command.k, progress(command.quiet), command.jumprelu
    print(screen(recalibrate(*asked)))
    return 0
