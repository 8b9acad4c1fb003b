"""How well an SAE rebuilds activations, over all tokens, by norm quartile, and with sinks in and out.

In: an SAE (`encode`, `decode`, `d_sae`) and Activations. Out: plain numbers (paper §6, audited in §9).

    fve               1 - Σ|x - x̂|² / Σ|x - mean x|², about the GLOBAL mean of the tokens measured
    fve_per_batch     1 - Σ_batches tr Var(x - x̂) / Σ_batches tr Var(x), each about its own batch's mean:
                      the paper's code; a constant offset of x̂ costs nothing there, hence a name of its own
    median_token_fve  median over tokens of 1 - |x - x̂|² / |x - mean x|²: a few huge tokens cannot carry it
    cosine            mean of cos(x, x̂), uncentred
    norm_ratio        mean |x̂| / mean |x|

One pass encodes and decodes; what it leaves per token is summed in float64 afterwards, so that nothing but
`fve_per_batch` depends on the batch size. The mean and the quartile cuts come from the tokens measured, so a
few sinks left in move the mean that every other token is held against. A number that has no meaning (a
variance of 0, an empty quartile) is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosae.evaluate.intervals import (
    RESAMPLES,
    Array,
    percentile_interval,
    resample_counts,
    weighted_medians,
)
from cosae.evaluate.rebuilt import (
    Autoencoder,
    Rebuilt,
    rebuild,
    rebuild_with_sinks,
    spread,
)
from cosae.types import Activations, CosaeError

RARE_RATE = 1e-4
"""A feature that fires on a smaller share of the tokens than this is counted as rare, dead ones included."""

_BLOCKS = 256
_MEDIAN_RESAMPLES = 500  # each costs a pass over all tokens


@dataclass(frozen=True)
class DocumentSums:
    """Sums by document, from which differences between arms are resampled.

    residual_U, total_U (U,) float64   Σ|x - x̂|² and Σ|x - mean|² over the unit's tokens
    token_fve_N (n,) float64, unit_N (n,) int64   each token's FVE and unit, but for
                       tokens equal to the mean
    unit   what was counted: "documents" or "blocks of ... rows"
    """

    residual_U: Array
    total_U: Array
    token_fve_N: Array
    unit_N: np.ndarray[Any, np.dtype[np.int64]]
    unit: str


def measure(
    sae: Autoencoder,
    activations: Activations,
    keep_N: Tensor | None = None,
    batch_tokens: int = 4096,
    median_norm: float | None = None,
) -> dict[str, Any]:
    """Reconstruction of the tokens where keep_N (N,) bool is True (all of them by default), as plain numbers.

    median_norm is what the quartiles' ends are divided by (`norm_high_over_median`); the measured tokens' own
    median by default. Raises CosaeError when there are no tokens.
    """
    kept_N = torch.ones(len(activations), dtype=torch.bool) if keep_N is None else keep_N
    return summarise(rebuild(sae, activations, {"kept": kept_N}, batch_tokens), activations, "kept", median_norm)


def measure_with_and_without_sinks(
    sae: Autoencoder,
    activations: Activations,
    sink_N: Tensor,
    batch_tokens: int = 4096,
    median_norm: float | None = None,
    rebuilt: Rebuilt | None = None,
) -> dict[str, Any]:
    """`measure` twice from one pass: over all tokens, and without those where sink_N (N,) bool is True.

    Returns {"sinks_in", "sinks_out", "n_sinks", "sink_frac", "on_sinks"}; on_sinks None when there are none.
    Pass the `rebuilt` of `rebuild_with_sinks` when the sums by document are wanted as well.
    """
    rebuilt = rebuild_with_sinks(sae, activations, sink_N, batch_tokens) if rebuilt is None else rebuilt
    sink_N = ~rebuilt.keep["out"]
    n_sinks = int(sink_N.sum())
    return {
        "sinks_in": summarise(rebuilt, activations, "in", median_norm),
        "sinks_out": summarise(rebuilt, activations, "out", median_norm),
        "n_sinks": n_sinks,
        "sink_frac": n_sinks / len(activations),
        "on_sinks": _averages(rebuilt, activations.norm_N.cpu().double(), sink_N) if n_sinks else None,
    }


def summarise(
    rebuilt: Rebuilt, activations: Activations, name: str, median_norm: float | None = None
) -> dict[str, Any]:
    """The numbers of one named set of a Rebuilt."""
    kept_N = rebuilt.keep[name]
    n = int(kept_N.sum())
    if n == 0:
        raise CosaeError("reconstruction needs at least one token to measure; got none instead: check the filter")
    norm_N = activations.norm_N.cpu().double()
    total_N = spread(activations, kept_N)
    quartile_N, cuts = _quartiles(norm_N, kept_N)
    residual, total = rebuilt.within[name]
    rate_F = rebuilt.fired[name].double() / n
    middle = float(np.median(norm_N[kept_N].numpy())) if median_norm is None else median_norm
    levels = [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]
    return {
        "tokens": n,
        "fve": _one_minus(float(rebuilt.error_N[kept_N].sum()), float(total_N[kept_N].sum())),
        "fve_per_batch": _one_minus(residual, total),
        "fve_per_batch_tokens": rebuilt.batch_tokens,
        "median_token_fve": _median_token_fve(rebuilt.error_N[kept_N], total_N[kept_N]),
        **_averages(rebuilt, norm_N, kept_N),
        "l0_quantiles": np.quantile(rebuilt.l0_N[kept_N].numpy(), levels).tolist(),
        "dead_frac": float((rate_F == 0).double().mean()),
        "rare_frac": float((rate_F < RARE_RATE).double().mean()),
        "rare_below": RARE_RATE,
        "median_norm": middle,
        "by_norm_quartile": [
            _quartile(rebuilt, activations, quartile_N == q, total_N, norm_N, (cuts[q], cuts[q + 1]), middle)
            for q in range(4)
        ],
    }


def per_document(rebuilt: Rebuilt, activations: Activations, name: str) -> DocumentSums:
    """Sums by document of one named set; by blocks of consecutive rows when there are not two documents."""
    kept_N = rebuilt.keep[name]
    total_N = spread(activations, kept_N)[kept_N].numpy()
    error_N = rebuilt.error_N[kept_N].numpy()
    names, unit_N = np.unique(activations.doc_N.cpu()[kept_N].numpy(), return_inverse=True)
    unit = "documents"
    if len(names) < 2:
        block = max(-(-len(error_N) // _BLOCKS), 1)
        unit_N, unit = np.arange(len(error_N)) // block, f"blocks of {block} rows"
    varies_N = total_N > 0
    return DocumentSums(
        residual_U=np.bincount(unit_N, weights=error_N).astype(np.float64),
        total_U=np.bincount(unit_N, weights=total_N).astype(np.float64),
        token_fve_N=1 - error_N[varies_N] / total_N[varies_N],
        unit_N=unit_N[varies_N].astype(np.int64),
        unit=unit,
    )


def paired_fve_differences(
    sums: Mapping[str, DocumentSums], baseline: str, seed: int = 0, n_resamples: int = RESAMPLES
) -> list[dict[str, Any]]:
    """FVE of every other arm minus the baseline's, with 95 % intervals by a paired bootstrap over documents.

    All arms share the resamples and the tokens; the global mean in the FVE stays that of the whole set. Each
    row also holds the difference of the median token's FVE (from the first 500 resamples), and how it was
    resampled. Raises CosaeError when the baseline is not among the arms, or their tokens are not the same.
    """
    if baseline not in sums:
        raise CosaeError(f"the baseline must be one of the arms {sorted(sums)}; got {baseline!r} instead")
    base = sums[baseline]
    if any(len(s.total_U) != len(base.total_U) or not np.allclose(s.total_U, base.total_U) for s in sums.values()):
        raise CosaeError("paired differences need every arm measured on the same documents; these are not")
    counts_RU = resample_counts(len(base.total_U), seed, n_resamples)
    drawn_RU = counts_RU.astype(np.float64)
    medians = {arm: weighted_medians(s.token_fve_N, s.unit_N, counts_RU[:_MEDIAN_RESAMPLES]) for arm, s in sums.items()}
    rows = []
    for arm, s in sums.items():
        if arm == baseline:
            continue
        saved_U = base.residual_U - s.residual_U
        low, high = percentile_interval((drawn_RU @ saved_U) / (drawn_RU @ base.total_U))
        median_low, median_high = percentile_interval(medians[arm] - medians[baseline])
        rows.append(
            {
                "arm": arm,
                "versus": baseline,
                "difference": float(saved_U.sum() / base.total_U.sum()),
                "low": low,
                "high": high,
                "median_token_difference": float(np.median(s.token_fve_N) - np.median(base.token_fve_N)),
                "median_token_low": median_low,
                "median_token_high": median_high,
                "unit": s.unit,
                "units": len(base.total_U),
                "seed": seed,
                "resamples": n_resamples,
            }
        )
    return rows


def _quartiles(norm_N: Tensor, kept_N: Tensor) -> tuple[Tensor, list[float]]:
    """(N,) norm quartile 0..3, -1 where not kept; and the five cuts. Equal norms stay in one quartile."""
    cuts = np.quantile(norm_N[kept_N].numpy(), [0, 0.25, 0.5, 0.75, 1]).tolist()
    quartile_N = torch.bucketize(norm_N, torch.tensor(cuts[1:4], dtype=torch.float64))
    return torch.where(kept_N, quartile_N, -1), cuts


def _quartile(
    rebuilt: Rebuilt,
    activations: Activations,
    in_N: Tensor,
    total_N: Tensor,
    norm_N: Tensor,
    ends: tuple[float, float],
    median_norm: float,
) -> dict[str, Any]:
    """One norm quartile. `fve` is about its own mean, `fve_global` and the median token's about the set's."""
    place = {
        "norm_low": ends[0],
        "norm_high": ends[1],
        "norm_high_over_median": ends[1] / median_norm if median_norm else None,
        "tokens": int(in_N.sum()),
    }
    if not place["tokens"]:
        empty = ("fve", "fve_global", "median_token_fve", "cosine", "norm_ratio", "l0")
        return {**place, **dict.fromkeys(empty)}
    error = float(rebuilt.error_N[in_N].sum())
    own = float(spread(activations, in_N)[in_N].sum())
    return {
        **place,
        "fve": _one_minus(error, own),
        "fve_global": _one_minus(error, float(total_N[in_N].sum())),
        "median_token_fve": _median_token_fve(rebuilt.error_N[in_N], total_N[in_N]),
        **_averages(rebuilt, norm_N, in_N),
    }


def _averages(rebuilt: Rebuilt, norm_N: Tensor, in_N: Tensor) -> dict[str, Any]:
    mean_norm = float(norm_N[in_N].mean())
    return {
        "cosine": float(rebuilt.cosine_N[in_N].mean()),
        "norm_ratio": float(rebuilt.norm_N[in_N].mean()) / mean_norm if mean_norm > 0 else None,
        "l0": float(rebuilt.l0_N[in_N].double().mean()),
    }


def _median_token_fve(error_N: Tensor, total_N: Tensor) -> float | None:
    varies_N = total_N > 0
    if not bool(varies_N.any()):
        return None
    return float(np.median((1 - error_N[varies_N] / total_N[varies_N]).numpy()))


def _one_minus(residual: float, total: float) -> float | None:
    return 1 - residual / total if total > 0 else None
