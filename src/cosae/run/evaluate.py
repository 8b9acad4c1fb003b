"""`cosae eval`: one measurement of SAEs that exist already, on activations of their site. Nothing is trained.

paths → SAEs by arm → the dataset of their site → a row of evaluate.registry → plain numbers, and tables of them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cosae.errors import CosaeError, check_choice
from cosae.evaluate import l0
from cosae.evaluate.context import POOLED_CONTEXT, Context, TextProbes
from cosae.evaluate.probing.encode_texts import draw_texts
from cosae.evaluate.registry import REGISTRY
from cosae.interop.read import read_sae
from cosae.io.progress import SILENT, Progress
from cosae.report.terminal import printable, text_table
from cosae.run import provenance
from cosae.run.folder import write_json
from cosae.run.identity import warn_elsewhere
from cosae.run.measure import labelled
from cosae.run.plan.check import check_measuring
from cosae.run.requests import EvalOptions, EvalRequest
from cosae.run.saes import TOKENS, Datasets, calibrated, describe, every_sae, names_of, saes_in
from cosae.sae.model import SAE

FORMAT, VERSION = "cosae-eval", 2
MODEL_TOKENS = 4096
"""Tokens where a measurement runs the model and none are asked for: each SAE or change costs the model's passes."""


def evaluate(
    measurement: str,
    sae_specs: Sequence[str],
    request: EvalRequest | None = None,
    options: EvalOptions | None = None,
    *,
    out: Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """One measurement of the SAEs asked for; returns what the JSON file `out` holds, and writes it if given.

    measurement  a name in evaluate.registry.REGISTRY
    sae_specs    [NAME=]PATH[,PATH…] for each arm: several paths are SAEs of several seeds (probing averages over them,
                 matching and discovery hold the second arm against the others of the first, all else reads the first);
                 the folder of a run stands for all of its SAEs

    Raises CosaeError for an unknown measurement, a path that holds no SAE, SAEs of different sites, a measurement that
    needs what is not there (the model, labels, tokens), and a place that cannot be written.
    """
    request, options = request or EvalRequest(), options or EvalOptions()
    request.check()
    options.check()
    check_choice("a measurement", measurement, REGISTRY)
    options.check_applies(measurement)
    if out is not None and (out.is_dir() or not out.parent.exists()):
        raise CosaeError(f"{out} cannot be written: give a file in a folder that exists with --out.")
    row = REGISTRY[measurement]
    if request.inject is not None and row.reads != "tokens":
        what = "runs the model itself, in which nothing is injected" if row.reads == "model" else "reads weights alone"
        raise CosaeError(f"{measurement} {what}: drop --inject.")
    if row.reads == "weights" and request.sink_factor != EvalRequest.sink_factor:
        raise CosaeError(f"{measurement} reads weights alone: drop --sink-factor.")
    tokens = request.tokens or (MODEL_TOKENS if row.reads == "model" else TOKENS)
    with Datasets(request, tokens, progress) as datasets:
        context, source, warnings = _open(sae_specs, datasets, options)
        if row.reads == "model":
            _ = context.data.model  # refused before anything is measured
        elif row.reads == "tokens" and not context.texts.sets:
            saes = list(context.firsts.values())
            check_measuring(saes, context.sample(), request.device, at_median=measurement == "norms")
        with progress.phase(f"measuring {measurement}"), torch.no_grad():
            found = row.measure(context)
            fired = _l0(context, found) if row.reads != "weights" else {}
    for name, one in fired.items():
        if one["differs"]:
            said = [warnings.get(name), f"{l0.said(one)}; cosae calibrate sets it on this one"]
            warnings[name] = "; ".join(filter(None, said))
    result = {
        "format": FORMAT,
        "version": VERSION,
        "measurement": measurement,
        **provenance.stamp(),
        "seed": request.seed,
        "source": source,
        "saes": {name: [sae.cfg.to_dict() for sae in listed] for name, listed in context.arms.items()},
        "warnings": warnings,
        "l0": fired,
        "found": found,
    }
    if out is not None:
        write_json(out, result, "make room, or choose another --out")
    return result


def _open(
    sae_specs: Sequence[str], datasets: Datasets, options: EvalOptions
) -> tuple[Context, dict[str, Any], dict[str, str]]:
    """What to measure on, where its tokens come from, and warnings by arm."""
    request, progress = datasets.request, datasets.progress
    texts = TextProbes(
        sets=[one for spec in options.texts for one in labelled(spec, options.text_column, options.label_column)],
        context=request.context or POOLED_CONTEXT,
        pooling=options.pooling,
        max_texts=options.max_texts,
        seeds=options.seeds,
    )
    draw_texts(texts)  # sets that are too small are refused before anything is encoded
    arms: dict[str, list[SAE]] = {}
    warnings: dict[str, str] = {}
    dataset = sample = None
    for name, paths in _paths(sae_specs).items():
        arms[name] = []
        for path in paths:
            with progress.phase(f"activations for {name}"):
                sae = read_sae(path, format=request.format, device=request.device)
                mine, sample = datasets.of(sae, path)
            if dataset is not None and mine is not dataset:
                what = f"{path} reads another site or corpus than the SAEs before it"
                raise CosaeError(f"{what}: measure them apart, or name one --model and --site.")
            dataset = mine
            elsewhere = warn_elsewhere(name, sae.metadata, mine)
            sae, warning = calibrated(sae, sample)
            arms[name].append(sae)
            said = [text for text in (warnings.get(name), elsewhere, warning) if text]
            warnings |= {name: "; ".join(dict.fromkeys(said))} if said else {}
    assert dataset is not None
    assert sample is not None
    context = Context(
        arms=arms,
        data=dataset,
        tokens=len(sample),
        rule=request.rule,
        seed=request.seed,
        features=options.features,
        tops=options.top,
        texts=texts,
        progress=progress,
    )
    context.put(sample)
    return context, describe(dataset, sample, request), warnings


def _l0(context: Context, found: Any) -> dict[str, dict[str, Any]]:
    """L0 on the text at hand of the SAEs whose files say what they were calibrated to; of labelled texts, where those
    were read."""
    known = {name: sae for name, sae in context.firsts.items() if "l0_calibrated" in sae.metadata}
    if context.texts.sets:
        return {
            f"{name} on {one['name']}": l0.beside_calibrated(one["l0"][name], sae.metadata)
            for one in found["sets"]
            for name, sae in known.items()
        }
    return {name: l0.measure(context.encoded(sae), sae.metadata) for name, sae in known.items()}


def _paths(sae_specs: Sequence[str]) -> dict[str, list[Path]]:
    """Arms as they were asked for. Raises CosaeError for none, and for one name twice."""
    if not sae_specs:
        raise CosaeError("give at least one SAE: cosae eval MEASUREMENT SAE…")
    named: list[tuple[str | None, list[Path]]] = []
    for text in sae_specs:
        name, equals, rest = text.partition("=")
        if Path(text).exists():
            named += [(None, [path]) for path in every_sae([Path(text)])]
            continue
        paths = [Path(p) for p in (rest if equals else text).split(",")]
        for path in paths:
            if len(found := saes_in(path)) > 1:
                raise CosaeError(f"{path} holds several SAEs: name one of them: {', '.join(map(str, found.values()))}.")
        named.append((name if equals else None, every_sae(paths)))
    shortest = names_of([listed[0] for _, listed in named])
    arms = {given or short: listed for (given, listed), short in zip(named, shortest, strict=True)}
    if len(arms) < len(named):
        raise CosaeError("two SAEs were given one name: name them apart with NAME=PATH.")
    return arms


def _worse_than_mean(found: Any) -> bool:
    """Whether the mean would do better than the reconstruction: by the FVE, or by the loss where it is spliced."""
    found = found if isinstance(found, dict) else {}
    places = [found.get("sinks_out"), (found.get("everywhere") or {}).get("sinks_in")]
    known = [place.get(key) for place in places if isinstance(place, dict) for key in ("fve", "recovered_mean")]
    return any(value is not None and value < 0 for value in known)


def _l0_table(fired: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [(name, one["calibrated"], one["sinks_out"], one["sinks_in"]) for name, one in fired.items()]
    head = ("SAE", "calibrated to", "here, sinks out", "sinks in")
    return text_table(head, rows, title="L0", formats=("", ".1f", ".1f", ".1f"), align="lrrr")


def screen(result: Mapping[str, Any]) -> str:
    """Every table of a measurement, and the warnings on SAEs whose file held no threshold, for a terminal."""
    shown = [printable(f"{key}: {value}") for key, value in result["warnings"].items()]
    if fired := result.get("l0"):
        shown.append(_l0_table(fired))
    for caption, (head, *rows) in REGISTRY[result["measurement"]].tables(result["found"]):
        shown.append(text_table(head, rows, title=caption, align="l" * len(head)))
    for name, found in (result["found"].get("saes") or {}).items():
        if name in result["warnings"] and _worse_than_mean(found):
            shown.append(printable(f"{name} is worse than the mean here: {result['warnings'][name]}"))
    return "\n\n".join(shown)
