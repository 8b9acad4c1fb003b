"""What an SAE's reconstruction costs the model it is put into.

In: a causal language model, a site, SAEs for it, held-out sequences. Out: plain numbers, nats per token.

    cross_entropy        of the next token, with the reconstruction in place of x
    increase             that, minus the model's own
    kl                   KL(model ‖ spliced)
    recovered_mean       1 − increase / increase under mean ablation (x ← the mean of the tokens replaced)
    recovered_zero       the same against zero ablation (x ← 0); 1 is the model's own loss, 0 that of the ablation

Zero ablation is the older reference and easier to beat: without the mean that every token shares a model breaks, so
that nearly everything "recovers". Read `recovered_mean`.

Measured twice: `spliced_in` "everywhere", also on attention sinks (tokens that training may have filtered; paper §9 A),
or "off_sinks", which leaves those tokens as they are; and each `over` all tokens ("sinks_in") or those that are no
sinks ("sinks_out"). Ablations replace the same tokens as the reconstruction they are compared with. Per token
everything is float64; sums do not depend on the batch size beyond what the model's own arithmetic does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cosae.activations.sample import SINKS, Sample, SinkRule
from cosae.activations.sinks import FACTOR
from cosae.errors import CosaeError
from cosae.evaluate.encoded import BATCH_TOKENS, norm_quartiles, resampling_units, row_slices
from cosae.evaluate.model.predictions import cross_entropy, divergence, logits_at, next_ids, predicting, scored_batches
from cosae.evaluate.statistics import RESAMPLES, Array, mean_or_none, ratio_interval, resample_counts
from cosae.io.progress import SILENT, Progress
from cosae.models.capture import capture_pair
from cosae.models.intervene.hooks import Intervention, Rule
from cosae.models.intervene.replacement import Replacement, SplicedSAE, Transcoding
from cosae.models.intervene.splice import transcodes
from cosae.models.intervene.window import Window
from cosae.models.sites import resolve_site
from cosae.types import Activations, Sequences, Site

PLACES = ("everywhere", "off_sinks")
ABLATIONS = ("mean", "zero")
METRICS = ("kl", "cross_entropy", "recovered_mean", "recovered_zero")
NONE = (None, None, None)


class Cost(NamedTuple):
    """(N,) float64 each, of every scored token: its cross-entropy, and the KL from the model as it is."""

    cross_entropy: Array
    kl: Array


Costs = dict[str, dict[str, Cost]]
"""place → "mean" | "zero" | "sae NAME" → cost."""


def measure_splice(
    model: nn.Module,
    site: str | Site,
    saes: Mapping[str, SplicedSAE],
    sequences: Sequences,
    *,
    target: str | Site | None = None,
    baseline: str | None = None,
    median_norm: float | None = None,
    factor: float = FACTOR,
    batch_sequences: int = 8,
    seed: int = 0,
    n_resamples: int = RESAMPLES,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Loss and KL with each SAE spliced in at one site, beside two ablations, as plain numbers.

    model            causal language model with its head, in eval mode
    saes             by name; calibrated, with the site's width
    target           the site that transcoders, which read `site`, stand in for: ablations are there as well; None for
                     SAEs
    sequences        (S, T) token sequences, padded or packed; predictions across a document's end are not scored
    baseline         the SAE that differences are taken from; the first by default
    median_norm      of which `factor` times makes a sink (so do position 0 and special ids); by default the median of
                     these tokens

    Returns site, tokens (scored ones), documents, sinks (scored ones that are sinks), model (its own cross-entropy by
    `over`), ablations[mean|zero][place][over] and saes[name][place][over] with the numbers above and
    `by_norm_quartile` (of |x| among the tokens counted), saes[name]["error_term"] (kl and increase with what the SAE
    misses put back: 0 by construction, measured all the same), and `paired`: for every SAE each metric with its 95 %
    interval, and its difference from the baseline with its own, by bootstrap over documents (blocks of tokens where
    there are not two). A recovery is None where the ablation does no harm. Changes no SAE.

    Raises CosaeError as `capture` and `spliced` do, for a baseline that is not there, and where no token predicts
    another.
    """
    if not saes:
        raise CosaeError("measure_splice needs at least one SAE by name. Got none.")
    baseline = next(iter(saes)) if baseline is None else baseline
    if baseline not in saes:
        raise CosaeError(f"the baseline must be one of the SAEs {sorted(saes)}. Got {baseline!r} instead.")
    found = resolve_site(model, site)
    replaced = found if target is None else resolve_site(model, target)
    odd = [name for name, sae in saes.items() if transcodes(sae) != (target is not None)]
    if odd:
        raise CosaeError(f"a splice is of SAEs, or with a target of transcoders alone. {odd[0]} is of the other kind.")
    pair = None if target is None else replaced
    activations = capture_pair(model, sequences, found, pair, batch_sequences=batch_sequences)
    sample = Sample.of(activations, SinkRule(factor, median_norm))
    at_N = predicting(sequences)[sequences.mask_ST]
    sink_ST = torch.zeros_like(sequences.mask_ST).masked_scatter(sequences.mask_ST, sample.sink_N)
    own_N, with_error, costs = _run(
        model, (found, replaced), saes, sequences, activations, sink_ST, batch_sequences, progress
    )
    norm_n, doc_n = activations.norm_N.cpu().double()[at_N], activations.doc_N.cpu()[at_N]
    quartiles = {over: norm_quartiles(norm_n, sample.keep(over)[at_N])[0].numpy() for over in SINKS}
    unit_n, unit = resampling_units(doc_n)
    drawn_RU = resample_counts(int(unit_n.max()) + 1, seed, n_resamples)
    how = {"unit": unit, "units": drawn_RU.shape[1], "seed": seed, "resamples": n_resamples}
    return {
        "site": found.name,
        **({} if target is None else {"target": replaced.name}),
        "tokens": len(own_N),
        "documents": len(np.unique(doc_n.numpy())),
        "sinks": int(sample.sink_N[at_N].sum()),
        "median_norm": sample.median_norm,
        "sink_factor": factor,
        "model": {over: mean_or_none(own_N[quartile_n >= 0]) for over, quartile_n in quartiles.items()},
        "ablations": {kind: _table(costs, own_N, kind, quartiles) for kind in ABLATIONS},
        "saes": {
            name: {**_table(costs, own_N, f"sae {name}", quartiles), "error_term": with_error[name]} for name in saes
        },
        "paired": [
            {"arm": name, "versus": baseline, "spliced_in": place, "over": over, "metric": metric, **row, **how}
            for place in PLACES
            for over, quartile_n in quartiles.items()
            for metric in METRICS
            for name, row in _paired(
                costs[place], own_N, metric, list(saes), baseline, quartile_n >= 0, unit_n, drawn_RU
            )
        ],
    }


