"""Another score on the same weights (paper §5.2, E64; §9 B8): everything is kept but how content is scored.

In: a trained SAE. Out: a new SAE of the same rows, bias, centre, decoder and selector under another score.

    kept      a and b of the new score start at a_init and ½ ln d; bias and threshold are those of the old score.
              What the paper evaluated; scores then have another size than the threshold expects
    refitted  b_i = ln exp(b_i) |w_i|^u m^{a_i − a'} so that old and new content agree at r = m, the sample's median
              length (a shared b takes the mean over features); then thresholds to the old L0 on the sample, and one
              factor on all codes that makes the reconstruction of the sample best (least squares; of a transcoder,
              whose targets are not at hand, none). Where either has a
              value exponent, it is values that agree: content and bias are multiplied by m^{δ − δ'}

A score whose gains are per feature and whose a' and δ' equal the old a and δ is the same function to rounding: inner
product → any per-feature cosine at a' = 1, and back.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from cosae.errors import CosaeError, check_choice
from cosae.kernels.terms import R_MIN, ROW_MIN
from cosae.sae.calibrate import calibrate, measure_l0
from cosae.sae.config import SAEConfig
from cosae.sae.model import SAE
from cosae.sae.score import SCORES, sqrt_d_gain
from cosae.sae.selector import CALIBRATED_SELECTORS

BATCH = 4096


@torch.no_grad()
def swap_score(
    sae: SAE,
    score: str,
    *,
    sample: Tensor | None = None,
    refit: bool = True,
    a_init: float = 0.0,
    value_exponent_init: float = 1.0,
    a_owner: str | None = None,
    value_exponent_owner: str | None = None,
) -> SAE:
    """The SAE under another score; the one given is not changed.

    score    a name of cosae.sae.score.SCORES
    sample   (N, d_in) activations that the filter keeps; needed to refit
    refit    fit gains, thresholds and the codes' common size to the sample; False keeps all but the score, as the paper
    a_init   start of the exponents the new score learns (the inner products have theirs fixed at 1)
    value_exponent_init  the same of its value exponent, where it has one
    a_owner, value_exponent_owner  as in SAEConfig

    Raises CosaeError for an unknown score or owner, a missing or unusable sample, or an SAE without an inference
    threshold where one is to be matched.
    """
    check_choice("score", score, SCORES)
    if refit and sample is None:
        raise CosaeError("refitting a swapped score needs a sample of activations: pass sample=, or refit=False.")
    cfg = replace(sae.cfg, score=score, a_owner=a_owner, value_exponent_owner=value_exponent_owner)
    swapped = _with_score(sae, cfg)
    swapped.score.set_exponent(a_init)
    swapped.score.set_value_exponent(value_exponent_init)
    if not refit:
        return swapped
    assert sample is not None
    flat_ND = sae._checked(sample).to(sae.device)
    flat_ND = flat_ND[(flat_ND != 0).any(-1)]
    if not len(flat_ND):
        raise CosaeError("refitting a swapped score needs activations that are not all 0. Got none.")
    if not sae.calibrated:
        raise CosaeError("a swapped score is refitted to the old L0: calibrate this batch_topk SAE first.")
    r_N = sae._framed(flat_ND).norm_stats.r_B
    _match_gains(sae, swapped, math.log(r_N.median().clamp_min(R_MIN)))
    if sae.cfg.selector in CALIBRATED_SELECTORS:
        calibrate(swapped, flat_ND, max(measure_l0(sae, flat_ND), 1 / len(flat_ND)))
    if not sae.cfg.norm_restoring and sae.target is None:
        _match_size(swapped, flat_ND)
    return swapped


def _with_score(sae: SAE, cfg: SAEConfig) -> SAE:
    """The same weights under another score, with gains ½ ln d and exponents of 0 where they are not the score's own."""
    swapped = SAE(cfg).to(sae.device)
    swapped.kernel, swapped.metadata = sae.kernel, {**sae.metadata, "swapped_from": sae.cfg.score}
    mine = swapped.state_dict()
    own = ("exponent", "exponent_base", "exponent_delta_F", "log_gain", "value_exponent")
    for name, value in sae.state_dict().items():
        if name.removeprefix("score.") not in own and name in mine:
            if mine[name].shape == value.shape:
                mine[name].copy_(value)
            else:  # a threshold or gain that is one number in a fresh SAE and one per feature after a fold
                setattr(swapped.selector, name.removeprefix("selector."), value.clone())
    swapped.score.set_log_gain(sqrt_d_gain(sae.d_in))
    return swapped


def _match_gains(old: SAE, new: SAE, log_r: float) -> None:
    """Equal content and, where either has a value exponent, equal values at this ln r."""
    delta, new_delta = (torch.zeros(()) if sae.score.delta is None else sae.score.delta for sae in (old, new))
    log_factor_F = ((delta - new_delta) * log_r).expand(old.d_sae)
    length_F = torch.linalg.vector_norm(old.score.rows_FD, dim=-1).clamp_min(ROW_MIN)
    log_size_F = old.score.b + old.score.family.row_power * length_F.log()
    wanted_F = log_size_F + (old.score.a - new.score.a) * log_r + log_factor_F
    if bool(log_factor_F.any()):
        _scale_compared(new, log_factor_F.exp())
    if new.score.family.gain_owner == "fixed":
        if new.score.is_plain:  # the rows carry the size themselves
            new.score.rows_FD.mul_((wanted_F.exp() / length_F)[:, None])
        return
    gain = new.score.log_gain
    if gain.numel() == 1:
        gain.fill_(float(wanted_F.exp().mean().log()))
    elif len(gain) == old.d_sae:
        gain.copy_(wanted_F)
    else:
        sums = torch.zeros_like(gain).index_add_(0, new.score.group_F, wanted_F.exp())
        counts = torch.bincount(new.score.group_F, minlength=len(gain)).clamp_min(1)
        gain.copy_((sums / counts).clamp_min(ROW_MIN).log())


def _match_size(sae: SAE, x_ND: Tensor) -> None:
    """Multiply all codes by s = Σ⟨z, ẑ⟩ / Σ|ẑ|², the factor of least error on the sample; the same entries fire."""
    along = square = 0.0
    for x_BD in torch.split(x_ND, BATCH):
        codes = sae.encode(x_BD)
        about = sae.decode(codes.with_values(torch.zeros_like(codes.value_E)))
        recon_BD, wanted_BD = (sae.decode(codes) - about).double(), (x_BD.to(about) - about).double()
        along += float((recon_BD * wanted_BD).sum())
        square += float(recon_BD.square().sum())
    factor = along / square if square > 0 else 1.0
    if not factor > 0:
        return
    if sae.cfg.score == "inner_unit":  # its size is fixed at 1: the decoder takes the factor
        sae.decoder.rows_FD.mul_(factor)
        return
    if sae.score.is_plain:
        sae.score.rows_FD.mul_(factor)
    else:
        sae.score.log_gain.add_(torch.tensor(factor).log())
    _scale_compared(sae, torch.tensor(factor, device=sae.device))


def _scale_compared(sae: SAE, factor: Tensor) -> None:
    """Multiply what content is added to or compared with, biases and thresholds, by factor () or (F,)."""
    if sae.score.bias_F is not None:
        sae.score.bias_F.mul_(factor)
    if sae.cfg.selector == "jumprelu":
        sae.selector.log_threshold_F.add_(factor.log())
    else:
        sae.selector.threshold = sae.selector.threshold * factor
    if sae.cfg.selector == "gated":
        sae.selector.b_mag_F.mul_(factor)
