"""Everything that is measured after training, put together as one plain mapping: evaluation.json.

Held-out tokens throughout, with attention sinks in and out. Measuring changes no SAE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from cosae.activations.filter import Filter
from cosae.activations.sample import Sample, SinkRule
from cosae.browse.drawn import drawn_features
from cosae.evaluate import registry
from cosae.evaluate.context import POOLED_CONTEXT, Context, TextProbes
from cosae.evaluate.norms.describe import describe_norms
from cosae.evaluate.probing.encode_texts import draw_texts
from cosae.interop.sae_probes import datasets as sae_probes
from cosae.io.progress import SILENT, Progress
from cosae.recipe import Recipe
from cosae.run.dataset.base import Dataset
from cosae.sae.calibrate import calibrate
from cosae.sae.model import SAE
from cosae.text.labelled import LabelledTexts, read_labelled

PROBES = "sae-probes"


def evaluate(
    saes: Mapping[str, SAE],
    recipe: Recipe,
    data: Dataset,
    fitted: Filter,
    progress: Progress = SILENT,
    texts: TextProbes | None = None,
) -> dict[str, Any]:
    """evaluation.json of trained, calibrated SAEs that saw the same stream (shape: cosae.report.records).

    texts: what `text_probes` made of the recipe; made here where it is not given
    """
    context = evaluation_context(saes, recipe, data, fitted, progress)
    context.texts = text_probes(recipe, data) if texts is None else texts
    return measure(context, recipe, fitted) | {"features": shown_features(context, data)}


def text_probes(recipe: Recipe, data: Dataset) -> TextProbes:
    """The labelled sets that a recipe names, read, and how they are probed.

    Raises CosaeError for sets that cannot be read or are too small, and for data that no language model makes.
    """
    config = recipe.evaluation
    if config.texts:
        data.check_reads_texts()
    texts = TextProbes(
        sets=[one for spec in config.texts for one in labelled(spec)],
        context=min(data.resolved().context, POOLED_CONTEXT),
        max_texts=config.max_texts,
        max_classes=config.max_classes,
        seeds=config.text_splits,
        read_time=False,
        untrained=False,
    )
    draw_texts(texts)
    return texts


def labelled(spec: str, text: str = "text", label: str = "label") -> list[LabelledTexts]:
    """The labelled sets of one name: one, or all of sae-probes. text, label: columns of other sets than those."""
    if spec == PROBES or spec.startswith(f"{PROBES}:"):
        name = spec.removeprefix(PROBES).removeprefix(":")
        read = sae_probes.datasets(only=[name] if name else None, n_rows=sae_probes.USED_ROWS)
        return [LabelledTexts.of(one.name, one.texts, (int(label) for label in one.labels)) for one in read]
    return [read_labelled(spec, text=text, label=label)]


def evaluation_context(
    saes: Mapping[str, SAE], recipe: Recipe, data: Dataset, fitted: Filter, progress: Progress = SILENT
) -> Context:
    """What a run's SAEs are measured on."""
    config = recipe.evaluation
    return Context(
        arms={name: (sae,) for name, sae in saes.items()},
        data=data,
        tokens=config.held_out_tokens,
        probe_tokens=config.probe_tokens,
        rule=SinkRule(fitted.policy.factor, fitted.median_norm),
        seed=config.seed,
        resamples=config.resamples,
        min_positives=config.min_positives,
        baseline="standard" if "standard" in saes else None,
        progress=progress,
    )


@torch.no_grad()
def measure(context: Context, recipe: Recipe, fitted: Filter) -> dict[str, Any]:
    """Everything that is measured after training."""
    config, progress = recipe.evaluation, context.progress
    held_out = context.sample()
    removed_N = ~fitted.keep(held_out.activations)
    with progress.phase("measuring norms"):
        norms = describe_norms(held_out.activations, removed_N, config.seed, sink_N=held_out.sink_N)
    with progress.phase("measuring reconstruction"):
        reconstruction = registry.measure_reconstruction(context)
    result = {
        "tokens": len(held_out),
        "dropped_tokens": held_out.n_dropped,
        "documents": len(held_out.documents),
        "norms": norms,
        "reconstruction": reconstruction["saes"],
        "exponents": registry.measure_exponents(context),
        "sinks": registry.measure_sinks(context)["saes"],
        "probing": None,
        "texts": None,
        "recovery": registry.measure_recovery(context) if held_out.truth is not None else None,
        "paired_fve": reconstruction["paired"],
    }
    if config.probing and context.data.has_concepts:
        with progress.phase("probing concepts"):
            context.untrained = untrained_baseline(
                context.firsts[context.first], recipe, context.sample("train"), fitted
            )
            result["probing"] = registry.measure_token_probing(context)
    if context.texts.sets:
        with progress.phase("probing texts"):
            result["texts"] = registry.measure_probing(context)
    return result


def shown_features(context: Context, data: Dataset) -> dict[str, Any]:
    """A few features of each SAE with examples, from the codes that were measured; empty where tokens have no text."""
    if data.spell(0) is None:
        return {}
    with context.progress.phase("looking for examples of features"):
        passes = {name: context.encoded(sae) for name, sae in context.firsts.items()}
        return {name: drawn_features(one, data.around, data.spell, context.seed) for name, one in passes.items()}


def untrained_baseline(sae: SAE, recipe: Recipe, train: Sample, fitted: Filter) -> SAE:
    """An untrained SAE of the same make, initialised on data and calibrated: what random weights alone can do."""
    arm = next((arm for arm in recipe.arms if arm.name == "standard"), recipe.arms[0])
    kept = train.activations[fitted.keep(train.activations)]
    sample_ND = kept.x_ND.float()
    baseline = replace(arm, start=None).build(
        sae.d_in, sample_ND, "cpu", sae.cfg.d_out, None if kept.y_ND is None else kept.y_ND.float(), sae.cfg.sites
    )
    calibrate(baseline, sample_ND[: recipe.evaluation.calibration_tokens])
    return baseline
