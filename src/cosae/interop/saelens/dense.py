"""Scores and selectors on dense tensors: what SAELens' hooks can see and edit. Needs no SAELens.

Enter activations (B, D) framed by `cosae.sae.frame`, weights by their names on disk; leave dense scores and codes
(B, F). The same formulas as `cosae.SAE.encode`, which keeps only the selected entries (paper §1, §2):

    s = exp(b) · r^a · |w|^u · κ + β,   codes = r^δ · select(s) by the inference rule of cosae.sae.selector
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cosae.kernels import ScoreTerms, reference
from cosae.sae.config import SAEConfig
from cosae.sae.score import SCORES
from cosae.types import Framed, at_least_fp32

HALF = (torch.float16, torch.bfloat16)


def dense_terms(framed: Framed, score: str, weights: Mapping[str, Tensor]) -> ScoreTerms:
    """What scores are made of; differentiable.

    weights: W_enc (D, F); scale_a, scale_b () or (F,) but for `inner`; b_enc or b_gate (F,) where there is a bias;
    value_exponent () or (F,) where there is one.
    """
    family = SCORES[score]
    plain = family.row_power == 1
    bias = weights.get("b_gate", weights.get("b_enc"))
    one, delta = framed.z_BD.new_ones(()), weights.get("value_exponent")
    return ScoreTerms(
        z_BD=framed.z_BD,
        rows_FD=at_least_fp32(weights["W_enc"]).T,
        bias_F=None if bias is None else at_least_fp32(bias),
        exponent=one if plain else at_least_fp32(weights["scale_a"]),
        log_gain=one * 0 if plain else at_least_fp32(weights["scale_b"]),
        row_power=family.row_power,
        live_B=framed.live_B,
        value_exponent=None if delta is None else at_least_fp32(delta),
        plain=plain,
    )


def dense_scores(terms: ScoreTerms) -> tuple[Tensor, Tensor]:
    """(content, score), each (B, F) fp32 or float64, 0 for rows that are not live; differentiable."""
    live_B1 = terms.live_B[:, None]
    content_BF = torch.where(live_B1, reference.content(terms), 0.0)
    if terms.bias_F is None:
        return content_BF, content_BF
    return content_BF, content_BF + terms.bias_F * live_B1


def dense_codes(
    cfg: SAEConfig, framed: Framed, weights: Mapping[str, Tensor], hook: Callable[[Tensor], Tensor]
) -> Tensor:
    """(B, F) codes by the inference rule; rows that are not live stay 0. `hook` sees, and may edit, what is selected.

    weights, beside those of `dense_terms`: threshold (F,) of a calibrated batch_topk or gated, log_threshold (F,) of
    jumprelu, rank_gain (F,) after a fold, r_mag and b_mag (F,) of gated (arXiv 2404.16014).
    """
    terms = dense_terms(framed, cfg.score, weights)
    content_BF, score_BF = dense_scores(terms)
    live_B1 = framed.live_B[:, None]
    threshold = at_least_fp32(weights["threshold"]) if "threshold" in weights else None
    if cfg.selector == "gated":
        magnitude_BF = hook(at_least_fp32(weights["r_mag"]).exp() * content_BF + at_least_fp32(weights["b_mag"]))
        keep_BF = score_BF > (0.0 if threshold is None else threshold)
        return torch.where(keep_BF & live_B1, reference.values(terms, magnitude_BF.relu()), 0.0)
    score_BF = hook(score_BF)
    if cfg.selector == "jumprelu":
        keep_BF = score_BF > at_least_fp32(weights["log_threshold"]).exp()
    elif cfg.selector == "batch_topk" and threshold is not None:
        keep_BF = score_BF > threshold
    else:
        rank_BF = (score_BF.abs() if cfg.selector == "abs_topk" else score_BF.relu()) * live_B1
        if "rank_gain" in weights:
            rank_BF = rank_BF / at_least_fp32(weights["rank_gain"])
        keep_BF = _largest(rank_BF, cfg, int(framed.live_B.sum())) & (rank_BF > 0)
    return torch.where(keep_BF & live_B1, reference.values(terms, score_BF), 0.0)


def _largest(rank_BF: Tensor, cfg: SAEConfig, n_live: int) -> Tensor:
    """(B, F) bool: the k largest of each row, or the k · n_live largest of the batch."""
    mask_BF, k = torch.zeros_like(rank_BF, dtype=torch.bool), cfg.sizes[2]
    if cfg.selector != "batch_topk":
        return mask_BF.scatter_(1, rank_BF.topk(min(k, rank_BF.shape[1]), dim=1).indices, True)
    flat = rank_BF.reshape(-1)
    kept = flat.topk(min(k * n_live, flat.numel()), sorted=False).indices
    return mask_BF.reshape(-1).scatter_(0, kept, True).reshape(rank_BF.shape)
