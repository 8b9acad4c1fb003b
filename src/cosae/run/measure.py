"""Everything that is measured after training, put together as one plain mapping: evaluation.json.

Held-out tokens of both kinds throughout: with attention sinks and without. Measuring changes no SAE.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from cosae.activations.filter import Filter
from cosae.activations.sinks import sink_mask
from cosae.evaluate import reconstruction
from cosae.evaluate.encoding import encode_all
from cosae.evaluate.norms import describe as norms
from cosae.evaluate.probing import tokens as probing
from cosae.evaluate.probing.ranking import EVERY_RULE
from cosae.evaluate.reconstruct import reconstruct_with_sinks
from cosae.evaluate.recovery import recovery
from cosae.recipe import Recipe
from cosae.run.dataset.dataset import Data, Sample, WorldData
from cosae.sae.calibrate import calibrate
from cosae.sae.model import SAE
from cosae.types import Activations, Codes


@torch.no_grad()
def evaluate(
    saes: Mapping[str, SAE],
    recipe: Recipe,
    data: Data,
    fitted: Filter,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """evaluation.json of trained, calibrated SAEs that saw the same stream (shape: cosae.report.page)."""
    config = recipe.evaluation
    log("capturing held-out activations")
    held_out = data.sample("held_out", config.held_out_tokens)
    activations = held_out.activations
    sink_N = sink_mask(activations, fitted.median_norm, fitted.policy.factor)
    metadata = norms.describe_norms(activations, ~fitted.keep(activations), config.seed, sink_N=sink_N)
    baseline = "standard" if "standard" in saes else next(iter(saes))
    result: dict[str, Any] = {
        "tokens": len(activations),
        "dropped_tokens": held_out.n_dropped,
        "documents": len(held_out.documents),
        "norms": metadata,
        "reconstruction": {},
        "exponents": {name: describe_exponent(sae) for name, sae in saes.items()},
        "probing": None,
        "probing_sinks_in": None,
        "recovery": None,
    }
    sums: dict[str, dict[str, reconstruction.DocumentSums]] = {"in": {}, "out": {}}
    probed = config.probing and data.has_concepts
    codes: dict[str, Codes] = {}
    for name, sae in saes.items():
        log(f"measuring reconstruction of {name}")
        recon = reconstruct_with_sinks(sae, activations, sink_N, keep_codes=probed)
        if recon.codes is not None:
            codes[name] = recon.codes
        result["reconstruction"][name] = reconstruction.measure_with_and_without_sinks(
            sae, activations, sink_N, median_norm=fitted.median_norm, recon=recon
        )
        for which in sums:
            sums[which][name] = reconstruction.per_document(recon, activations, which)
    result["paired_fve"] = [
        {**row, "sinks": which}
        for which, by_arm in sums.items()
        for row in reconstruction.paired_fve_differences(by_arm, baseline, config.seed, config.resamples)
    ]
    if held_out.truth is not None and isinstance(data, WorldData):
        result["recovery"] = {
            name: recovery(sae.W_dec.detach(), encode_all(sae, activations), data.feature_FD, held_out.truth)
            for name, sae in saes.items()
        }
    if probed:
        _probe(result, saes, codes, recipe, data, held_out, fitted, baseline, log)
    return result


def _probe(
    result: dict[str, Any],
    saes: Mapping[str, SAE],
    held_out_codes: Mapping[str, Codes],
    recipe: Recipe,
    data: Data,
    held_out: Sample,
    fitted: Filter,
    baseline: str,
    log: Callable[[str], None],
) -> None:
    """Probing with sinks out (under "probing") and in, on the same codes."""
    config = recipe.evaluation
    log("probing concepts")
    train = data.sample("train", config.probe_tokens)
    train_codes = {name: encode_all(sae, train.activations) for name, sae in saes.items()}
    untrained = untrained_baseline(saes[baseline], recipe, train.activations, fitted)
    random_codes = (encode_all(untrained, train.activations), encode_all(untrained, held_out.activations))
    found = probe_concepts(
        (train_codes, held_out_codes),
        (train, held_out),
        fitted.median_norm,
        fitted.policy.factor,
        random_arm=random_codes,
        baseline_arm=baseline if len(saes) > 1 else None,
        min_positives=config.min_positives,
        n_bootstrap=config.resamples,
        seed=config.seed,
    )
    result["probing"], result["probing_sinks_in"] = found["sinks_out"], found["sinks_in"]


def probe_concepts(
    codes: tuple[Mapping[str, Codes], Mapping[str, Codes]],
    sides: tuple[Sample, Sample],
    median: float,
    sink_factor: float,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """`probing.probe` of the token-level concepts by every rule: {"sinks_out", "sinks_in"}, on the same codes.

    codes, sides  of the train and of the held-out side; options go to `probing.probe`
    median        what `sink_factor` times makes a sink, beside position 0 and special ids
    """
    from cosae.text.concepts.labels import CONCEPTS

    train, held_out = sides
    found = {}
    for which in ("sinks_out", "sinks_in"):
        keep = [side.labelled_N.copy() for side in sides]
        if which == "sinks_out":
            for keep_N, side in zip(keep, sides, strict=True):
                keep_N &= ~sink_mask(side.activations, median, sink_factor).numpy()
        found[which] = probing.probe(
            *codes,
            train.activations,
            held_out.activations,
            train.labels_NC,
            held_out.labels_NC,
            CONCEPTS,
            rules=EVERY_RULE,
            keep_train=keep[0],
            keep_held_out=keep[1],
            **options,
        )
    return found


def untrained_baseline(sae: SAE, recipe: Recipe, activations: Activations, fitted: Filter) -> SAE:
    """An untrained SAE of the same make, initialised on data and calibrated: what random weights alone can do."""
    arm = next((arm for arm in recipe.arms if arm.name == "standard"), recipe.arms[0])
    sample_ND = activations.x_ND[fitted.keep(activations)].float()
    twin = copy.copy(arm).build(sae.d_in, sample_ND)
    calibrate(twin, sample_ND[: recipe.evaluation.calibration_tokens])
    return twin


def describe_exponent(sae: SAE) -> dict[str, Any]:
    """The exponent a: its value, or for one per feature its histogram."""
    a = sae.scale_a.detach().float().cpu()
    owner = "fixed" if sae.cfg.frame == "unit" else sae.score.family.exponent_owner  # there r = 1: a has no effect
    metadata: dict[str, Any] = {"mean": float(a.mean()), "b_mean": float(sae.scale_b.detach().mean())}
    if owner == "fixed" or a.ndim == 0:
        return {**metadata, "kind": "fixed" if owner == "fixed" else "scalar", "value": float(a.mean())}
    counts, edges = np.histogram(a.numpy(), bins=40)
    return {
        **metadata,
        "kind": "per_feature",
        "quantiles": np.quantile(a.numpy(), [0.05, 0.25, 0.5, 0.75, 0.95]).tolist(),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }
