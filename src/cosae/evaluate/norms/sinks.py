"""Attention sinks: where they are, how many features fire there, what they do to the reconstruction.

In: the EncodedPass of an SAE. Out: plain numbers. Sinks are few tokens with norms of up to a
hundred times the median; on them a score that grows with the norm switches on thousands of features, which then look
like "norm detectors" in every statistic that counts firings (paper §9 A1, A2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosae.activations.sample import Sample
from cosae.activations.sinks import median_norm
from cosae.evaluate.encoded import EncodedPass, spread

SINK_FEATURE_FRAC = 0.5
"""A feature with more than this share of its firings on sinks is a sink feature."""
LISTED = 8

Counts = NDArray[np.int64]


def sink_metrics(encoded: EncodedPass[Any]) -> dict[str, Any]:
    """What the sinks of a sample look like, and what an SAE does on them, as plain numbers.

    n_sinks, sink_frac        how many of the tokens, and what share
    norm_over_median          median and largest |x| of the sinks over the median |x| of all tokens
    positions, tokens         the commonest positions and token ids among sinks: [value, sinks with it] (-1: none known)
    large, large_at_0         tokens of at least the rule's multiple of the median norm, and those of them at position 0
    l0_on, l0_off, l0_at_0    median codes ≠ 0 per token: on sinks, elsewhere, at position 0
    features_on               features that fire on at least one sink
    sink_features             features with more than half of their firings on sinks
    firing_frac               share of all firings that happen on sinks
    error_frac, variance_frac share of Σ|x − x̂|² and of Σ|x − mean x|² that sinks hold
    fve_on, norm_ratio_on     1 − Σ|x − x̂|² / Σ|x − mean x|² over sinks about the mean of all; mean |x̂| / mean |x|

    Numbers about an empty set are None.
    """
    sink_N = encoded.sample.sink_N
    token_E, feature_E = encoded.firings
    on_E = sink_N[token_E]
    off_F, on_F = (torch.bincount(feature_E[e], minlength=encoded.sae.d_sae).numpy() for e in (~on_E, on_E))
    return {
        **_where(encoded.sample, sink_N),
        "l0_on": _median(encoded.l0_N[sink_N]),
        "l0_off": _median(encoded.l0_N[~sink_N]),
        "l0_at_0": _median(encoded.l0_N[encoded.sample.activations.position_N.cpu() == 0]),
        **_features(on_F, off_F),
        **_recon(encoded),
    }


def _where(sample: Sample, sink_N: Tensor) -> dict[str, Any]:
    activations = sample.activations
    norm_N, position_N = activations.norm_N.cpu().double(), activations.position_N.cpu()
    median = median_norm(norm_N)
    large_N = norm_N >= sample.rule.factor * sample.median_norm
    return {
        "large": int(large_N.sum()),
        "large_at_0": int((large_N & (position_N == 0)).sum()),
        "n_sinks": int(sink_N.sum()),
        "sink_frac": float(sink_N.double().mean()),
        "norm_over_median": _over(_median(norm_N[sink_N]), median),
        "largest_over_median": _over(float(norm_N[sink_N].max()), median) if bool(sink_N.any()) else None,
        "positions": _commonest(position_N[sink_N]),
        "tokens": _commonest(activations.token_N.cpu()[sink_N]),
    }


def _features(on_F: Counts, off_F: Counts) -> dict[str, Any]:
    total_F = on_F + off_F
    return {
        "features_on": int((on_F > 0).sum()),
        "sink_features": int((on_F > SINK_FEATURE_FRAC * total_F).sum()),
        "firing_frac": float(on_F.sum() / total_F.sum()) if total_F.sum() else None,
    }


def _recon(encoded: EncodedPass[Any]) -> dict[str, Any]:
    sink_N, error_N, norm_N = encoded.sample.sink_N, encoded.error_N, encoded.target_norm_N
    total_N = spread(encoded.target_ND, torch.ones_like(sink_N))
    error, total = float(error_N[sink_N].sum()), float(total_N[sink_N].sum())
    return {
        "error_frac": _over(error, float(error_N.sum())),
        "variance_frac": _over(total, float(total_N.sum())),
        "fve_on": 1 - error / total if total > 0 else None,
        "norm_ratio_on": _over(float(encoded.recon_norm_N[sink_N].sum()), float(norm_N[sink_N].sum())),
    }


def _commonest(value_n: Tensor) -> list[list[int]]:
    values, counts = np.unique(value_n.numpy(), return_counts=True)
    order = np.lexsort((values, -counts))[:LISTED]
    return [[int(values[i]), int(counts[i])] for i in order]


def _median(value_n: Tensor) -> float | None:
    return float(np.median(value_n.numpy())) if len(value_n) else None


def _over(value: float | None, unit: float) -> float | None:
    return value / unit if value is not None and unit > 0 else None
