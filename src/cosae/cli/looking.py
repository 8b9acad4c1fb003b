"""The verbs of `cosae` that look at what exists: inspect, audit, eval."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from cosae.cli.options import logger
from cosae.cli.stores import inspect_store
from cosae.run.requests import EvalOptions, EvalRequest


@dataclass(frozen=True)
class Inspect:
    """Show what a saved SAE is (score, selector, width, training facts), or a store of activations."""

    sae: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved SAE, or of a store."""


@dataclass(frozen=True)
class Audit:
    """Is this SAE fooled by norm? For SAEs that exist already; nothing is trained.

    Reads cosae's own folders and those of SAELens, dictionary_learning, Gemma Scope, sparsify and the paper. Answers on
    the screen; audit.json and audit.html in --out. Example: cosae audit runs/first/arms/standard
    """

    saes: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders or files of SAEs; those of one site are audited on the same tokens."""
    request: tyro.conf.OmitArgPrefixes[EvalRequest] = field(default_factory=EvalRequest)
    out: Path = Path("audit")
    """Folder for audit.json and audit.html."""
    quiet: bool = False
    """No progress display."""


@dataclass(frozen=True)
class Eval:
    """One measurement of SAEs that exist already, side by side; nothing is trained.

    MEASUREMENT is reconstruction, norms, sinks, geometry, exponents, probing, matching, discovery, splice, causal,
    patching, gradients or recovery; an SAE is [NAME=]PATH[,PATH…], several paths being SAEs of several seeds. Example:
    cosae eval probing A=run/arms/standard B=run/arms/cosine --texts reviews.jsonl
    """

    measurement: Annotated[str, tyro.conf.Positional]
    saes: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Of one site; any format that `audit` reads. The first is what the others are compared with."""
    options: tyro.conf.OmitArgPrefixes[EvalOptions] = field(default_factory=EvalOptions)
    request: tyro.conf.OmitArgPrefixes[EvalRequest] = field(default_factory=EvalRequest)
    out: Path | None = None
    """A JSON file for everything that was measured."""
    quiet: bool = False
    """No progress display."""


def inspect(command: Inspect) -> int:
    from cosae.activations.store.reader import find_stores
    from cosae.sae.file import load

    if stores := find_stores(command.sae):
        print(json.dumps([inspect_store(place) for place in stores], indent=2))
        return 0
    sae = load(command.sae)
    shown = {
        **sae.cfg.to_dict(),
        "calibrated": sae.calibrated,
        "a_mean": float(sae.scale_a.detach().mean()),
        "provenance": {k: v for k, v in sae.metadata.items() if k != "recipe"},
    }
    print(json.dumps(shown, indent=2))
    return 0


def audit(command: Audit) -> int:
    from cosae.report.audit import audit_text
    from cosae.run.audit import run_audit

    print(audit_text(run_audit(command.saes, command.request, command.out, logger(command.quiet))))
    print(f"\nReport: {command.out / 'audit.html'}")
    return 0


def evaluate(command: Eval) -> int:
    from cosae.run.evaluate import evaluate, screen

    asked = command.measurement, command.saes, command.request, command.options
    print(screen(evaluate(*asked, out=command.out, log=logger(command.quiet))))
    return 0
