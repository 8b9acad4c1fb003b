"""Give an SAE its inference threshold: measured on data at the wanted L0, not hoped for.

For selectors whose inference rule is "m > t" (batch_topk, jumprelu, gated), t lies midway between the
(k·N)-th and the next largest statistic m of N calibration tokens: exactly k·N entries lie above it. It depends on no
batch size and on no running average. A gated entry whose magnitude is 0 is no firing and is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.kernels import ScoreTerms, reference
from cosae.sae.model import SAE, Calibration
from cosae.sae.selector import CALIBRATED_SELECTORS, divided

CHUNK_ENTRIES = 16_000_000
"""Scores held at once: tokens per chunk = this over d_sae."""

FVE_TOKENS = 8192
"""Tokens on which an SAE's file says how well it reconstructs: few enough to cost little beside the calibration."""


@torch.no_grad()
def calibrate(
    sae: SAE, x_ND: Tensor, target_l0: float | None = None, on_rows: Callable[[int], None] = lambda n: None
) -> Calibration:
    """Set the inference threshold in place so that the mean L0 on x (N, d_in) is target_l0 (default k).

    on_rows gets the number of tokens after each part: of all of them twice, or more often where a first search for the
    threshold did not reach it.

    topk and abs_topk have none and are only measured. Raises CosaeError for an x without a live row or that `encode`
    would refuse, and for a target outside (0, d_sae]; the SAE is then as it was.
    """
    x_ND = sae._checked(x_ND)
    if not bool((x_ND != 0).any()):
        raise CosaeError("calibration needs at least one activation that is not 0. Got none: pass a larger sample.")
    target = float(sae.k if target_l0 is None else target_l0)
    if not 0 < target <= sae.d_sae:
        raise CosaeError(f"target_l0 must lie above 0 and at most d_sae = {sae.d_sae}. Got {target_l0!r} instead.")
    margin = 0.0
    if sae.cfg.selector in CALIBRATED_SELECTORS:
        if sae.cfg.selector == "batch_topk":
            sae.selector.threshold = sae.selector.threshold.new_tensor(float("nan"))
        margin = _order_statistic(sae, x_ND, target, on_rows)
        sae.selector.set_margin(margin)
    return Calibration(target, measure_l0(sae, x_ND, on_rows), len(x_ND), margin)


