"""What an SAE's reconstruction costs the model it is put into.

In: a causal language model, a site, SAEs for it, held-out sequences. Out: plain numbers, nats per token.

    cross_entropy        of the next token, with the reconstruction in place of x
    increase             that, minus the model's own
    kl                   KL(model ‖ spliced)
    recovered_mean       1 − increase / increase under mean ablation (x ← the mean of the tokens replaced)
    recovered_zero       the same against zero ablation (x ← 0); 1 is the model's own loss, 0 that of the ablation

Zero ablation is the field's older yardstick and easier to beat: take out the mean that every token shares and a model
breaks, so that nearly everything "recovers". Read the first.

Twice over: `spliced_in` "everywhere", also on attention sinks (tokens that training may have filtered; paper §9 A), or
"off_sinks", which leaves those tokens as they are; and each `over` all tokens ("sinks_in") or those that are none
("sinks_out"). Ablations are made at the same tokens as the reconstruction they are held against. Per token everything
is float64; sums do not depend on the batch size beyond what the model's own arithmetic does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cosae.activations.sinks import sink_mask
from cosae.errors import CosaeError
from cosae.evaluate.model.predictions import cross_entropy, divergence, logits_at, next_ids, predicting
from cosae.evaluate.model.splice_numbers import ABLATIONS, PLACES, PerToken, mean, paired, table, units
from cosae.evaluate.reconstruct import CHUNK_TOKENS, norm_quartiles, row_slices
from cosae.evaluate.statistics import RESAMPLES, Array
from cosae.models.capture import capture
from cosae.models.intervene.hooks import Intervention, Rule, find_site
from cosae.models.intervene.replacement import Replacement, SplicedSAE
from cosae.models.intervene.window import Window
from cosae.types import Activations, Sequences, Site


def measure_splice(
    model: nn.Module,
    site: str | Site,
    saes: Mapping[str, SplicedSAE],
    sequences: Sequences,
    *,
    baseline: str | None = None,
    median_norm: float | None = None,
    factor: float = 10.0,
    batch_sequences: int = 8,
    seed: int = 0,
    n_resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Loss and KL with each SAE spliced in at one site, beside two ablations, as plain numbers.

    model            causal language model with its head, in eval mode
    saes             by name; calibrated, with the site's width
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
    found = find_site(model, site)
    activations = capture(model, sequences, found, batch_sequences)[found.name]
    median = float(activations.norm_N.double().median()) if median_norm is None else median_norm
    sink_N = sink_mask(activations, median, factor).cpu()
    at_N = predicting(sequences)[sequences.mask_ST]
    if not bool(at_N.any()):
        raise CosaeError("no token here predicts another of its document: give sequences of two tokens and more.")
    sink_ST = torch.zeros_like(sequences.mask_ST).masked_scatter(sequences.mask_ST, sink_N)
    own_N, with_error, values = _run(model, found, saes, sequences, activations, sink_ST, batch_sequences)
    sets = {"sinks_in": torch.ones_like(at_N)[at_N], "sinks_out": ~sink_N[at_N]}
    quartiles = {
        over: norm_quartiles(activations.norm_N.cpu().double()[at_N], kept_N)[0].numpy()
        for over, kept_N in sets.items()
    }
    unit_N, unit = units(activations.doc_N.cpu()[at_N].numpy())
    return {
        "site": found.name,
        "tokens": len(own_N),
        "documents": len(np.unique(activations.doc_N.cpu()[at_N].numpy())),
        "sinks": int(sink_N[at_N].sum()),
        "median_norm": median,
        "sink_factor": factor,
        "model": {over: mean(own_N[kept.numpy()]) for over, kept in sets.items()},
        "ablations": {kind: table(values, own_N, kind, quartiles) for kind in ABLATIONS},
        "saes": {
            name: {**table(values, own_N, f"sae {name}", quartiles), "error_term": with_error[name]} for name in saes
        },
        "paired": paired(values, own_N, quartiles, list(saes), baseline, unit_N, unit, seed, n_resamples),
    }


def _run(
    model: nn.Module,
    site: Site,
    saes: Mapping[str, SplicedSAE],
    sequences: Sequences,
    activations: Activations,
    sink_ST: Tensor,
    batch_sequences: int,
) -> tuple[Array, dict[str, dict[str, float | None]], PerToken]:
    """The model's own cross-entropy per token, what is left with the error term, and everything per token."""
    centres = _means(activations, sink_ST[sequences.mask_ST])
    own: list[Tensor] = []
    parts: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    with_error: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in saes}
    for start in range(0, len(sequences), batch_sequences):
        batch = sequences[start : start + batch_sequences]
        at_ST = predicting(batch)
        if not bool(at_ST.any()):
            continue
        clean_nV, next_n = logits_at(model, batch, at_ST), next_ids(batch, at_ST)
        own.append(cross_entropy(clean_nV, next_n))

        def changed(rule: Rule) -> tuple[Tensor, Tensor]:
            with Intervention(model, {site: rule}):
                logits_nV = logits_at(model, batch, at_ST)  # noqa: B023  called before the batch moves on
            return cross_entropy(logits_nV, next_n), divergence(clean_nV, logits_nV)  # noqa: B023

        for place in PLACES:
            sinks_ST = sink_ST[start : start + batch_sequences]
            tokens_ST = batch.mask_ST & ~sinks_ST if place == "off_sinks" else batch.mask_ST
            rules = {"mean": _constant(centres[place], tokens_ST), "zero": _constant(0 * centres[place], tokens_ST)}
            rules |= {f"sae {name}": _reconstruction(sae, tokens_ST, name) for name, sae in saes.items()}
            for name, rule in rules.items():
                parts.setdefault((place, name), []).append(changed(rule))
        for name, sae in saes.items():
            with_error[name].append(changed(_reconstruction(sae, batch.mask_ST, name, error_term=True)))
    own_N = torch.cat(own).numpy()
    values: PerToken = {place: {} for place in PLACES}
    for (place, name), pairs in parts.items():
        values[place][name] = _joined(pairs)
    left = {}
    for name, pairs in with_error.items():
        one = _joined(pairs)
        left[name] = {"kl": mean(one["kl"]), "increase": mean(one["cross_entropy"] - own_N)}
    return own_N, left, values


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Array]:
    return {
        "cross_entropy": torch.cat([pair[0] for pair in pairs]).numpy(),
        "kl": torch.cat([pair[1] for pair in pairs]).numpy(),
    }


