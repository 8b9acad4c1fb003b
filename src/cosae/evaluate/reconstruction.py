"""How well an SAE reconstructs activations, over all tokens, by norm quartile, and with sinks in and out.

In: the EncodedPass of an SAE. Out: plain numbers (paper §6, audited in §9).

    fve               1 - Σ|x - x̂|² / Σ|x - mean x|², about the GLOBAL mean of the tokens measured
    fve_per_batch     1 - Σ_batches tr Var(x - x̂) / Σ_batches tr Var(x), each about its own batch's mean:
                      the paper's code; a constant offset of x̂ costs nothing there, hence a name of its own
    median_token_fve  median over tokens of 1 - |x - x̂|² / |x - mean x|²: a few huge tokens cannot carry it
    cosine            mean of cos(x, x̂), uncentred
    norm_ratio        mean |x̂| / mean |x|
    l0                codes ≠ 0 per token: mean, quantiles and a histogram over tokens
    dead, rare        share of features that never fired, and that fired on fewer than 1 in 10 000, of THESE tokens:
                      the more tokens, the fewer dead, which `dead_by_tokens` shows

One pass encodes and decodes; what it leaves per token is summed in float64 afterwards, so that nothing but
`fve_per_batch` depends on the batch size. The mean and the quartile cuts come from the tokens measured, so a
few sinks left in move the mean that every other token is held against. All-zero rows are padding and enter nothing.
A number that has no meaning (a variance of 0, an empty quartile) is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.evaluate.encoded import BATCH_TOKENS, EncodedPass, Within, resampling_units, spread
from cosae.evaluate.statistics import RESAMPLES, Array, percentile_interval, resample_counts, weighted_medians

RARE_RATE = 1e-4
"""A feature that fires on a smaller share of the tokens than this is counted as rare, dead ones included."""

L0_LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
UNIT_BINS = 128
"""Largest L0 up to which its histogram has a bin for every count; beyond, bins widen in proportion to the count."""
FIRST_TOKENS = 1000
"""The dead share is also given over the first 1000, 2000, 4000 ... tokens."""

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


def measure(encoded: EncodedPass[Any]) -> dict[str, Any]:
    """Reconstruction with sinks out and in, as plain numbers.

    Returns {"sinks_in", "sinks_out", "n_sinks", "sink_frac", "on_sinks"}; on_sinks None when there are none. See
    `summarise` for the numbers of each. Raises CosaeError when there are no tokens.
    """
    sink_N = encoded.keep["sinks_in"] & ~encoded.keep["sinks_out"]
    n_sinks, n = int(sink_N.sum()), int(encoded.keep["sinks_in"].sum())
    return {
        "sinks_in": summarise(encoded, "sinks_in"),
        "sinks_out": summarise(encoded, "sinks_out"),
        "n_sinks": n_sinks,
        "sink_frac": n_sinks / n,
        "on_sinks": _averages(encoded, sink_N) if n_sinks else None,
    }


@torch.no_grad()
def by_site(encoded: EncodedPass[Any], sinks: str) -> list[float | None]:
    """FVE of each site that a crosscoder joins, on the tokens that count: the sum over all of them is a loud site's."""
    sae, x_ND = encoded.sae, encoded.sample.activations.x_ND
    kept = encoded.keep[sinks].nonzero()[:, 0].to(x_ND.device)
    mean_D = torch.stack([x_ND[rows].double().sum(0) for rows in torch.split(kept, BATCH_TOKENS)]).sum(0) / len(kept)
    residual_P, total_P = torch.zeros(2, len(sae.cfg.sites), dtype=torch.float64)
    for rows in torch.split(kept, BATCH_TOKENS):
        x_BD = x_ND[rows].double()
        apart_BD = x_BD - sae(x_ND[rows].float()).double().to(x_BD.device)
        residual_P += sae.sites.lengths(apart_BD).square().sum(0).cpu()
        total_P += sae.sites.lengths(x_BD - mean_D).square().sum(0).cpu()
    return [_one_minus(*pair) for pair in zip(residual_P.tolist(), total_P.tolist(), strict=True)]


