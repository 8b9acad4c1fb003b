"""The verbs of `cosae` that look at what exists: inspect, audit, eval."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from cosae.cli.options import logger
from cosae.cli.stores import inspect_store


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
    model: str | None = None
    """embedded, a folder of a Hugging Face model or a repository; default: what the SAE's file says."""
    site: str | None = None
    """Where the SAE reads, such as resid_post.5; default: what its file says."""
    corpus: str | None = None
    """Text to run the model on, as for train; default: what the SAE's file says, else pylib."""
    activations: str | None = None
    """A .safetensors, .npy or .parquet file of N × d vectors instead of a model."""
    store: str | None = None
    """A folder of stored activations (cosae capture) instead of a model."""
    store_site: str | None = None
    tokens: int = 32_768
    context: int | None = None
    """Tokens per sequence."""
    inject: str | None = None
    """Norm perturbation put on the activations first, such as log_normal:sigma=0.5: what if norms varied so?"""
    sink_factor: float = 10.0
    """Tokens of at least this multiple of the median norm are sinks, beside position 0 and special ids."""
    format: str = "auto"
    """Format of the files; auto looks at them."""
    device: str = "cpu"
    seed: int = 0
    out: Path = Path("audit")
    """Folder for audit.json and audit.html."""
    quiet: bool = False


@dataclass(frozen=True)
class Eval:
    """One measurement of SAEs that exist already, side by side; nothing is trained.

    MEASUREMENT is reconstruction, norms, sinks, geometry, probing, matching, discovery, splice, causal, patching or
    gradients; an SAE is [NAME=]PATH[,PATH…], several paths being SAEs of several seeds. Example: cosae eval probing
    A=run/arms/standard B=run/arms/cosine --texts reviews.jsonl
    """

    measurement: Annotated[str, tyro.conf.Positional]
    saes: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Of one site; any format that `audit` reads. The first is what the others are compared with."""
    texts: tuple[str, ...] = ()
    """probing: labelled sets: .jsonl, .parquet, a folder of datasets' save_to_disk, hf:DATASET[:CONFIG][:SPLIT], or
    sae-probes[:NAME]; default: the token-level concepts of the embedded corpus."""
    text_column: str = "text"
    label_column: str = "label"
    seeds: int = 3
    """probing texts: splits drawn."""
    max_texts: int = 2000
    """probing texts: of one question, train and test together."""
    top: tuple[int, ...] = ()
    """probing: features of a probe; default 1 2 5 for texts, 1 for token-level concepts, where each other number is a
    regression for every concept and rule."""
    pooling: str = "mean"
    """probing texts: mean over tokens, or last."""
    features: tuple[int, ...] = ()
    """causal: features to ablate and steer; default: the eight that fire most."""
    model: str | None = None
    """embedded, a folder of a Hugging Face model or a repository; default: what the SAE's file says."""
    site: str | None = None
    corpus: str | None = None
    """Text to run the model on, as for train."""
    activations: str | None = None
    """A .safetensors, .npy or .parquet file of N × d vectors instead of a model."""
    store: str | None = None
    """A folder of stored activations (cosae capture) instead of a model."""
    store_site: str | None = None
    tokens: int | None = None
    """Held-out tokens; default 32 768, for splice, causal and patching 4096."""
    context: int | None = None
    """Tokens per sequence; of a labelled text its first 128 by default."""
    inject: str | None = None
    sink_factor: float = 10.0
    format: str = "auto"
    device: str = "cpu"
    seed: int = 0
    out: Path | None = None
    """A JSON file for everything that was measured."""
    quiet: bool = False


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
    from cosae.run.dataset.existing import EvalRequest

    request = EvalRequest(**{f.name: getattr(command, f.name) for f in fields(EvalRequest)})
    print(audit_text(run_audit(command.saes, request, command.out, logger(command.quiet))))
    print(f"\nReport: {command.out / 'audit.html'}")
    return 0


def evaluate(command: Eval) -> int:
    from cosae.run.dataset.existing import EvalRequest
    from cosae.run.dataset.labelled import Reading
    from cosae.run.evaluate import Texts, judge, tokens_of
    from cosae.run.evaluate_screen import screen

    given = {f.name: getattr(command, f.name) for f in fields(EvalRequest) if f.name != "tokens"}
    request = EvalRequest(tokens=tokens_of(command.measurement, command.tokens), **given)
    reading = Reading(command.context or Reading.context, command.pooling, command.sink_factor)
    drawn = (command.max_texts, command.seeds, command.top)
    texts = Texts(command.texts, command.text_column, command.label_column, *drawn, reading)
    log = logger(command.quiet)
    options: dict[str, Any] = {"texts": texts, "features": command.features, "out": command.out, "log": log}
    print(screen(judge(command.measurement, command.saes, request, **options)))
    return 0
