"""The norms of a set of activations: how uneven, what the filter removes, how much is the token's.

In: Activations, the tokens the filter removes, and the sinks. Out: plain numbers and a histogram. These stand at
the head of every report, because scores differ only in what they do with |x|: where it hardly varies, or is given
away by the token's identity, no score can gain much by handling it well (paper §9 A).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosae.errors import CosaeError
from cosae.evaluate.encoded import spread
from cosae.types import Activations

QUANTILE_LEVELS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
FOLDS = 5
BINS = 64

Array = NDArray[np.float64]


def describe_norms(
    activations: Activations, removed_N: Tensor | None = None, seed: int = 0, sink_N: Tensor | None = None
) -> dict[str, Any]:
    """Norm facts of N activations as plain numbers. All-zero rows are padding and enter nothing.

    removed_N (N,) bool marks what the run's filter removes; sink_N (N,) bool what evaluation sets apart as sinks,
    which need not be the same (a run may filter nothing); removed_N by default.

    `median`, `mean`, `cv` (standard deviation over mean), `quantiles` and `largest_over_median` are over all
    tokens; `sinks_out` repeats them without sinks, over the same median. `filter` says what was removed; its
    `variance_frac` is the share of Σ|x - mean x|² that the removed tokens hold. `position_0_over_median` is the mean
    norm at position 0 over the median (None without positions). `log_norm_by_token`: see `predict_log_norm`, over
    tokens that are no sinks. `histogram`: log-spaced edges, counts of all tokens and, among them, of sinks.
    Raises CosaeError when there are no activations or a mask has another length.
    """
    live_N = (activations.x_ND != 0).any(-1)
    if not bool(live_N.any()):
        raise CosaeError("norm facts need at least one activation that is not all zero; got none instead")
    here_N = live_N.cpu().numpy()
    gone_N = _mask(removed_N, len(here_N))[here_N]
    out_N = gone_N if sink_N is None else _mask(sink_N, len(here_N))[here_N]
    activations = activations[live_N]
    norm_N = activations.norm_N.cpu().double().numpy()
    n = len(norm_N)
    median = float(np.median(norm_N))
    first_N = activations.position_N.cpu().numpy() == 0
    kept_N = torch.from_numpy(~out_N).to(activations.x_ND.device)
    return {
        "tokens": n,
        "median": median,
        **_shape(norm_N, median),
        "quantile_levels": list(QUANTILE_LEVELS),
        "sinks": int(out_N.sum()),
        "sinks_out": _shape(norm_N[~out_N], median) if not out_N.all() else None,
        "filter": _removed(activations, norm_N, gone_N, median),
        "position_0_tokens": int(first_N.sum()),
        "position_0_over_median": _over(float(norm_N[first_N].mean()), median) if first_N.any() else None,
        "log_norm_by_token": predict_log_norm(activations[kept_N], seed),
        "histogram": _histogram(norm_N, out_N),
    }


def _mask(mask_N: Tensor | None, n: int) -> NDArray[np.bool_]:
    if mask_N is None:
        return np.zeros(n, dtype=bool)
    if tuple(mask_N.shape) != (n,):
        raise CosaeError(
            f"a mask of tokens must have one entry for each of {n} activations; got {mask_N.numel()} instead"
        )
    return mask_N.cpu().numpy().astype(bool)


def predict_log_norm(activations: Activations, seed: int = 0) -> dict[str, Any] | None:
    """Share of the variance of log|x| that the token's identity predicts on documents it was not fitted on.

    Five-fold cross-validation over documents (over rows where there are fewer than five documents): the
    prediction for a token is the mean log-norm of its id in the other folds, pulled to their overall mean by
    one pseudo-count (an unseen id gets that mean). R² = 1 - Σ(y - ŷ)² / Σ(y - mean y)²; held out, so rare ids
    do not inflate it, and below 0 when identity says nothing. None without ids, non-zero norms or spread.
    """
    norm_N = activations.norm_N.cpu().double().numpy()
    known_N = (activations.token_N.cpu().numpy() >= 0) & (norm_N > 0)
    if known_N.sum() < 2 * FOLDS:
        return None
    y_N = np.log(norm_N[known_N])
    ids, id_N = np.unique(activations.token_N.cpu().numpy()[known_N], return_inverse=True)
    documents, unit_N = np.unique(activations.doc_N.cpu().numpy()[known_N], return_inverse=True)
    by_document = len(documents) >= FOLDS
    if not by_document:
        unit_N = np.arange(len(y_N))
    fold_N = _folds(int(unit_N.max()) + 1, seed)[unit_N]
    spread = float(np.square(y_N - y_N.mean()).sum())
    if spread <= 1e-12 * len(y_N):
        return None
    error = sum(_held_out_error(y_N, id_N, fold_N == fold, len(ids)) for fold in range(FOLDS))
    return {
        "r2": 1 - error / spread,
        "tokens": len(y_N),
        "ids": len(ids),
        "folds": FOLDS,
        "split_by": "document" if by_document else "row",
        "seed": seed,
    }


def _held_out_error(y_N: Array, id_N: NDArray[np.int64], held_N: NDArray[np.bool_], n_ids: int) -> float:
    fit_y, fit_id = y_N[~held_N], id_N[~held_N]
    overall = float(fit_y.mean())
    seen = np.bincount(fit_id, minlength=n_ids)
    predicted = (np.bincount(fit_id, weights=fit_y, minlength=n_ids) + overall) / (seen + 1)
    return float(np.square(y_N[held_N] - predicted[id_N[held_N]]).sum())


def _folds(n_units: int, seed: int) -> NDArray[np.int64]:
    """(n_units,) int64: the fold of each unit; sizes differ by at most one."""
    return np.random.default_rng(seed).permutation(np.arange(n_units) % FOLDS)


def _shape(norm_N: Array, median: float) -> dict[str, Any]:
    mean = float(norm_N.mean())
    return {
        "mean": mean,
        "cv": _over(float(norm_N.std()), mean),
        "quantiles": np.quantile(norm_N, QUANTILE_LEVELS).tolist(),
        "largest_over_median": _over(float(norm_N.max()), median),
    }


def _removed(activations: Activations, norm_N: Array, out_N: NDArray[np.bool_], median: float) -> dict[str, Any]:
    metadata: dict[str, Any] = {"removed_tokens": int(out_N.sum()), "removed_frac": float(out_N.mean())}
    if not out_N.any():
        return {**metadata, "smallest_over_median": None, "largest_over_median": None, "variance_frac": 0.0}
    total_N = _spread(activations)
    return {
        **metadata,
        "smallest_over_median": _over(float(norm_N[out_N].min()), median),
        "largest_over_median": _over(float(norm_N[out_N].max()), median),
        "variance_frac": _over(float(total_N[out_N].sum()), float(total_N.sum())),
    }


def _spread(activations: Activations) -> Array:
    """(N,) |x - mean x|² about the mean of all tokens."""
    return spread(activations.x_ND, torch.ones(len(activations), dtype=torch.bool)).numpy().astype(np.float64)


def _histogram(norm_N: Array, out_N: NDArray[np.bool_]) -> dict[str, Any]:
    """Log-spaced bins over the non-zero norms. counts: all tokens; sink_counts: the sinks."""
    positive_N = norm_N > 0
    if not positive_N.any():
        return {"edges": [], "counts": [], "sink_counts": []}
    low, high = norm_N[positive_N].min(), norm_N.max()
    # a little beyond both ends: rounding of the edges must not push the extremes out
    edges = np.geomspace(low * (1 - 1e-6), high * (1 + 1e-6), BINS + 1)
    return {
        "edges": edges.tolist(),
        "counts": np.histogram(norm_N[positive_N], edges)[0].tolist(),
        "sink_counts": np.histogram(norm_N[positive_N & out_N], edges)[0].tolist(),
    }


def _over(value: float, unit: float) -> float | None:
    return value / unit if unit > 0 else None
