"""Is a feature driven by norm? The counterfactual test, and beside it where in the norms a feature fires.

In: a cosae SAE and Activations. Out: plain numbers, per feature and pooled, with sinks in and out.

Counterfactual: every token keeps the direction of x − c and gets the length r' = the median r. Its scores become
    s'_i = content_i · (r'/r)^{a_i} + β_i          (paper §1; the inner product is a = 1)
so the same products serve both readings, and where a = 0 the factor is 1 to the last bit: the answer is exactly 0. The
unit and layer_norm frames take the length out before anything is scored: there it is 0 by construction as well.
A firing that vanishes or appears is norm-driven.

Firing norms: the paper's share of activations by norm quartile (paper §6), with what is expected if the norms were
permuted among the tokens; on few sinks thousands of features co-fire, which is why sinks are in and out (paper §9 A2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosae.evaluate.encoding import encode_all
from cosae.evaluate.rebuilt import row_slices
from cosae.kernels import ScoreTerms, reference
from cosae.sae import frame as frames
from cosae.sae.model import SAE
from cosae.types import Activations, Codes, CosaeError

Array = NDArray[np.float64]

DENSE_ELEMENTS = 1 << 24
"""Scores held at once (64 MB in fp32, a few copies of it): a bound on memory, of no influence on the numbers."""
MOSTLY = 0.5
"""A feature whose norm-driven share is above this counts as mostly norm-driven."""
MIN_FIRINGS = 10
"""Features that fire on fewer tokens in either reading are left out of counts of features."""


@dataclass
class _Counts:
    """Firings by feature: as it is, at the median norm, in both; and the change of value over those in both."""

    actual_F: Tensor
    median_F: Tensor
    both_F: Tensor
    change: float = 0.0
    tokens: int = 0

    @classmethod
    def zero(cls, d_sae: int) -> _Counts:
        zeros = torch.zeros(d_sae, dtype=torch.int64)
        return cls(zeros, zeros.clone(), zeros.clone())

    def add(self, now_BF: Tensor, then_BF: Tensor, value_BF: Tensor, other_BF: Tensor, keep_B: Tensor) -> None:
        now_BF, then_BF = now_BF & keep_B[:, None], then_BF & keep_B[:, None]
        both_BF = now_BF & then_BF
        self.actual_F += now_BF.sum(0).cpu()
        self.median_F += then_BF.sum(0).cpu()
        self.both_F += both_BF.sum(0).cpu()
        value_E, other_E = value_BF[both_BF].double(), other_BF[both_BF].double()
        self.change += float(((other_E - value_E).abs() / value_E.abs().clamp_min(1e-30)).sum())
        self.tokens += int(keep_B.sum())

    def numbers(self) -> dict[str, Any]:
        actual_F, median_F, both_F = (c.numpy().astype(np.float64) for c in (self.actual_F, self.median_F, self.both_F))
        union_F = actual_F + median_F - both_F
        share_F = np.divide(union_F - both_F, union_F, out=np.full_like(union_F, np.nan), where=union_F > 0)
        counted_F = np.maximum(actual_F, median_F) >= MIN_FIRINGS
        actual, median, both, union = (float(c.sum()) for c in (actual_F, median_F, both_F, union_F))
        return {
            "tokens": self.tokens,
            "share": _over(union - both, union),
            "vanished_frac": _over(actual - both, actual),
            "appeared_frac": _over(median - both, median),
            "l0": _over(actual, self.tokens),
            "l0_at_median": _over(median, self.tokens),
            "value_change": _over(self.change, both),
            "features_counted": int(counted_F.sum()),
            "features_mostly": int((share_F[counted_F] > MOSTLY).sum()),
            "median_feature_share": float(np.median(share_F[counted_F])) if counted_F.any() else None,
            "per_feature": {
                "share": share_F,
                "firings": actual_F,
                "firings_at_median": median_F,
                "firings_in_both": both_F,
            },
        }


@torch.no_grad()
def norm_driven(
    sae: SAE,
    activations: Activations,
    sink_N: Tensor | None = None,
    *,
    median_r: float | None = None,
    batch_tokens: int = 4096,
) -> dict[str, Any]:
    """The counterfactual test at the inference rule: each token as it is, and with r = |x − c| set to the median.

    sink_N    (N,) bool, tokens set apart; none by default. They do not enter the median
    median_r  the length every token gets; the median r of the tokens that are no sinks by default

    Returns {"median_r", "invariant", "sinks_in", "sinks_out"}; invariant: True where the frame or a = 0 makes the
    answer 0 whatever the data. In each set of tokens:
    share            firings that vanish or appear / firings in either reading (Jaccard distance); None without firings
    vanished_frac    firings that vanish / firings as it is
    appeared_frac    firings that appear / firings at the median
    l0, l0_at_median firings per token
    value_change     mean |v' − v| / |v| over firings in both: how much of a value is the token's length
    features_mostly, features_counted, median_feature_share   features whose own share is above 0.5, of those that fire
                     on at least 10 tokens in one reading; and the median of their shares
    per_feature      float64 arrays (F,): share (NaN where it never fires), firings, firings_at_median, firings_in_both

    Raises CosaeError for a batch_topk without a threshold (what a token keeps would depend on its batch), or no token.
    """
    if not sae.calibrated:
        raise CosaeError(
            "the norm test reads each token on its own, and this batch_topk SAE has no inference threshold: calibrate "
            "it first (cosae.sae.calibrate.calibrate)."
        )
    n = len(activations)
    out_N = torch.ones(n, dtype=torch.bool) if sink_N is None else ~sink_N.cpu()
    if n == 0 or tuple(out_N.shape) != (n,):
        raise CosaeError(f"the norm test needs tokens, and a sink mask with one entry for each of {n}.")
    live_N = (activations.x_ND != 0).any(-1).cpu()
    r_N = lengths(sae, activations, batch_tokens)
    middle_N = r_N[out_N & live_N] if bool((out_N & live_N).any()) else r_N[live_N]
    middle = float(np.median(middle_N.numpy())) if median_r is None and len(middle_N) else (median_r or 0.0)
    counts = {"sinks_in": _Counts.zero(sae.d_sae), "sinks_out": _Counts.zero(sae.d_sae)}
    kernel_free = sae.cfg.frame != "raw"
    for rows in row_slices(n, max(1, min(batch_tokens, DENSE_ELEMENTS // sae.d_sae))):
        framed = frames.take(sae.cfg.frame, activations.x_ND[rows].float().to(sae.device), sae.centre_D)
        terms = sae.score.terms(framed).detached()
        content_BF = reference.content(terms)
        log_ratio_B = torch.zeros_like(framed.taken.r_B)
        if not kernel_free and middle > 0:
            r_B = framed.taken.r_B
            log_ratio_B = torch.where(r_B > 0, np.log(middle) - r_B.clamp_min(1e-30).log(), 0.0)
        other_BF = content_BF * (terms.exponent * log_ratio_B[:, None]).exp()
        now_BF, value_BF = _fired(sae, terms, content_BF)
        then_BF, there_BF = _fired(sae, terms, other_BF)
        for name, keep_B in (("sinks_in", live_N[rows]), ("sinks_out", live_N[rows] & out_N[rows])):
            counts[name].add(now_BF, then_BF, value_BF, there_BF, keep_B.to(sae.device))
    return {
        "median_r": middle,
        "invariant": sae.cfg.frame != "raw" or bool((sae.scale_a == 0).all()),
        **{name: found.numbers() for name, found in counts.items()},
    }


@torch.no_grad()
def lengths(sae: SAE, activations: Activations, batch_tokens: int = 4096) -> Tensor:
    """(N,) float64: r = |x − c| of every token; in the layer_norm frame, where c lives after it, |x − mean x|."""
    parts = []
    for rows in row_slices(len(activations), batch_tokens):
        x_BD = activations.x_ND[rows].double()
        about = x_BD.mean(-1, keepdim=True) if sae.cfg.frame == "layer_norm" else sae.centre_D.double().to(x_BD.device)
        parts.append((x_BD - about).norm(dim=-1).cpu())
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _fired(sae: SAE, terms: ScoreTerms, content_BF: Tensor) -> tuple[Tensor, Tensor]:
    """(B, F) bool and values: the inference rule of every selector, on content that is already there."""
    selector = sae.selector
    score_BF = content_BF if terms.bias_F is None else content_BF + terms.bias_F
    score_BF = torch.where(terms.live_B[:, None], score_BF, -torch.inf)
    if selector.name in ("topk", "abs_topk"):
        gain_F = selector.rank_gain_F
        ranked_BF = torch.where(terms.live_B[:, None], score_BF / gain_F, 0.0)
        ranked_BF = ranked_BF.abs() if selector.name == "abs_topk" else ranked_BF.relu()
        keep_BK = ranked_BF.sort(dim=-1, descending=True, stable=True).indices[:, : selector.k]
        mask_BF = torch.zeros_like(ranked_BF, dtype=torch.bool).scatter_(1, keep_BK, True)
        return mask_BF & (ranked_BF > 0), score_BF
    if selector.name == "gated":
        opened_BF = score_BF > torch.nan_to_num(selector.threshold, nan=0.0)
        value_BF = (selector.r_mag_F.exp() * content_BF + selector.b_mag_F).relu()
        return opened_BF & (value_BF > 0), value_BF
    return score_BF > sae.threshold, score_BF


def firing_norms(
    sae: SAE,
    activations: Activations,
    sink_N: Tensor | None = None,
    *,
    codes: Codes | None = None,
    batch_tokens: int = 4096,
) -> dict[str, Any]:
    """Where in the norms features fire: {"sinks_in", "sinks_out"}, each with

    quartile_share   share of all firings in each norm quartile (quartiles of |x| among the tokens of the set)
    quartile_null    what is expected if norms were permuted among tokens: the quartiles' shares of tokens
    quartile_z       (share − null) / its exact permutation standard deviation, tokens kept whole
    mean_norm, mean_firing_norm            of the tokens; of the firings
    features_above, features_counted       features whose own mean firing norm is above the null by more than 3 standard
                     deviations, of those that fire on at least 10 tokens
    per_feature      float64 arrays: quartile_share (F, 4), mean_norm (F,), z (F,); NaN where it never fires

    codes: the codes of all tokens, where they are at hand. Raises CosaeError where the set has no token.
    """
    codes = encode_all(sae, activations) if codes is None else codes
    out_N = torch.ones(len(activations), dtype=torch.bool) if sink_N is None else ~sink_N.cpu()
    every = torch.ones_like(out_N)
    norm_N = activations.norm_N.cpu().double()
    return {
        "sinks_in": _firing_norms(codes, norm_N, every),
        "sinks_out": _firing_norms(codes, norm_N, out_N) if bool(out_N.any()) else None,
    }


def _firing_norms(codes: Codes, norm_N: Tensor, keep_N: Tensor) -> dict[str, Any]:
    norm_n = norm_N[keep_N].numpy()
    n = len(norm_n)
    if n == 0:
        raise CosaeError("firing norms need at least one token; got none instead")
    cuts = np.quantile(norm_n, [0.25, 0.5, 0.75])
    quartile_n = np.searchsorted(cuts, norm_n, side="left")
    place_N = torch.cumsum(keep_N.long(), 0) - 1
    alive_E = (codes.value_E != 0) & keep_N[codes.token_E]
    token_E, feature_E = place_N[codes.token_E[alive_E]].numpy(), codes.feature_E[alive_E].numpy()
    count_F4 = np.zeros((codes.d_sae, 4))
    np.add.at(count_F4, (feature_E, quartile_n[token_E]), 1.0)
    count_F = count_F4.sum(1)
    sum_F = np.bincount(feature_E, weights=norm_n[token_E], minlength=codes.d_sae)
    mean_F = np.divide(sum_F, count_F, out=np.full(codes.d_sae, np.nan), where=count_F > 0)
    mean, variance = float(norm_n.mean()), float(norm_n.var())
    spread_F = np.sqrt(
        variance * np.divide(n - count_F, count_F * max(n - 1, 1), out=np.zeros(codes.d_sae), where=count_F > 0)
    )
    z_F = np.divide(mean_F - mean, spread_F, out=np.full(codes.d_sae, np.nan), where=spread_F > 0)
    counted_F = count_F >= MIN_FIRINGS
    total = float(count_F.sum())
    l0_n = np.bincount(token_E, minlength=n).astype(np.float64)
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
