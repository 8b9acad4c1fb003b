"""Attention sinks: where they are, how many features fire there, what they do to the reconstruction.

In: an SAE, Activations and which of them are sinks. Out: plain numbers. Sinks are few tokens with norms of up to a
hundred times the median; on them a score that grows with the norm switches on thousands of features, which then look
like "norm detectors" in every statistic that counts firings (paper §9 A1, A2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosae.errors import CosaeError
from cosae.evaluate.reconstruct import Autoencoder, row_slices, spread
from cosae.types import Activations

SINK_FEATURE_FRAC = 0.5
"""A feature with more than this share of its firings on sinks is a sink feature."""
LISTED = 8

Counts = NDArray[np.int64]


@torch.no_grad()
def sink_metrics(
    sae: Autoencoder, activations: Activations, sink_N: Tensor, batch_tokens: int = 4096
) -> dict[str, Any]:
    """What the tokens where sink_N (N,) bool is True look like, and what an SAE does on them, as plain numbers.

    n_sinks, sink_frac        how many of the tokens, and what share
    norm_over_median          median and largest |x| of the sinks over the median |x| of all tokens
    positions, tokens         the commonest positions and token ids among sinks: [value, sinks with it] (-1: none known)
    l0_on, l0_off             median codes ≠ 0 per token, on sinks and elsewhere
    features_on               features that fire on at least one sink
    sink_features             features with more than half of their firings on sinks
    firing_frac               share of all firings that happen on sinks
    error_frac, variance_frac share of Σ|x − x̂|² and of Σ|x − mean x|² that sinks hold
    fve_on, norm_ratio_on     1 − Σ|x − x̂|² / Σ|x − mean x|² over sinks about the mean of all; mean |x̂| / mean |x|

    Numbers about an empty set are None. Raises CosaeError when the mask has another length or there are no tokens.
    """
    n = len(activations)
    if n == 0 or sink_N.dtype != torch.bool or tuple(sink_N.shape) != (n,):
        raise CosaeError(f"sinks must be a boolean tensor with one entry for each of {n} activations, at least one.")
    sink_N = sink_N.cpu()
    error_N, length_N = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    l0_N = torch.zeros(n, dtype=torch.int64)
    fired = torch.zeros(2, sae.d_sae, dtype=torch.int64)
    for rows in row_slices(n, batch_tokens):
        codes = sae.encode(activations.x_ND[rows].float())
        recon_BD = sae.decode(codes).double()
        error_N[rows] = (activations.x_ND[rows].double() - recon_BD).square().sum(-1).cpu()
        length_N[rows] = recon_BD.norm(dim=-1).cpu()
        alive_E = (codes.value_E != 0).cpu()
        token_E, feature_E = codes.token_E.cpu()[alive_E], codes.feature_E.cpu()[alive_E]
        l0_N[rows] = torch.bincount(token_E, minlength=rows.stop - rows.start)
        on_E = sink_N[rows][token_E]
        for side, chosen_E in ((0, ~on_E), (1, on_E)):
            fired[side] += torch.bincount(feature_E[chosen_E], minlength=sae.d_sae)
    off_F, on_F = fired[0].numpy(), fired[1].numpy()
    return {
        **_where(activations, sink_N),
        "l0_on": _median(l0_N[sink_N]),
        "l0_off": _median(l0_N[~sink_N]),
        **_features(on_F, off_F),
        **_recon(activations, sink_N, error_N, length_N),
    }


def _where(activations: Activations, sink_N: Tensor) -> dict[str, Any]:
    norm_N = activations.norm_N.cpu().double()
    median = float(norm_N.median())
    return {
        "n_sinks": int(sink_N.sum()),
        "sink_frac": float(sink_N.double().mean()),
        "norm_over_median": _over(_median(norm_N[sink_N]), median),
        "largest_over_median": _over(float(norm_N[sink_N].max()), median) if bool(sink_N.any()) else None,
        "positions": _commonest(activations.position_N.cpu()[sink_N]),
        "tokens": _commonest(activations.token_N.cpu()[sink_N]),
    }


def _features(on_F: Counts, off_F: Counts) -> dict[str, Any]:
    total_F = on_F + off_F
    return {
        "features_on": int((on_F > 0).sum()),
        "sink_features": int((on_F > SINK_FEATURE_FRAC * total_F).sum()),
        "firing_frac": float(on_F.sum() / total_F.sum()) if total_F.sum() else None,
    }


def _recon(activations: Activations, sink_N: Tensor, error_N: Tensor, length_N: Tensor) -> dict[str, Any]:
    total_N = spread(activations, torch.ones_like(sink_N))
    norm_N = activations.norm_N.cpu().double()
    here = bool(sink_N.any())
    fve = (
        1 - float(error_N[sink_N].sum()) / float(total_N[sink_N].sum()) if here and total_N[sink_N].sum() > 0 else None
    )
    return {
        "error_frac": _over(float(error_N[sink_N].sum()), float(error_N.sum())),
        "variance_frac": _over(float(total_N[sink_N].sum()), float(total_N.sum())),
        "fve_on": fve,
        "norm_ratio_on": _over(float(length_N[sink_N].sum()), float(norm_N[sink_N].sum())) if here else None,
    }


def _commonest(value_n: Tensor) -> list[list[int]]:
    values, counts = np.unique(value_n.numpy(), return_counts=True)
    order = np.lexsort((values, -counts))[:LISTED]
    return [[int(values[i]), int(counts[i])] for i in order]


def _median(value_n: Tensor) -> float | None:
    return float(np.median(value_n.numpy())) if len(value_n) else None


def _over(value: float | None, unit: float) -> float | None:
    return value / unit if value is not None and unit > 0 else None