def summarise(encoded: EncodedPass[Any], sinks: str) -> dict[str, Any]:
    """The numbers of the tokens that count with "sinks_in" or "sinks_out".

    `tokens` is what every share is over. l0_quantiles at l0_levels; l0_histogram: counts[i] tokens have
    edges[i] ≤ L0 < edges[i + 1]. rare: fired on fewer than `rare_firings` = rare_below · tokens of them, dead ones
    included. dead_by_tokens: rows [n, share of features that did not fire on the first n], in the order given.
    by_norm_quartile: each of these numbers over each quartile of |x|; `fve` is about the quartile's own mean,
    `fve_global` and `median_token_fve` about the set's; `norm_high_over_median` divides by the sample's median norm.
    Raises CosaeError when there are no tokens.
    """
    kept_N = encoded.keep[sinks]
    n = int(kept_N.sum())
    if n == 0:
        raise CosaeError("reconstruction needs at least one token to measure; got none instead: check the filter")
    total_N = spread(encoded.target_ND, kept_N)
    fired_4F = encoded.fired(sinks)
    return {
        "fve": _one_minus(float(encoded.error_N[kept_N].sum()), float(total_N[kept_N].sum())),
        "median_token_fve": _median_token_fve(encoded.error_N[kept_N], total_N[kept_N]),
        **_numbers(encoded, kept_N, encoded.within[sinks][0], fired_4F.sum(0)),
        "fve_per_batch_tokens": encoded.batch_tokens,
        "l0_levels": list(L0_LEVELS),
        "rare_below": RARE_RATE,
        "dead_by_tokens": _dead_by_tokens(encoded.first(sinks), n),
        "median_norm": encoded.sample.median_norm,
        "by_norm_quartile": [_quartile(encoded, sinks, q, total_N, fired_4F[q]) for q in range(4)],
        **({"by_site": by_site(encoded, sinks)} if getattr(encoded.sae, "sites", None) is not None else {}),
    }


def per_document(encoded: EncodedPass[Any], sinks: str) -> DocumentSums:
    """Sums by document of the tokens that count; by blocks of consecutive rows when there are not two documents."""
    activations, kept_N = encoded.sample.activations, encoded.keep[sinks]
    total_N = spread(encoded.target_ND, kept_N)[kept_N].numpy()
    error_N = encoded.error_N[kept_N].numpy()
    unit_N, unit = resampling_units(activations.doc_N[kept_N.to(activations.doc_N.device)])
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


def _quartile(encoded: EncodedPass[Any], sinks: str, q: int, total_N: Tensor, fired_F: Tensor) -> dict[str, Any]:
    """One norm quartile. `fve` is about its own mean, `fve_global` and the median token's about the set's."""
    in_N = encoded.quartile[sinks] == q
    low, high = encoded.cuts[sinks][q : q + 2]
    median, error = encoded.sample.median_norm, float(encoded.error_N[in_N].sum())
    return {
        "norm_low": low,
        "norm_high": high,
        "norm_high_over_median": high / median if median else None,
        "fve": _one_minus(error, float(spread(encoded.target_ND, in_N)[in_N].sum())),
        "fve_global": _one_minus(error, float(total_N[in_N].sum())),
        "median_token_fve": _median_token_fve(encoded.error_N[in_N], total_N[in_N]),
        **_numbers(encoded, in_N, encoded.within[sinks][1 + q], fired_F),
    }


def _numbers(encoded: EncodedPass[Any], in_N: Tensor, within: Within, fired_F: Tensor) -> dict[str, Any]:
    """What is counted alike for a whole set and for a quartile of it; None where it has no token."""
    n = int(in_N.sum())
    some = n > 0
    return {
        "tokens": n,
        "fve_per_batch": _one_minus(*within),
        **_averages(encoded, in_N),
        "l0_quantiles": np.quantile(encoded.l0_N[in_N].numpy(), L0_LEVELS).tolist() if some else None,
        "l0_histogram": _l0_histogram(encoded.l0_N[in_N].numpy()) if some else None,
        "dead_frac": float((fired_F == 0).double().mean()) if some else None,
        "rare_frac": float((fired_F < RARE_RATE * n).double().mean()) if some else None,
        "rare_firings": RARE_RATE * n,
    }


def _averages(encoded: EncodedPass[Any], in_N: Tensor) -> dict[str, Any]:
    if not bool(in_N.any()):
        return {"cosine": None, "norm_ratio": None, "l0": None}
    mean_norm = float(encoded.target_norm_N[in_N].mean())
    return {
        "cosine": float(encoded.cosine_N[in_N].mean()),
        "norm_ratio": float(encoded.recon_norm_N[in_N].mean()) / mean_norm if mean_norm > 0 else None,
        "l0": float(encoded.l0_N[in_N].double().mean()),
    }


def _l0_histogram(l0_n: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, list[int]]:
    largest = int(l0_n.max())
    edges = np.arange(largest + 2)
    if largest > UNIT_BINS:
        edges = np.unique(np.concatenate([[0], np.geomspace(1, largest + 1, UNIT_BINS).round().astype(np.int64)]))
    counts = np.bincount(np.searchsorted(edges, l0_n, side="right") - 1, minlength=len(edges) - 1)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _dead_by_tokens(first_F: Tensor, n: int) -> list[list[float]]:
    sizes = [FIRST_TOKENS << i for i in range(64) if FIRST_TOKENS << i < n]
    return [[size, float((first_F >= size).double().mean())] for size in [*sizes, n]]


def _median_token_fve(error_N: Tensor, total_N: Tensor) -> float | None:
    varies_N = total_N > 0
    if not bool(varies_N.any()):
        return None
    return float(np.median((1 - error_N[varies_N] / total_N[varies_N]).numpy()))


def _one_minus(residual: float, total: float) -> float | None:
    return 1 - residual / total if total > 0 else None