def _reconstruction(sae: SplicedSAE, tokens_ST: Tensor, name: str, error_term: bool = False) -> Rule:
    # With the error term codes are read all the same: what is measured is the machinery a user gets.
    replacement = Replacement(sae, error_term=error_term, tokens=tokens_ST, read=True, name=name)
    return lambda x, window: replacement(x, window).x


def _constant(vector_D: Tensor, tokens_ST: Tensor) -> Rule:
    """x ← one vector at the given tokens."""

    def rule(x: Tensor, window: Window) -> Tensor:
        at = tokens_ST.to(x.device).reshape(*x.shape[:-1], 1)
        return torch.where(at, vector_D.to(x.device, x.dtype), x)

    return rule


def _means(activations: Activations, sink_N: Tensor) -> dict[str, Tensor]:
    """(D,) float64 mean of the tokens that are replaced, by place; 0 where there are none."""
    centres = {}
    for place, kept_N in (("everywhere", torch.ones_like(sink_N)), ("off_sinks", ~sink_N)):
        sum_D = torch.zeros(activations.x_ND.shape[1], dtype=torch.float64, device=activations.x_ND.device)
        for rows in row_slices(len(sink_N), CHUNK_TOKENS):
            sum_D += activations.x_ND[rows][kept_N[rows].to(sum_D.device)].double().sum(0)
        centres[place] = sum_D / max(int(kept_N.sum()), 1)
    return centres
