"""Every measurement: its function, what it needs, what its table shows.

`cosae eval` offers these by name, a run measures some of them when it ends, an audit a few on one SAE. A measurement
takes a `Context` and returns plain numbers that JSON can hold; it takes samples and passes from the context alone, so
that the perturbation and the sinks reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from cosae.activations.sample import SINKS
from cosae.errors import CosaeError
from cosae.evaluate import geometry, gradients, reconstruction, tables
from cosae.evaluate.context import SIDES, Context
from cosae.evaluate.encoded import resampling_units
from cosae.evaluate.matching.compare import compare_discovery, compare_features
from cosae.evaluate.model import causal, patching, splice
from cosae.evaluate.norms.driven import firing_norms, norm_driven, paired_norm_differences
from cosae.evaluate.norms.sinks import sink_metrics
from cosae.evaluate.probing import tokens as token_probing
from cosae.evaluate.probing.encode_texts import encode_texts
from cosae.evaluate.probing.ranking import EVERY_RULE
from cosae.evaluate.probing.texts import TOPS, probe_texts
from cosae.evaluate.recovery import recovery

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """One row of the registry.

    measure  Context → plain numbers
    reads    tokens: activations, from wherever they come; model: runs the model itself, where nothing can be injected;
             weights: the SAEs alone
    needs    two_arms: exactly two, several seeds of the first being what the second is held against;
             concepts: labels of every token, or labelled texts; truth: a synthetic world
    tables   the numbers one looks at first, as captions and rows
    """

    measure: Callable[[Context], Numbers]
    tables: Callable[[Mapping[str, Any]], Iterator[tables.Table]]
    reads: Literal["tokens", "model", "weights"] = "tokens"
    needs: frozenset[str] = frozenset()


def measure_reconstruction(context: Context) -> Numbers:
    """Reconstruction of every SAE, and paired differences of the FVE with sinks out and in."""
    saes: Numbers = {}
    sums: dict[str, dict[str, reconstruction.DocumentSums]] = {sinks: {} for sinks in SINKS}
    for name, sae in context.firsts.items():
        encoded = context.encoded(sae)
        saes[name] = reconstruction.measure(encoded)
        for sinks in SINKS:
            if bool(encoded.keep[sinks].any()):
                sums[sinks][name] = reconstruction.per_document(encoded, sinks)
    paired = [
        {**row, "sinks": sinks}
        for sinks in reversed(SINKS)
        for row in reconstruction.paired_fve_differences(sums[sinks], context.first, context.seed, context.resamples)
    ]
    return {"saes": saes, "paired": paired}


def measure_norms(context: Context) -> Numbers:
    """Which firings are driven by norm, and where in the norms features fire."""
    saes: Numbers = {}
    for name, sae in context.firsts.items():
        encoded = context.encoded(sae)
        test = norm_driven(encoded, context.at_median(sae), context.seed)
        saes[name] = {"norm_driven": _pooled(test), "firing_norms": _pooled(firing_norms(encoded))}
    medians = {name: context.at_median(sae) for name, sae in context.firsts.items()}
    unit = resampling_units(context.sample().activations.doc_N)[1]
    return {"saes": saes, "paired": paired_norm_differences(medians, unit, baseline=context.first, seed=context.seed)}


def _pooled(found: Numbers) -> Numbers:
    """Without what is said of each feature."""
    for sinks in SINKS:
        found[sinks] = {k: v for k, v in (found[sinks] or {}).items() if k != "per_feature"} or None
    return found


def measure_sinks(context: Context) -> Numbers:
    """What sinks look like, and what each SAE does on them."""
    return {"saes": {name: sink_metrics(context.encoded(sae)) for name, sae in context.firsts.items()}}


def measure_geometry(context: Context) -> Numbers:
    """Decoder and encoder rows."""
    return {"saes": {name: geometry.geometry(sae) for name, sae in context.firsts.items()}}


def measure_exponents(context: Context) -> Numbers:
    """The exponent a of every SAE: its value, or for one per feature its histogram; the mean of value exponents."""
    return {name: _exponent(sae) for name, sae in context.firsts.items()}


def _exponent(sae: Any) -> Numbers:
    a = sae.scale_a.detach().float().cpu()
    owner = "fixed" if sae.cfg.frame == "unit" else sae.score.family.exponent_owner  # there r = 1: a has no effect
    known: Numbers = {"mean": float(a.mean()), "b_mean": float(sae.scale_b.detach().mean())}
    if sae.value_exponent is not None:
        known["value_exponent"] = float(sae.value_exponent.detach().mean())
    if owner == "fixed" or a.ndim == 0:
        return {**known, "kind": "fixed" if owner == "fixed" else "scalar", "value": float(a.mean())}
    counts, edges = np.histogram(a.double().numpy(), bins=40)  # in fp32 their range may be too narrow for so many
    return {
        **known,
        "kind": "per_feature",
        "quantiles": np.quantile(a.numpy(), [0.05, 0.25, 0.5, 0.75, 0.95]).tolist(),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def measure_recovery(context: Context) -> Numbers:
    """How much of a synthetic world's true features each SAE found. Raises CosaeError where they are not known."""
    sample = context.sample()
    if sample.truth is None or sample.feature_FD is None:
        raise CosaeError("true features are known for synthetic worlds alone: name an SAE that was trained on one.")
    truth, feature_FD = sample.truth, sample.feature_FD
    return {
        name: dict(recovery(sae.W_dec.detach(), context.encoded(sae).codes, feature_FD, truth))
        for name, sae in context.firsts.items()
    }


