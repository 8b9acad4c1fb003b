"""Folds of raw-frame weights by their names on disk: other weights, the same outputs. Needs no SAELens.

Scaling encoder columns cannot fold a cosine score, which normalises them; SAELens' own folds do that. Here, with
n = |decoder row| and s the factor activations were multiplied by (cosae.sae.fold holds the same for `cosae.SAE`):

    decoder norm   b += ln n,  β · n,  threshold · n,  W_dec / n        (inner product: W_enc · n)
    input scale    b += a ln s,  W_dec / s,  b_dec / s                  (inner product: W_enc · s)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.types import at_least_fp32

NORM_MIN = 1e-8
"""Smallest decoder row length that is divided by, as in SAELens: a zero row stays zero and adds nothing."""


@torch.no_grad()
def fold_decoder_norm(weights: Mapping[str, Tensor], score: str) -> dict[str, Tensor]:
    """The weights that change for unit decoder rows; codes are multiplied by the old lengths.

    A shared scale_b () becomes one per feature (F,). `threshold` is folded where there is one. fp32 or float64.
    """
    rows_FD = at_least_fp32(weights["W_dec"])
    norm_F = torch.linalg.vector_norm(rows_FD, dim=-1).clamp_min(NORM_MIN)
    changed = {"W_dec": rows_FD / norm_F[:, None]}
    for name in ("b_enc", "threshold"):
        if name in weights:
            changed[name] = at_least_fp32(weights[name]) * norm_F
    if score == "inner":
        changed["W_enc"] = at_least_fp32(weights["W_enc"]) * norm_F
    else:
        changed["scale_b"] = at_least_fp32(weights["scale_b"]) + norm_F.log()
    return changed


@torch.no_grad()
def fold_input_scale(weights: Mapping[str, Tensor], score: str, s: float) -> dict[str, Tensor]:
    """The weights that change for an SAE of x out of one trained on s · x. Raises CosaeError unless 0 < s < ∞."""
    if not (math.isfinite(s) and s > 0):
        raise CosaeError(f"the activation scaling factor must be a positive number. Got {s!r} instead.")
    changed = {name: at_least_fp32(weights[name]) / s for name in ("W_dec", "b_dec")}
    if score == "inner":
        changed["W_enc"] = at_least_fp32(weights["W_enc"]) * s
    else:
        shift = at_least_fp32(weights["scale_a"]) * math.log(s)
        changed["scale_b"] = at_least_fp32(weights["scale_b"]) + shift
    return changed