def _run(
    model: nn.Module,
    sites: tuple[Site, Site],
    saes: Mapping[str, SplicedSAE],
    sequences: Sequences,
    activations: Activations,
    sink_ST: Tensor,
    batch_sequences: int,
    progress: Progress,
) -> tuple[Array, dict[str, dict[str, float | None]], Costs]:
    """The model's own cross-entropy per token, what is left with the error term, and every rule's cost per token."""
    centres = _means(activations, sink_ST[sequences.mask_ST])
    own: list[Tensor] = []
    parts: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    for rows, batch, at_ST in scored_batches(sequences, batch_sequences, progress):
        off_ST = batch.mask_ST & ~sink_ST[rows]
        clean_nV, next_n = logits_at(model, batch, at_ST), next_ids(batch, at_ST)
        own.append(cross_entropy(clean_nV, next_n))
        rules = {
            ("with error", name): _reconstruction(sites, sae, batch.mask_ST, name, True) for name, sae in saes.items()
        }
        for place, tokens_ST in zip(PLACES, (batch.mask_ST, off_ST), strict=True):
            rules[place, "mean"] = {sites[1]: _constant(centres[place], tokens_ST)}
            rules[place, "zero"] = {sites[1]: _constant(0 * centres[place], tokens_ST)}
            rules |= {
                (place, f"sae {name}"): _reconstruction(sites, sae, tokens_ST, name) for name, sae in saes.items()
            }
        for key, rule in rules.items():
            with Intervention(model, rule):
                logits_nV = logits_at(model, batch, at_ST)
            cost = cross_entropy(logits_nV, next_n), divergence(clean_nV, logits_nV)
            parts.setdefault(key, []).append(cost)
    own_N = torch.cat(own).numpy()
    costs: Costs = {}
    for (place, name), pairs in parts.items():
        costs.setdefault(place, {})[name] = Cost(*(torch.cat(column).numpy() for column in zip(*pairs, strict=True)))
    left = {
        name: {"kl": mean_or_none(cost.kl), "increase": mean_or_none(cost.cross_entropy - own_N)}
        for name, cost in costs.pop("with error").items()
    }
    return own_N, left, costs


