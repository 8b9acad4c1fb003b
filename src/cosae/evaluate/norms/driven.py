"""Is a feature driven by norm? The counterfactual test, and beside it where in the norms a feature fires.

In: the two passes of a cosae SAE. Out: plain numbers, per feature and pooled, with sinks in and out.

Counterfactual (norms.counterfactual): every token keeps the direction of x − c and gets the median length. A
firing that vanishes or appears is norm-driven. Exactly 0 where a = 0 (whatever a value exponent makes of values), and
in the unit and layer_norm frames. With, over tokens, A firings as it is, M at the median length, and A ∩ M in both,

    share of a feature   1 − |A ∩ M| / |A ∪ M|  (Jaccard distance)
    pooled share         the same with counts summed over features first: each feature weighs as it fires
    mean_feature_share   mean over features of their own shares: each weighs the same, however rarely it fires
    value_norm_frac      1 − corr(v, v')² over A ∩ M: the share of the variance of a feature's value v that its value v'
                         at the median length does not explain; pooled, weighted by that variance

Firing norms: the paper's share of activations by norm quartile (paper §6), with what is expected if the norms were
permuted among the tokens; on few sinks thousands of features co-fire, which is why sinks are in and out (paper §9 A2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosae.activations.sample import SINKS
from cosae.errors import CosaeError
from cosae.evaluate.encoded import EncodedPass
from cosae.evaluate.norms.counterfactual import MedianPass, Tally
from cosae.evaluate.statistics import RESAMPLES, percentile_interval, resample_counts
from cosae.sae.model import SAE

Array = NDArray[np.float64]

MOSTLY = 0.5
"""A feature whose norm-driven share is above this counts as mostly norm-driven."""
MIN_FIRINGS = 10
"""Features that fire on fewer tokens in either reading are left out of counts and means of features."""


def norm_driven(
    encoded: EncodedPass[SAE], median: MedianPass, seed: int = 0, n_resamples: int = RESAMPLES
) -> dict[str, Any]:
    """The counterfactual test at the inference rule: each token as it is, and with r = |x − c| set to the median.

    Returns {"median_r", "invariant", "sinks_in", "sinks_out"}; invariant: True where the frame or a = 0 makes the
    answer 0 whatever the data. In each set of tokens (padding is in none):
    share            firings that vanish or appear / firings in either reading (Jaccard distance); None without firings
    share_interval   [low, high]: 95 % bootstrap over documents (blocks of rows where there are none)
    vanished_frac    firings that vanish / firings as it is
    appeared_frac    firings that appear / firings at the median
    l0, l0_at_median firings per token
    value_change     mean |v' − v| / |v| over firings in both
    value_norm_frac  how much of the variance of a feature's value is norm, over firings in both (see above)
    features_mostly, features_counted, mean_feature_share, median_feature_share   features whose own share is above 0.5,
                     of those that fire on at least 10 tokens in one reading; and the mean and median of their shares
    per_feature      float64 arrays (F,): share (NaN where it never fires), firings, firings_at_median,
                     firings_in_both, value_norm_frac (NaN where its value never varies)
    """
    sae = encoded.sae
    return {
        "median_r": median.median_r,
        "invariant": sae.cfg.frame != "raw" or bool((sae.scale_a == 0).all()),
        **{sinks: _numbers(counts, seed, n_resamples) for sinks, counts in median.counts.items()},
    }


def paired_norm_differences(
    found: Mapping[str, MedianPass], unit: str, *, baseline: str, seed: int = 0, n_resamples: int = RESAMPLES
) -> list[dict[str, Any]]:
    """Norm-driven share of every other SAE minus the baseline's, 95 % intervals by a paired bootstrap over documents.

    found  second passes of the same tokens, by SAE, each at the median of its own |x − c|
    unit   what is drawn again: documents, or blocks of rows

    Rows of arm, versus, sinks, difference, low, high, unit, units, seed and resamples. SAEs that never fire have
    none. Raises CosaeError for a baseline that is not among the SAEs.
    """
    if baseline not in found:
        raise CosaeError(f"the baseline must be one of the SAEs {sorted(found)}. Got {baseline!r} instead.")
    rows = []
    for sinks in SINKS:
        base = found[baseline].counts[sinks]
        draws_RU = _draws(base.units, seed, n_resamples)
        for name in found:
            one = found[name].counts[sinks]
            if name == baseline or not (one.union_U.any() and base.union_U.any()):
                continue
            low, high = percentile_interval(_resampled_share(one, draws_RU) - _resampled_share(base, draws_RU))
            difference = (1 - one.both_U.sum() / one.union_U.sum()) - (1 - base.both_U.sum() / base.union_U.sum())
            row = {"arm": name, "versus": baseline, "sinks": sinks, "difference": float(difference)}
            resampled = {"unit": unit, "units": base.units, "seed": seed, "resamples": n_resamples}
            rows.append({**row, "low": low, "high": high, **resampled})
    return rows


def _numbers(found: Tally, seed: int, n_resamples: int) -> dict[str, Any]:
    union_F = found.actual_F + found.median_F - found.both_F
    share_F = np.divide(union_F - found.both_F, union_F, out=np.full_like(union_F, np.nan), where=union_F > 0)
    counted_F = np.maximum(found.actual_F, found.median_F) >= MIN_FIRINGS
    actual, median, both, union = (float(c.sum()) for c in (found.actual_F, found.median_F, found.both_F, union_F))
    tokens = int(found.keep_N.sum())
    share_R = _resampled_share(found, _draws(found.units, seed, n_resamples)) if union else None
    norm_F, norm_frac = found.value_norm()
    return {
        "tokens": tokens,
        "share": _over(union - both, union),
        "share_interval": None if share_R is None else list(percentile_interval(share_R)),
        "vanished_frac": _over(actual - both, actual),
        "appeared_frac": _over(median - both, median),
        "l0": _over(actual, tokens),
        "l0_at_median": _over(median, tokens),
        "value_change": _over(found.change, both),
        "value_norm_frac": norm_frac,
        "features_counted": int(counted_F.sum()),
        "features_mostly": int((share_F[counted_F] > MOSTLY).sum()),
        "mean_feature_share": float(share_F[counted_F].mean()) if counted_F.any() else None,
        "median_feature_share": float(np.median(share_F[counted_F])) if counted_F.any() else None,
        "per_feature": {
            "share": share_F,
            "firings": found.actual_F,
            "firings_at_median": found.median_F,
            "firings_in_both": found.both_F,
            "value_norm_frac": norm_F,
        },
    }


def _draws(units: int, seed: int, n_resamples: int) -> Array:
    return resample_counts(units, seed, n_resamples).astype(np.float64)


def _resampled_share(found: Tally, draws_RU: Array) -> Array:
    """(R,) pooled shares with documents drawn again; resamples without a firing are left at 0."""
    union_R, both_R = draws_RU @ found.union_U, draws_RU @ found.both_U
    share_R: Array = np.divide(union_R - both_R, union_R, out=np.zeros_like(union_R), where=union_R > 0)
    return share_R


def firing_norms(encoded: EncodedPass[Any]) -> dict[str, Any]:
    """Where in the norms features fire: {"sinks_in", "sinks_out"}, each with

    quartile_share   share of all firings in each norm quartile (quartiles of |x| among the tokens of the set)
    quartile_null    what is expected if norms were permuted among tokens: the quartiles' shares of tokens
    quartile_z       (share − null) / its exact permutation standard deviation, tokens kept whole
    mean_norm, mean_firing_norm            of the tokens; of the firings
    features_above, features_counted       features whose own mean firing norm is above the null by more than 3 standard
                     deviations, of those that fire on at least 10 tokens
    per_feature      float64 arrays: quartile_share (F, 4), mean_norm (F,), z (F,); NaN where it never fires

    All-zero rows are padding and in no set; a set without a token is None. Raises CosaeError where all rows are
    padding, and for a batch_topk without a threshold.
    """
    if not bool(encoded.keep["sinks_in"].any()):
        raise CosaeError(f"norms need at least one token that is not all zero. Got {len(encoded.norm_N)} rows, none.")
    if not getattr(encoded.sae, "calibrated", True):
        raise CosaeError(
            "firing norms read each token on its own, and this batch_topk SAE has no inference threshold: calibrate "
            "it first (cosae.sae.calibrate.calibrate)."
        )
    return {
        sinks: _firing_norms(encoded, keep_N) if bool(keep_N.any()) else None for sinks, keep_N in encoded.keep.items()
    }


def _firing_norms(encoded: EncodedPass[Any], keep_N: Tensor) -> dict[str, Any]:
    (token_E, feature_E), norm_N, d_sae = encoded.firings, encoded.norm_N, encoded.codes.d_sae
    norm_n = norm_N[keep_N].numpy()
    n = len(norm_n)
    cuts = np.quantile(norm_n, [0.25, 0.5, 0.75])
    quartile_n = np.searchsorted(cuts, norm_n, side="left")
    place_N = torch.cumsum(keep_N.long(), 0) - 1
    kept_E = keep_N[token_E]
    at_E, of_E = place_N[token_E[kept_E]].numpy(), feature_E[kept_E].numpy()
    flat = np.bincount(of_E * 4 + quartile_n[at_E], minlength=4 * d_sae)
    count_F4 = flat.reshape(d_sae, 4).astype(np.float64)
    count_F = count_F4.sum(1)
    sum_F = np.bincount(of_E, weights=norm_n[at_E], minlength=d_sae)
    mean_F = np.divide(sum_F, count_F, out=np.full(d_sae, np.nan), where=count_F > 0)
    mean, variance = float(norm_n.mean()), float(norm_n.var())
    spread_F = np.sqrt(
        variance * np.divide(n - count_F, count_F * max(n - 1, 1), out=np.zeros(d_sae), where=count_F > 0)
    )
    z_F = np.divide(mean_F - mean, spread_F, out=np.full(d_sae, np.nan), where=spread_F > 0)
    counted_F = count_F >= MIN_FIRINGS
    total = float(count_F.sum())
    l0_n = np.bincount(at_E, minlength=n).astype(np.float64)
    null_4 = np.bincount(quartile_n, minlength=4) / n
    sd_4 = np.sqrt(null_4 * (1 - null_4) * n * n * l0_n.var() / max(n - 1, 1)) / max(total, 1.0)
    share_4 = count_F4.sum(0) / max(total, 1.0)
    z_4 = np.divide(share_4 - null_4, sd_4, out=np.full(4, np.nan), where=sd_4 > 0)
    return {
        "tokens": n,
        "firings": int(total),
        "quartile_share": share_4.tolist() if total else None,
        "quartile_null": null_4.tolist(),
        "quartile_z": [None if np.isnan(z) else float(z) for z in z_4],
        "mean_norm": mean,
        "mean_firing_norm": _over(float(sum_F.sum()), total),
        "features_counted": int(counted_F.sum()),
        "features_above": int((z_F[counted_F] > 3).sum()),
        "per_feature": {
            "quartile_share": np.divide(
                count_F4, count_F[:, None], out=np.full_like(count_F4, np.nan), where=count_F[:, None] > 0
            ),
            "mean_norm": mean_F,
            "z": z_F,
        },
    }


def _over(value: float, unit: float) -> float | None:
    return value / unit if unit > 0 else None
