"""Everything that is measured after training, put together as one plain mapping: evaluation.json.

Held-out tokens throughout, with attention sinks in and out. Measuring changes no SAE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cosae.activations.filter import Filter
from cosae.activations.sample import Sample, SinkRule
from cosae.evaluate import registry
from cosae.evaluate.context import Context
from cosae.evaluate.norms.describe import describe_norms
from cosae.io.progress import SILENT, Progress
from cosae.recipe import Recipe
from cosae.run.dataset.base import Dataset
from cosae.sae.calibrate import calibrate
from cosae.sae.model import SAE


def evaluate(
    saes: Mapping[str, SAE],
    recipe: Recipe,
    data: Dataset,
    fitted: Filter,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """evaluation.json of trained, calibrated SAEs that saw the same stream (shape: cosae.report.records)."""
    return measure(evaluation_context(saes, recipe, data, fitted, progress), recipe, fitted)


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
        "probing": None,
        "recovery": registry.measure_recovery(context) if held_out.truth is not None else None,
        "paired_fve": reconstruction["paired"],
    }
    if config.probing and context.data.has_concepts:
        with progress.phase("probing concepts"):
            context.untrained = untrained_baseline(
                context.firsts[context.first], recipe, context.sample("train"), fitted
            )
            result["probing"] = registry.measure_token_probing(context)
    return result


def untrained_baseline(sae: SAE, recipe: Recipe, train: Sample, fitted: Filter) -> SAE:
    """An untrained SAE of the same make, initialised on data and calibrated: what random weights alone can do."""
    arm = next((arm for arm in recipe.arms if arm.name == "standard"), recipe.arms[0])
    sample_ND = train.activations.x_ND[fitted.keep(train.activations)].float()
    baseline = arm.build(sae.d_in, sample_ND)
    calibrate(baseline, sample_ND[: recipe.evaluation.calibration_tokens])
    return baseline