@torch.no_grad()
def to_jumprelu(sae: SAE, x_ND: Tensor, on_rows: Callable[[int], None] = lambda n: None) -> SAE:
    """A new SAE of the same weights with the selector jumprelu, whose θ_i let each feature fire as often on x (N, d_in)
    as it does in this one, a topk or a calibrated batch_topk.

    θ_i lies midway between the n-th and the next score of feature i, or 0; where i fires on no token, just above its
    largest score, and where that is not above 0, at the median of the other θ. Raises CosaeError for other selectors,
    and for an x on which nothing fires or that `encode` would refuse.
    """
    if sae.cfg.selector not in ("topk", "batch_topk"):
        raise CosaeError(f"thresholds per feature are for topk and batch_topk. Got the selector {sae.cfg.selector}.")
    if not sae.calibrated:
        raise CosaeError(
            "this batch_topk SAE has no threshold yet, so how often a feature fires is open: calibrate it."
        )
    x_ND = sae._checked(x_ND)
    count_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.device)
    for rows in torch.split(x_ND, 4096):
        count_F += torch.bincount(sae.encode(rows).feature_E, minlength=sae.d_sae)
        on_rows(len(rows))
    if not bool(count_F.any()):
        raise CosaeError("thresholds per feature need activations on which features fire. Got none: pass others.")
    terms = sae.score.terms(sae._framed(x_ND)).detached()
    parts = torch.split(torch.arange(sae.d_sae, device=sae.device), max(1, CHUNK_ENTRIES // len(x_ND)))
    theta_F = torch.cat([_feature_thresholds(terms, feature_S, count_F[feature_S]) for feature_S in parts])
    theta_F = torch.where(theta_F > 0, theta_F, theta_F[theta_F > 0].median())
    new = SAE(replace(sae.cfg, selector="jumprelu", a_window=0.0)).to(device=sae.device, dtype=sae.dtype)
    new.kernel, new.metadata = sae.kernel, {**sae.metadata, "selector_before": sae.cfg.selector}
    kept = {name: value for name, value in sae.state_dict().items() if not name.startswith("selector.")}
    new.load_state_dict(kept, strict=False)
    new.selector.log_threshold_F.copy_(theta_F.log())
    return new


def _feature_thresholds(terms: ScoreTerms, feature_S: Tensor, count_S: Tensor) -> Tensor:
    """(S,) that count of each feature's scores lie above; 0 where it fires nowhere and its scores are not above 0."""
    score_NS = reference.scores(terms.of_features(feature_S, terms.rows_FD[feature_S]))
    ranked_NS = score_NS.sort(dim=0, descending=True).values.clamp_min(0)
    last = len(ranked_NS) - 1
    above_S = ranked_NS.gather(0, (count_S - 1).clamp_min(0)[None])[0]
    below_S = torch.where(count_S <= last, ranked_NS.gather(0, count_S.clamp_max(last)[None])[0], 0.0)
    return torch.where(count_S > 0, 0.5 * (above_S + below_S), 1.001 * above_S)


@torch.no_grad()
def measure_l0(sae: SAE, x_ND: Tensor, on_rows: Callable[[int], None] = lambda n: None) -> float:
    """Mean number of active features per live token of x (N, d_in) at the inference rule."""
    fired = live = 0
    for rows in torch.split(x_ND, 4096):
        fired += int(sae.encode(rows).feature_E.shape[0])
        live += int((rows != 0).any(-1).sum())
        on_rows(len(rows))
    return fired / max(live, 1)


@torch.no_grad()
def measure_fve(sae: SAE, x_ND: Tensor, n_tokens: int = FVE_TOKENS, y_ND: Tensor | None = None) -> float | None:
    """1 − Σ|x − x̂|² / Σ|x − mean x|² of the first tokens of x (N, d_in); None where that is no number.

    y (N, d_out): of a transcoder, its targets, in the place of x but as input.
    """
    x_ND = x_ND[:n_tokens]
    wanted_ND = x_ND if y_ND is None else y_ND[:n_tokens]
    mean_D = wanted_ND.double().mean(0)
    residual = total = 0.0
    for rows, wanted in zip(torch.split(x_ND, 1024), torch.split(wanted_ND, 1024), strict=True):
        residual += float((wanted - sae(rows)).double().square().sum())
        total += float((wanted.double() - mean_D).square().sum())
    return 1 - residual / total if total > 0 and math.isfinite(residual) else None


def _order_statistic(sae: SAE, x_ND: Tensor, target: float, on_rows: Callable[[int], None]) -> float:
    """The statistic above which round(target · N) of the firing entries lie; below all of them where fewer fire."""
    per_token = 2.0 * target
    while True:
        kept: list[Tensor] = []
        floors: list[float] = []
        live, hint = 0, None
        for rows in torch.split(x_ND, max(64, CHUNK_ENTRIES // sae.d_sae)):
            framed = sae._framed(rows)
            terms = sae.score.terms(framed)
            n = math.ceil(per_token * len(rows))
            m, hint = _largest_gated(sae, terms, n) if sae.cfg.selector == "gated" else _largest(sae, terms, n, hint)
            live += int(framed.live_B.sum())
            kept.append(m)
            floors.append(float(m.min()) if len(m) == n else -math.inf)
            on_rows(len(rows))
        merged = torch.cat(kept)
        n_keep = round(target * live)
        t = _below_all(sae, merged) if len(merged) <= n_keep else _between(merged, n_keep)
        if t >= max(floors) or per_token >= sae.d_sae:
            return t
        per_token *= 2.0  # one chunk holds more of the largest entries than were kept of it


def _largest(sae: SAE, terms: ScoreTerms, n: int, hint: float | None) -> tuple[Tensor, float | None]:
    """The n largest positive statistics of a chunk, by the kernel's own search."""
    kernel = sae._kernel()
    ranked = divided(terms, sae.selector.margin_gain_F)
    entries, hint = kernel.select_batch_topk(ranked, n, hint)
    m = kernel.entry_content(ranked, entries)
    return m if ranked.bias_F is None else m + ranked.bias_F[entries.feature_E], hint


def _largest_gated(sae: SAE, terms: ScoreTerms, n: int) -> tuple[Tensor, None]:
    """The n largest gate scores π, of any sign, among entries whose magnitude is positive: only those can fire."""
    score_BF = reference.scores(terms)[terms.live_B]
    magnitude_BF = sae.selector.r_mag_F.exp() * reference.content(terms)[terms.live_B] + sae.selector.b_mag_F
    m = (score_BF / sae.selector.margin_gain_F)[magnitude_BF > 0]
    return m.topk(min(n, len(m))).values, None


def _below_all(sae: SAE, merged: Tensor) -> float:
    """A finite threshold that lets every firing entry pass; JumpReLU's scales θ, so it must also be above 0."""
    if sae.cfg.selector == "batch_topk":
        return 0.0
    if len(merged) == 0:
        return 1.0 if sae.cfg.selector == "jumprelu" else 0.0
    least = float(merged.min())
    return 0.5 * least if sae.cfg.selector == "jumprelu" else least - 1.0


def _between(merged: Tensor, n_keep: int) -> float:
    """Midway between the n_keep-th largest and the next: no entry lies at the threshold, so rounding flips none."""
    below = float(merged.kthvalue(len(merged) - n_keep).values)
    if n_keep == 0:
        return below
    above = float(merged.kthvalue(len(merged) - n_keep + 1).values)
    middle = 0.5 * (above + below)
    return middle if below < middle < above else below
