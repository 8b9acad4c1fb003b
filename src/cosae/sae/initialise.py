"""All initialisation in one place (paper §1 and §3): what a fresh SAE starts from, and what a sample decides.

decoder rows  Kaiming uniform, then unit length; encoder rows a copy of them; β = 0
centre c      geometric median of a sample (Weiszfeld), its mean, or 0
a, δ          a_init, value_exponent_init
b             ½ ln d ("sqrt_d"), ln mean|z| ("norm"), or by "auto" (1 − a − δ) times the second where mean|z| and √d are
              more than a factor 2 apart, else (1 − a − δ) times the first: at a + δ = 1 codes have their size by
              themselves
θ, gate bias  the quantile of *all* scores of the sample at which k of d_sae pass (paper §9 #9: the quantile of
              the positive ones alone starts at half the wanted L0)
target        of a transcoder: its centre as c, of a sample of targets; decoder rows begin along the sum of the sample's
              targets, each times the feature's positive score, since no encoder row says where a target lies; random
              rows without a sample. Linear skips begin at 0
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
from cosae.sae.target import Target
from cosae.types import Framed

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
    target: Target | None = None,
    sites: frames.Sites | None = None,
    *,
    seed: int,
    sample: Tensor | None = None,
    target_sample: Tensor | None = None,
) -> None:
    """Set every parameter of an SAE's parts in place from `seed` and, where given, a sample (n, d_in) of activations
    (of a transcoder with the sample's targets).

    Raises CosaeError for a sample of the wrong width or without a live row.
    """
    d_in, d_sae, _ = cfg.sizes
    generator = torch.Generator().manual_seed(seed)
    rows_FD = _random_rows(d_sae, d_in, generator)
    score.rows_FD.copy_(rows_FD)
    decoder.rows_FD.copy_(rows_FD if target is None else _random_rows(d_sae, len(target.centre_O), generator))
    if score.bias_F is not None:
        score.bias_F.zero_()
    score.set_exponent(init.a_init)
    score.set_value_exponent(init.value_exponent_init)

    z_ND = None
    if sample is not None:
        if sample.ndim != 2 or sample.shape[1] != d_in or len(sample) == 0:
            raise CosaeError(f"sample must have shape (n, {d_in}). Got {tuple(sample.shape)} instead.")
        check_activations(sample, d_in)
        live_N = (sample != 0).any(-1)
        if target is not None:
            if target_sample is None or target_sample.shape != (len(sample), len(target.centre_O)):
                came = None if target_sample is None else tuple(target_sample.shape)
                shape = (len(sample), len(target.centre_O))
                raise CosaeError(f"the sample of a transcoder needs its targets, of shape {shape}. Got {came} instead.")
            target_sample = check_activations(target_sample, len(target.centre_O), "the target")[live_N]
        sample = sample[live_N]
        if len(sample) == 0:
            raise CosaeError("sample must have at least one row that is not all zero (masked). Got none.")
        sample_ND = sample[:SAMPLE_ROWS].to(centre_D)
        centre_D.zero_()
        if init.centre != "zero":
            layered = cfg.frame == "layer_norm"
            inside_ND = sample_ND
            if layered:
                inside_ND = frames.normalize("layer_norm", sample_ND, centre_D, sites=sites).z_BD
            centre_D.copy_(geometric_median(inside_ND) if init.centre == "geometric_median" else inside_ND.mean(0))
        if sites is not None and cfg.balanced:
            squares_P = sites.lengths(sample_ND - centre_D).square().mean(0)
            sites.scale_P.copy_((squares_P / torch.tensor(sites.widths)).sqrt().clamp_min(frames.SCALE_MIN))
        framed = frames.normalize(cfg.frame, sample_ND, centre_D, sites=sites)
        z_ND = framed.z_BD[framed.live_B]
        if target is not None and target_sample is not None:
            _fit_target(init, target, decoder, score, framed, target_sample[:SAMPLE_ROWS].to(centre_D))
    score.set_log_gain(_log_gain(init.b_init, d_in, float(score.growth.mean()), z_ND))
    if cfg.selector in PENALISED_SELECTORS:
        _open_gates(cfg, centre_D, score, selector, sample, sites)


def _random_rows(n_rows: int, width: int, generator: torch.Generator) -> Tensor:
    """(n_rows, width) of unit length."""
    bound = math.sqrt(6.0 / width)  # Kaiming uniform over fan-in d, gain √2; only directions survive
    rows = (torch.rand(n_rows, width, generator=generator) * 2 - 1) * bound
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / length


def _fit_target(init: InitConfig, target: Target, decoder: Decoder, score: Score, framed: Framed, y_NO: Tensor) -> None:
    """The target's centre and size, and decoder rows where targets lie; rows that no token scores stay as they are."""
    centre_O = torch.zeros_like(target.centre_O)
    if init.centre != "zero":
        centre_O = geometric_median(y_NO) if init.centre == "geometric_median" else y_NO.mean(0)
    target.fit(y_NO, framed, centre_O)
    t_NO = target.of(y_NO, target.stats(framed))
    t_NO = t_NO - t_NO.mean(0)
    along_FO = torch.zeros_like(decoder.rows_FD)
    for z_BD, t_BO in zip(torch.split(framed.z_BD, 512), torch.split(t_NO, 512), strict=True):
        along_FO += (z_BD @ score.rows_FD.T).relu().T @ t_BO
    length_F1 = torch.linalg.vector_norm(along_FO, dim=-1, keepdim=True)
    decoder.rows_FD.copy_(torch.where(length_F1 > 0, along_FO / length_F1.clamp_min(1e-30), decoder.rows_FD))


def _open_gates(
    cfg: SAEConfig,
    centre_D: Tensor,
    score: Score,
    selector: Selector,
    sample: Tensor | None,
    sites: frames.Sites | None,
) -> None:
    """Start θ or the gate bias where k of d_sae entries pass."""
    d_in, d_sae, k = cfg.sizes
    share = k / d_sae
    if sample is None:
        # no data: scores of random rows on inputs of length √d have standard deviation about 1
        spread = 1.0 if cfg.score in ("inner", "inner_unit") else float(score.b.exp().mean()) / math.sqrt(d_in)
        cut = NormalDist(0.0, spread).inv_cdf(min(max(1.0 - share, 0.5), 1 - 1e-9)) if share < 1 else 0.0
    else:
        rows = sample[: max(64, min(len(sample), 16_000_000 // d_sae))].to(centre_D)
        framed = frames.normalize(cfg.frame, rows, centre_D, sites=sites)
        score_BF = reference.scores(score.terms(framed))[framed.live_B]
        n_keep = max(1, round(share * score_BF.numel()))
        cut = float(score_BF.reshape(-1).kthvalue(score_BF.numel() - n_keep + 1).values)
    if cfg.selector == "jumprelu":
        selector.log_threshold_F.fill_(math.log(max(cut, 1e-6)))
    else:
        assert score.bias_F is not None
        score.bias_F.fill_(-cut)
        selector.b_mag_F.zero_()
