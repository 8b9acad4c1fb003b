"""Is this SAE fooled by norm? Everything that answers it about one SAE, and each answer as a plain sentence.

In: a calibrated cosae SAE and a Sample of its site. Out: one mapping of plain numbers, and the sentences of
`evaluate.verdict` made from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosae.activations.sample import Sample
from cosae.errors import CosaeError
from cosae.evaluate import l0, reconstruction
from cosae.evaluate.encoded import BATCH_TOKENS, EncodedPass, encode_sample
from cosae.evaluate.geometry import geometry
from cosae.evaluate.norms.counterfactual import MedianPass, at_median
from cosae.evaluate.norms.describe import describe_norms
from cosae.evaluate.norms.driven import firing_norms, norm_driven
from cosae.evaluate.norms.sinks import sink_metrics
from cosae.evaluate.verdict import lines, verdict
from cosae.io.progress import SILENT, Progress
from cosae.sae.model import SAE
from cosae.types import Codes


def audit(
    sae: SAE,
    sample: Sample,
    *,
    spell: Callable[[int], str | None] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Everything about one SAE on a sample; plain numbers, JSON-able. Two passes: as the tokens are, and at the median.

    spell: token id → text, to name the tokens that are sinks. Keys: norms, reconstruction, l0, norm_driven,
    firing_norms, sinks, read_time, geometry, shift, verdict ("fooled": yes, no or nothing to be fooled by), lines.
    Raises CosaeError where a measurement does: an SAE without inference threshold, no token left beside sinks.
    """
    if bool(sample.sink_N.all()):
        raise CosaeError("all tokens given are sinks: there is nothing left to audit on; raise the sink factor.")
    with progress.phase("encoding tokens", len(sample)):
        encoded = encode_sample(sae, sample, batch_tokens, progress.rows)
    with progress.phase("encoding tokens at the median norm", len(sample)):
        median = at_median(encoded, on_rows=progress.rows)
    numbers: dict[str, Any] = {
        "tokens": len(sample),
        "norms": describe_norms(sample.activations, seed=seed, sink_N=sample.sink_N),
        "reconstruction": reconstruction.measure(encoded),
        "l0": l0.measure(encoded, sae.metadata),
        "norm_driven": norm_driven(encoded, median),
        "firing_norms": firing_norms(encoded),
        "sinks": sink_metrics(encoded),
        "read_time": _read_time(encoded, median),
        "geometry": geometry(sae),
        "shift": _shift(sae, sample),
    }
    numbers["sinks"]["spelled"] = [
        [spell(token) if spell is not None and token >= 0 else None, token, count]
        for token, count in numbers["sinks"]["tokens"]
    ]
    _trim(numbers)
    numbers["verdict"] = verdict(numbers)
    numbers["lines"] = [line._asdict() for line in lines(numbers)]
    return numbers


def _read_time(encoded: EncodedPass[SAE], median: MedianPass) -> dict[str, Any]:
    """How much of a value is the token's length, before and after removal; and what firing would change at equal L0."""
    sae, codes, out_N = encoded.sae, encoded.codes, ~encoded.sample.sink_N
    a_F = sae.score.growth.detach().cpu().double()
    a_E = a_F if a_F.ndim == 0 else a_F[codes.feature_E]
    log_r_N = (median.r_N.clamp_min(1e-30) / median.median_r).log()
    growth_E = (a_E * log_r_N[codes.token_E]).exp() if sae.cfg.frame == "raw" else torch.ones(len(codes.value_E))
    shortened = codes.with_values((codes.value_E / growth_E).float())
    fired_E = (codes.token_E * codes.d_sae + codes.feature_E)[out_N[codes.token_E]]
    return {
        "growth_before": value_growth(codes.take(out_N), median.r_N[out_N]),
        "growth_after": value_growth(shortened.take(out_N), median.r_N[out_N]),
        "firings_changed": None if median.same_l0 is None else _jaccard_distance(fired_E, median.same_l0),
    }


def value_growth(codes: Codes, r_N: Tensor) -> float | None:
    """Slope of ln |f_i| on ln r within features: by how much codes grow with the token's length (1: in proportion).

    Least squares over all firings of features that fire at least twice, each feature about its own mean; None without
    spread in r. What a feature's tokens mean and how long they are may go together, so 0 is not owed even by a cosine.
    """
    alive_E = (codes.value_E != 0).cpu()
    y_E = codes.value_E.cpu()[alive_E].double().abs().log().numpy()
    x_E = r_N.clamp_min(1e-30).log()[codes.token_E.cpu()[alive_E]].numpy()
    feature_E = codes.feature_E.cpu()[alive_E].numpy()
    count_F = np.maximum(np.bincount(feature_E, minlength=codes.d_sae), 1)
    x_E = x_E - (np.bincount(feature_E, x_E, codes.d_sae) / count_F)[feature_E]
    y_E = y_E - (np.bincount(feature_E, y_E, codes.d_sae) / count_F)[feature_E]
    spread = float((x_E * x_E).sum())
    return float((x_E * y_E).sum()) / spread if spread > 1e-12 * max(len(x_E), 1) else None


def _jaccard_distance(first_E: Tensor, second_E: Tensor) -> float | None:
    both = len(np.intersect1d(first_E.numpy(), second_E.numpy(), assume_unique=True))
    either = len(first_E) + len(second_E) - both
    return 1 - both / either if either else None


def _shift(sae: SAE, sample: Sample) -> dict[str, Any]:
    """The sample's median norm over that of the SAE's training activations, where its file knows it."""
    known = sae.metadata.get("norm_summary")
    trained = known.get("median_norm") if isinstance(known, Mapping) else None
    ratio = sample.median_norm / trained if isinstance(trained, int | float) and trained > 0 else None
    return {"median_norm": sample.median_norm, "trained_median_norm": trained, "ratio": ratio}


def _trim(numbers: dict[str, Any]) -> None:
    """Per-feature arrays become lists with None for NaN: what JSON can hold."""
    for measured in (numbers["norm_driven"], numbers["firing_norms"]):
        for which in ("sinks_in", "sinks_out"):
            if measured[which] is not None:
                arrays = measured[which]["per_feature"]
                measured[which]["per_feature"] = {name: _plain(array) for name, array in arrays.items()}


def _plain(array: np.ndarray[Any, np.dtype[np.float64]]) -> list[Any]:
    if array.ndim == 2:
        return [_plain(row) for row in array]
    return [None if np.isnan(value) else round(float(value), 6) for value in array]
