"""Give an SAE its inference threshold: measured on data at the wanted L0, not hoped for.

For selectors whose inference rule is "m > t" (batch_topk, jumprelu, gated), t lies midway between the
(k·N)-th and the next largest statistic m of N calibration tokens: exactly k·N entries lie above it. It depends on no batch size and on no running average
(house.md, traps). A gated entry whose magnitude is 0 is no firing, so for it the count is checked and mended.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cosae.kernels import reference
from cosae.sae.model import SAE, Calibration
from cosae.sae.selector import CALIBRATED_SELECTORS
from cosae.types import CosaeError

CHUNK_ENTRIES = 16_000_000
"""Scores held at once: tokens per chunk = this over d_sae."""


@torch.no_grad()
def calibrate(sae: SAE, x_ND: Tensor, target_l0: float | None = None) -> Calibration:
    """Set the inference threshold in place so that the mean L0 on x (N, d_in) is target_l0 (default k).

    topk and abs_topk have none and are only measured. Raises CosaeError for an empty x.
    """
    if len(x_ND) == 0:
        raise CosaeError("calibration needs at least one activation. Got none: pass a larger sample.")
    target = float(sae.k if target_l0 is None else target_l0)
    margin = 0.0
    if sae.cfg.selector in CALIBRATED_SELECTORS:
        if sae.cfg.selector == "batch_topk":
            sae.selector.threshold = sae.selector.threshold.new_tensor(float("nan"))
        margin = _order_statistic(sae, x_ND, target)
        sae.selector.set_margin(margin)
    return Calibration(target, measure_l0(sae, x_ND), len(x_ND), margin)


@torch.no_grad()
def measure_l0(sae: SAE, x_ND: Tensor) -> float:
    """Mean number of active features per live token of x (N, d_in) at the inference rule."""
    fired = live = 0
    for rows in x_ND.split(4096):
        fired += int(sae.encode(rows).feature_E.shape[0])
        live += int((rows != 0).any(-1).sum())
    return fired / max(live, 1)


def _order_statistic(sae: SAE, x_ND: Tensor, target: float) -> float:
    """The statistic above which round(target · N) of the firing entries lie; 0 where fewer fire at all."""
    step = max(64, CHUNK_ENTRIES // sae.d_sae)
    per_token = 2.0 * target
    lowest = -math.inf if sae.cfg.selector == "gated" else 0.0
    while True:
        kept: list[Tensor] = []
        floors: list[float] = []
        live = 0
        for rows in x_ND.split(step):
            framed = sae._framed(rows)
            terms = sae.score.terms(framed)
            m = sae.selector.margin(reference.scores(terms)[framed.live_B]).reshape(-1)
            live += int(framed.live_B.sum())
            m = m[_can_fire(sae, terms, framed.live_B)] if sae.cfg.selector == "gated" else m[m > 0]
            n = min(len(m), max(1, math.ceil(per_token * len(rows))))
            top = m.topk(n).values
            kept.append(top)
            floors.append(float(top[-1]) if 0 < n < len(m) else lowest)
        merged = torch.cat(kept)
        n_keep = round(target * live)
        if len(merged) <= n_keep:
            t = min(lowest, float(merged.min()) - 1.0) if sae.cfg.selector == "gated" and len(merged) else 0.0
        else:
            t = _between(merged, n_keep)
        if t >= max(floors) or per_token >= sae.d_sae:
            return t
        per_token *= 2.0  # one chunk holds more of the largest entries than were kept of it


def _between(merged: Tensor, n_keep: int) -> float:
    """Midway between the n_keep-th largest and the next: no entry lies at the threshold, so rounding flips none."""
    below = float(merged.kthvalue(len(merged) - n_keep).values)
    if n_keep == 0:
        return below
    above = float(merged.kthvalue(len(merged) - n_keep + 1).values)
    middle = 0.5 * (above + below)
    return middle if below < middle < above else below


def _can_fire(sae: SAE, terms: reference.ScoreTerms, live_B: Tensor) -> Tensor:
    """Gated: (live · F,) True where the magnitude is positive, so that an open gate is a firing."""
    magnitude_BF = sae.selector.r_mag_F.exp() * reference.content(terms)[live_B] + sae.selector.b_mag_F
    return (magnitude_BF > 0).reshape(-1)