def _reconstruction(
    sites: tuple[Site, Site], sae: SplicedSAE, tokens_ST: Tensor, name: str, error_term: bool = False
) -> dict[Site, Rule]:
    # With the error term codes are read all the same: what is measured is the machinery a user gets.
    replacement = Replacement(sae, error_term=error_term, tokens=tokens_ST, read=True, name=name)
    if transcodes(sae):
        pair = Transcoding(replacement)
        return {sites[0]: pair.note, sites[1]: pair.replace}
    return {sites[0]: lambda x, window: replacement(x, window).x}


def _constant(vector_D: Tensor, tokens_ST: Tensor) -> Rule:
    """x ← one vector at the given tokens."""

    def rule(x: Tensor, window: Window) -> Tensor:
        at = tokens_ST.to(x.device).reshape(*x.shape[:-1], 1)
        return torch.where(at, vector_D.to(x.device, x.dtype), x)

    return rule


def _means(activations: Activations, sink_N: Tensor) -> dict[str, Tensor]:
    """(D,) float64 mean of the tokens that are replaced, by place; 0 where there are none."""
    centres = {}
    x_ND = activations.x_ND if activations.y_ND is None else activations.y_ND
    for place, kept_N in zip(PLACES, (torch.ones_like(sink_N), ~sink_N), strict=True):
        sum_D = torch.zeros(x_ND.shape[1], dtype=torch.float64, device=x_ND.device)
        for rows in row_slices(len(sink_N), BATCH_TOKENS):
            sum_D += x_ND[rows][kept_N[rows].to(sum_D.device)].double().sum(0)
        centres[place] = sum_D / max(int(kept_N.sum()), 1)
    return centres


def _table(costs: Costs, own_N: Array, name: str, quartiles: Mapping[str, NDArray[np.int64]]) -> dict[str, Any]:
    """place → over → numbers."""
    return {
        place: {
            over: {
                **_numbers(costs[place], own_N, name, quartile_N >= 0),
                "by_norm_quartile": [_numbers(costs[place], own_N, name, quartile_N == q) for q in range(4)],
            }
            for over, quartile_N in quartiles.items()
        }
        for place in PLACES
    }


def _numbers(costs: dict[str, Cost], own_N: Array, name: str, in_N: NDArray[np.bool_]) -> dict[str, Any]:
    cross_entropy_n, kl_n = (column[in_N] for column in costs[name])
    increase_n = cross_entropy_n - own_N[in_N]
    numbers: dict[str, Any] = {
        "tokens": len(kl_n),
        "cross_entropy": mean_or_none(cross_entropy_n),
        "increase": mean_or_none(increase_n),
        "kl": mean_or_none(kl_n),
        "kl_median": float(np.median(kl_n)) if len(kl_n) else None,
    }
    if name not in ABLATIONS:
        for kind in ABLATIONS:
            harm = float((costs[kind].cross_entropy[in_N] - own_N[in_N]).sum())
            numbers[f"recovered_{kind}"] = 1 - float(increase_n.sum()) / harm if harm > 0 else None
    return numbers


def _paired(
    costs: dict[str, Cost],
    own_N: Array,
    metric: str,
    names: list[str],
    baseline: str,
    in_N: NDArray[np.bool_],
    unit_N: NDArray[np.int64],
    drawn_RU: Array,
) -> list[tuple[str, dict[str, float | None]]]:
    """Of each SAE the metric and its difference from the baseline, with intervals, over the tokens where in_N.

    Both are ratios of sums by unit. Resamples whose denominator is not above 0 are left out (`resamples_used` stay);
    None where there is no other.
    """

    def by_unit(value_N: Array) -> Array:
        return np.bincount(unit_N[in_N], weights=value_N[in_N], minlength=drawn_RU.shape[1]).astype(np.float64)

    if metric in ("kl", "cross_entropy"):
        below_U = by_unit(np.ones_like(own_N))
        above = {name: by_unit(getattr(costs[f"sae {name}"], metric)) for name in names}
    else:
        ablated_N = costs[metric.removeprefix("recovered_")].cross_entropy
        below_U = by_unit(ablated_N - own_N)
        above = {name: by_unit(ablated_N - costs[f"sae {name}"].cross_entropy) for name in names}
    rows = []
    for name, above_U in above.items():
        value = ratio_interval(above_U, below_U, drawn_RU, every=False)
        gap = None if name == baseline else ratio_interval(above_U - above[baseline], below_U, drawn_RU, every=False)
        row: dict[str, float | None] = dict(zip(("value", "low", "high"), value or NONE, strict=False))
        row |= zip(("difference", "difference_low", "difference_high"), gap or NONE, strict=False)
        rows.append((name, {**row, "resamples_used": value.used if value else 0}))
    return rows
