"""What a pass has counted of one SAE → columns of its table, (F,) or (F, n) each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cosae.browse.collect import numbers as counts
from cosae.browse.collect.building import Building
from cosae.browse.collect.state import SAEState, joined
from cosae.browse.store.format import BINS_OCTAVE, SHOWN_BINS
from cosae.evaluate.probing.ranking import auroc_of_latents
from cosae.io.progress import Progress
from cosae.types import Codes

Array = NDArray[Any]
Columns = dict[str, Array]
LOGITS, LOGIT_ROWS = 10, 256
LEAST_LABELLED = 10
"""Tokens of the sample with a concept, and without it, that its AUROC needs."""


def of_numbers(state: SAEState) -> Columns:
    """What was summed up."""
    of, numbers = state.numbers.of, state.numbers
    fired_F = of["firings"].astype(np.float64)
    union_F = fired_F + of["appeared"]
    mean_norm = numbers.norm_sum / max(numbers.tokens, 1)
    histogram = numbers.histogram()
    found: Columns = {name: of[name] for name in ("firings", "pair_firings", "vanished", "appeared", "negatives")}
    found["largest"] = np.where(fired_F > 0, of["largest"].astype(np.float64), np.nan)
    found["mean"] = _over(of["size"], fired_F)
    found["norm_driven"] = _over((of["vanished"] + of["appeared"]).astype(np.float64), union_F)
    found["firing_norm"] = _over(of["norm"], fired_F * mean_norm)
    found["quantiles"], found["quartiles"] = numbers.quantiles(histogram), of["quartiles"]
    merged = counts.BINS_OCTAVE // BINS_OCTAVE
    found["histogram"] = histogram.reshape(numbers.n, SHOWN_BINS, merged).sum(2)
    found["histogram"][:, 0] += of["below"]
    found["histogram_top"] = np.where(fired_F > 0, of["top"], 0)
    return found


def _over(value_F: Array, unit_F: Array) -> Array:
    found: Array = np.divide(value_F, unit_F, out=np.full(len(unit_F), np.nan), where=unit_F > 0)
    return found


def of_weights(state: SAEState) -> Columns:
    """What the SAE itself says."""
    sae, n = state.sae, state.sae.d_sae

    def spread(value: torch.Tensor | None) -> Array:
        if value is None:
            return np.full(n, np.nan)
        return value.detach().double().cpu().expand(n).numpy().copy()

    fixed = sae.cfg.selector in ("topk", "abs_topk")
    return {
        "exponent": spread(sae.scale_a),
        "value_exponent": spread(sae.value_exponent),
        "log_gain": spread(sae.scale_b),
        "bias": spread(sae.b_enc),
        "threshold": spread(None if fixed else sae.threshold),
        "decoder_norm": sae.W_dec.detach().double().norm(dim=1).cpu().numpy(),
        "encoder_norm": sae.score.rows_FD.detach().double().norm(dim=1).cpu().numpy(),
    }


def of_logits(building: Building, state: SAEState, progress: Progress) -> Columns:
    """The tokens that each direction raises and lowers most; no columns where that is not known."""
    logits = building.source.logits(state.sae.W_dec.detach())
    if logits is None:
        return {}
    n = state.sae.d_sae
    found: Columns = {}
    for first in range(0, n, LOGIT_ROWS):
        logit_FV = logits(slice(first, first + LOGIT_ROWS))
        for name, largest in (("promoted", True), ("suppressed", False)):
            top = logit_FV.topk(min(LOGITS, logit_FV.shape[1]), largest=largest)
            for part, value in (("id", top.indices), ("value", top.values)):
                column = value.cpu().numpy()
                found.setdefault(f"{name}_{part}", np.zeros((n, column.shape[1]), column.dtype))
                found[f"{name}_{part}"][first : first + LOGIT_ROWS] = column
        progress.advance(len(logit_FV))
    return found


def of_concepts(building: Building, state: SAEState) -> Columns:
    """(F, C) AUROC of every feature for every concept on the sample; 0.5 for one that never fires there."""
    if building.labels is None:
        return {}
    labels_NC, labelled_N = building.labels
    codes = joined(state.sample, state.sae.d_sae)[labelled_N]
    labels_NC = labels_NC[labelled_N]
    often_C = (labels_NC.sum(0) >= LEAST_LABELLED) & ((~labels_NC).sum(0) >= LEAST_LABELLED)
    found = np.full((state.sae.d_sae, labels_NC.shape[1]), np.nan, np.float32)
    if often_C.any():
        parts = (torch.from_numpy(np.asarray(one)) for one in (codes.indptr, codes.indices, codes.data))
        offset, feature, value = parts
        sample = Codes(offset.long(), feature.long(), value, state.sae.d_sae, (codes.shape[0],))
        found[:, often_C] = auroc_of_latents(sample, np.ascontiguousarray(labels_NC[:, often_C]))
    best = np.where(np.isfinite(found).any(1), np.nan_to_num(found, nan=-1).argmax(1), -1)
    value_F = np.where(best >= 0, np.take_along_axis(found, np.maximum(best, 0)[:, None], 1)[:, 0], np.nan)
    alive_F = state.numbers.of["firings"] > 0
    return {
        "aurocs": found,
        "best_auroc": np.where(alive_F, value_F, np.nan),
        "best_concept": np.where(alive_F, best, -1),
    }