def measure_probing(context: Context) -> Numbers:
    """Probes of labelled texts where there are any, else of the token-level concepts."""
    if context.texts.sets:
        texts, tops, progress = context.texts, context.tops or TOPS, context.progress
        pooled = encode_texts(texts, context.arms, context.data, context.rule.factor, progress)
        options: dict[str, Any] = {"seed": context.seed, "n_resamples": context.resamples, "baseline": context.baseline}
        found = probe_texts(pooled, tops=tops, seeds=texts.seeds, progress=progress, **options)
        return {"kind": "texts", **found}
    return {"kind": "tokens", **measure_token_probing(context)}


def measure_token_probing(context: Context) -> Numbers:
    """Latents chosen on training files, scored on held-out ones: {"sinks_out", "sinks_in"}, on the same codes."""
    if not context.data.has_concepts:
        raise CosaeError(
            "token-level concepts are known for the corpora pylib and digits alone: give labelled texts with --texts."
        )
    train, held_out = context.sample("train"), context.sample()
    on_train, on_held_out = (
        {name: context.encoded(sae, side).codes for name, sae in context.firsts.items()} for side in SIDES
    )
    floor = context.untrained
    random_arm = None if floor is None else (context.encoded(floor, "train").codes, context.encoded(floor).codes)
    found = {}
    for sinks in SINKS:
        found[sinks] = token_probing.probe(
            on_train,
            on_held_out,
            train.activations,
            held_out.activations,
            train.labels_NC,
            held_out.labels_NC,
            context.data.concepts,
            rules=EVERY_RULE,
            keep_train=train.labelled_N & train.keep(sinks).numpy(),
            keep_held_out=held_out.labelled_N & held_out.keep(sinks).numpy(),
            random_arm=random_arm,
            baseline_arm=context.first if len(context.arms) > 1 else None,
            min_positives=context.least_positives,
            n_bootstrap=context.resamples,
            tops=context.tops or (1,),
            seed=context.seed,
            progress=context.progress,
        )
    return found


def measure_splice(context: Context) -> Numbers:
    """What the model loses with each SAE in its place."""
    batch = context.data.sequences("held_out", len(context.sample()))
    return splice.measure_splice(
        context.data.model,
        context.site,
        context.firsts,
        batch,
        target=context.data.target,
        median_norm=context.sample().median_norm,
        factor=context.rule.factor,
        seed=context.seed,
        progress=context.progress,
    )


def measure_causal(context: Context) -> Numbers:
    """What ablating and steering single features does to the model."""
    data, found = context.data, {}
    batch = data.sequences("held_out", len(context.sample()))
    for name, sae in context.firsts.items():
        features = context.features or _most_firing(context.encoded(sae).codes)
        options: dict[str, Any] = {"seed": context.seed, "progress": context.progress}
        found[name] = {
            "ablation": causal.measure_ablation(data.model, context.site, sae, batch, features, **options),
            "steering": causal.measure_steering(data.model, context.site, sae, batch, features, **options),
        }
    return {"saes": found}


def _most_firing(codes: Any, n: int = 8) -> list[int]:
    counts = torch.bincount(codes.feature_E, minlength=codes.d_sae)
    return sorted(torch.argsort(counts, descending=True, stable=True)[:n].tolist())


def measure_patching(context: Context) -> Numbers:
    """Changes of equal size in direction and in norm at the SAEs' site: no SAE enters but for its site."""
    batch = context.data.sequences("held_out", len(context.sample()))
    median, factor = context.sample().median_norm, context.rule.factor
    options: dict[str, Any] = {"median_norm": median, "factor": factor, "seed": context.seed}
    return patching.measure_patching(context.data.model, context.site, batch, **options)


def measure_gradients(context: Context) -> Numbers:
    """Which norm quartiles teach the encoder."""
    sample, found = context.sample(), {}
    for name, sae in context.firsts.items():
        sides = {sinks: sample.activations[sample.keep(sinks)] for sinks in SINKS}
        found[name] = {s: gradients.measure_gradients(sae, x, seed=context.seed) for s, x in sides.items()}
    return {"saes": found}


REGISTRY: Mapping[str, Measurement] = {
    "reconstruction": Measurement(measure_reconstruction, tables.reconstruction),
    "norms": Measurement(measure_norms, tables.norms),
    "sinks": Measurement(measure_sinks, tables.sinks),
    "geometry": Measurement(measure_geometry, tables.geometry, reads="weights"),
    "exponents": Measurement(measure_exponents, tables.exponents, reads="weights"),
    "probing": Measurement(measure_probing, tables.probing, needs=frozenset({"concepts"})),
    "matching": Measurement(compare_features, tables.matching, needs=frozenset({"two_arms"})),
    "discovery": Measurement(compare_discovery, tables.discovery, needs=frozenset({"two_arms", "concepts"})),
    "splice": Measurement(measure_splice, tables.splice, reads="model"),
    "causal": Measurement(measure_causal, tables.causal, reads="model"),
    "patching": Measurement(measure_patching, tables.patching, reads="model"),
    "gradients": Measurement(measure_gradients, tables.gradients),
    "recovery": Measurement(measure_recovery, tables.recovery, needs=frozenset({"truth"})),
}
"""Name → measurement."""
