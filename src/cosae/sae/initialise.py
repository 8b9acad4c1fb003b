"""All initialisation in one place (paper §1 and §3): what a fresh SAE starts from, and what a sample decides.

decoder rows  Kaiming uniform, then unit length; encoder rows a copy of them; β = 0
centre c      geometric median of a sample (Weiszfeld), its mean, or 0
a, δ          a_init, value_exponent_init
b             ½ ln d ("sqrt_d"), ln mean|z| ("norm"), or by "auto" (1 − a − δ) times the second where mean|z| and √d are
              more than a factor 2 apart, else (1 − a − δ) times the first: at a + δ = 1 codes have their size by
              themselves
θ, gate bias  the quantile of *all* scores of the sample at which k of d_sae pass (paper §9 #9: the quantile of
              the positive ones alone starts at half the wanted L0)
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.kernels import reference
from cosae.sae import frame as frames
from cosae.sae.config import InitConfig, SAEConfig, check_activations
from cosae.sae.decoder import Decoder
from cosae.sae.score import Score, sqrt_d_gain
from cosae.sae.selector import PENALISED_SELECTORS, Selector

SAMPLE_ROWS = 4096
"""Rows of the sample that are looked at; more would not change the centre visibly."""


def geometric_median(x_ND: Tensor, max_iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """(N, D) → (D,): the point of least summed distance, by Weiszfeld's iteration from the mean.

    Distances are clamped at 1e-8; stops when the point moves less than `tolerance` (paper §3).
    """
    point_D = x_ND.mean(0)
    for _ in range(max_iterations):
        weight_N = 1.0 / torch.linalg.vector_norm(x_ND - point_D, dim=-1).clamp_min(1e-8)
        moved_D = (weight_N[:, None] * x_ND).sum(0) / weight_N.sum()
        shift = float(torch.linalg.vector_norm(moved_D - point_D))
        point_D = moved_D
        if shift < tolerance:
            break
    return point_D


def _log_gain(b_init: str | float, d_in: int, a: float, z_ND: Tensor | None) -> float:
    if not isinstance(b_init, str):
        return float(b_init)
    sqrt_d = sqrt_d_gain(d_in)
    # r^a κ at a start of 1 has the inner product's size by itself: what auto adds shrinks with 1 − a, a all growth
    left = 1.0 - a if b_init == "auto" else 1.0
    if b_init == "sqrt_d" or (z_ND is None and b_init == "auto"):
        return left * sqrt_d
    if z_ND is None:
        raise CosaeError("b_init='norm' needs a sample of activations to fit to: pass sample=, or use sqrt_d.")
    fitted = math.log(max(float(torch.linalg.vector_norm(z_ND, dim=-1).mean()), frames.SCALE_MIN))
    if b_init == "auto" and abs(fitted - sqrt_d) <= math.log(2.0):
        return left * sqrt_d
    return left * fitted


@torch.no_grad()
def initialise(
    cfg: SAEConfig,
    init: InitConfig,
    centre_D: Tensor,
    score: Score,
    selector: Selector,
    decoder: Decoder,
    *,
    seed: int,
    sample: Tensor | None = None,
) -> None:
    """Set every parameter of an SAE's parts in place from `seed` and, where given, a sample (n, d_in) of activations.

    Raises CosaeError for a sample of the wrong width or without a live row.
    """
    d_in, d_sae, _ = cfg.sizes
    generator = torch.Generator().manual_seed(seed)
    bound = math.sqrt(6.0 / d_in)  # Kaiming uniform over fan-in d, gain √2; only directions survive
    rows_FD = (torch.rand(d_sae, d_in, generator=generator) * 2 - 1) * bound
    rows_FD = rows_FD / torch.linalg.vector_norm(rows_FD, dim=-1, keepdim=True)
    decoder.rows_FD.copy_(rows_FD)
    score.rows_FD.copy_(rows_FD)
    if score.bias_F is not None:
        score.bias_F.zero_()
    score.set_exponent(init.a_init)
    score.set_value_exponent(init.value_exponent_init)

    z_ND = None
    if sample is not None:
        if sample.ndim != 2 or sample.shape[1] != d_in or len(sample) == 0:
            raise CosaeError(f"sample must have shape (n, {d_in}). Got {tuple(sample.shape)} instead.")
        check_activations(sample, d_in)
        sample = sample[(sample != 0).any(-1)]
        if len(sample) == 0:
            raise CosaeError("sample must have at least one row that is not all zero (masked). Got none.")
        sample_ND = sample[:SAMPLE_ROWS].to(centre_D)
        centre_D.zero_()
        if init.centre != "zero":
            layered = cfg.frame == "layer_norm"
            inside_ND = frames.normalize("layer_norm", sample_ND, centre_D).z_BD if layered else sample_ND
            centre_D.copy_(geometric_median(inside_ND) if init.centre == "geometric_median" else inside_ND.mean(0))
        framed = frames.normalize(cfg.frame, sample_ND, centre_D)
        z_ND = framed.z_BD[framed.live_B]
    score.set_log_gain(_log_gain(init.b_init, d_in, float(score.growth.mean()), z_ND))
    if cfg.selector in PENALISED_SELECTORS:
        _open_gates(cfg, centre_D, score, selector, sample)


def _open_gates(cfg: SAEConfig, centre_D: Tensor, score: Score, selector: Selector, sample: Tensor | None) -> None:
    """Start θ or the gate bias where k of d_sae entries pass."""
    d_in, d_sae, k = cfg.sizes
    share = k / d_sae
    if sample is None:
        # no data: scores of random rows on inputs of length √d have standard deviation about 1
        spread = 1.0 if cfg.score in ("inner", "inner_unit") else float(score.b.exp().mean()) / math.sqrt(d_in)
        cut = NormalDist(0.0, spread).inv_cdf(min(max(1.0 - share, 0.5), 1 - 1e-9)) if share < 1 else 0.0
    else:
        rows = sample[: max(64, min(len(sample), 16_000_000 // d_sae))].to(centre_D)
        framed = frames.normalize(cfg.frame, rows, centre_D)
        score_BF = reference.scores(score.terms(framed))[framed.live_B]
        n_keep = max(1, round(share * score_BF.numel()))
        cut = float(score_BF.reshape(-1).kthvalue(score_BF.numel() - n_keep + 1).values)
    if cfg.selector == "jumprelu":
        selector.log_threshold_F.fill_(math.log(max(cut, 1e-6)))
    else:
        assert score.bias_F is not None
        score.bias_F.fill_(-cut)
        selector.b_mag_F.zero_()
