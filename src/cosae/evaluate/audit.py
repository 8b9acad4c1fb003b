"""Is this SAE fooled by norm? Everything that answers it about one SAE, and each answer as a plain sentence.

In: a calibrated cosae SAE, Activations of its site, which of them are sinks. Out: one mapping of plain numbers, and
the sentences of `audit_lines` made from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.evaluate.encoding import encode_all
from cosae.evaluate.geometry import geometry
from cosae.evaluate.norms.describe import describe_norms
from cosae.evaluate.norms.driven import firing_norms, lengths, norm_driven
from cosae.evaluate.norms.read_time import remove_norm
from cosae.evaluate.norms.sinks import sink_metrics
from cosae.evaluate.reconstruction import measure_with_and_without_sinks
from cosae.evaluate.verdict import lines, verdict
from cosae.sae.model import SAE
from cosae.types import Activations, Codes


@torch.no_grad()
def audit(
    sae: SAE,
    activations: Activations,
    sink_N: Tensor,
    *,
    median_norm: float | None = None,
    spell: Callable[[int], str] | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything about one SAE on N activations, sink_N (N,) bool of them sinks; plain numbers, JSON-able.

    spell: token id → text, to name the tokens that are sinks. Keys: norms, reconstruction, norm_driven, firing_norms,
    sinks, read_time, geometry, shift, verdict ("fooled": yes, no or nothing to be fooled by), lines.
    Raises CosaeError where a measurement does: an SAE without inference threshold, no token left beside sinks.
    """
    if not bool((~sink_N).any()):
        raise CosaeError("all tokens given are sinks: there is nothing left to audit on; raise the sink factor.")
    codes = encode_all(sae, activations)
    numbers: dict[str, Any] = {
        "tokens": len(activations),
        "norms": describe_norms(activations, seed=seed, sink_N=sink_N),
        "reconstruction": measure_with_and_without_sinks(sae, activations, sink_N, batch_tokens, median_norm),
        "norm_driven": norm_driven(sae, activations, sink_N, batch_tokens=batch_tokens),
        "firing_norms": firing_norms(sae, activations, sink_N, codes=codes),
        "sinks": sink_metrics(sae, activations, sink_N, batch_tokens),
        "read_time": _read_time(sae, activations[~sink_N], batch_tokens),
        "geometry": geometry(sae),
        "shift": _shift(sae, activations),
    }
    numbers["sinks"]["spelled"] = [
        [spell(token) if spell is not None and token >= 0 else None, token, count]
        for token, count in numbers["sinks"]["tokens"]
    ]
    _trim(numbers)
    numbers["verdict"] = verdict(numbers)
    numbers["lines"] = [line._asdict() for line in lines(numbers)]
    return numbers


def _read_time(sae: SAE, activations: Activations, batch_tokens: int) -> dict[str, Any]:
    """How much of a value is the token's length, before and after removal; and what firing would change at equal L0."""
    plain = encode_all(sae, activations)
    r_N = lengths(sae, activations, batch_tokens)
    kept = encode_all(remove_norm(sae, activations), activations)
    found: dict[str, Any] = {
        "growth_before": value_growth(plain, r_N),
        "growth_after": value_growth(kept, r_N),
        "firings_changed": None,
    }
    if sae.cfg.selector not in ("gated", "abs_topk"):
        other = encode_all(remove_norm(sae, activations, keep_firings=False), activations)
        found["firings_changed"] = _jaccard_distance(plain, other)
    return found


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


def _jaccard_distance(a: Codes, b: Codes) -> float | None:
    first, second = (c.token_E.cpu() * c.d_sae + c.feature_E.cpu() for c in (a, b))
    both = len(np.intersect1d(first.numpy(), second.numpy(), assume_unique=True))
    either = len(first) + len(second) - both
    return 1 - both / either if either else None


def _shift(sae: SAE, activations: Activations) -> dict[str, Any]:
    """Today's median norm over that of the SAE's training activations, where its file knows it."""
    now = float(activations.norm_N.double().median())
    metadata = sae.metadata.get("norm_summary")
    trained = metadata.get("median_norm") if isinstance(metadata, Mapping) else None
    ratio = now / trained if isinstance(trained, int | float) and trained > 0 else None
    return {"median_norm": now, "trained_median_norm": trained, "ratio": ratio}


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
