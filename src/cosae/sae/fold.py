"""Folds: other parameters, the same outputs. Each returns a new SAE.

Scaling encoder rows cannot fold a cosine score, which normalises them. Here every score folds itself.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from cosae.errors import CosaeError, check_positive
from cosae.sae.model import SAE


@torch.no_grad()
def fold_decoder_norm(sae: SAE) -> SAE:
    """Decoder rows of unit length; codes are multiplied by the old lengths n, reconstructions stay.

    `b += ln n` (inner product: rows · n), `bias · n`, `threshold · n`. A norm-restoring decoder divides by row
    lengths itself, so there only the rows change and the codes stay. Raises CosaeError for a zero row.
    """
    folded = copy.deepcopy(sae)
    norm_F = torch.linalg.vector_norm(folded.decoder.rows_FD, dim=-1)
    if not bool((norm_F > 0).all()):
        feature = int((norm_F == 0).nonzero()[0])
        raise CosaeError(f"decoder rows must not be zero to fold their norms. Row {feature} is: drop that feature.")
    folded.decoder.rows_FD.div_(norm_F[:, None])
    if sae.cfg.norm_restoring:
        return folded
    _scale_codes(folded, norm_F)
    return folded


def _scale_codes(sae: SAE, factor_F: Tensor) -> None:
    """Multiply each feature's codes by factor (F,) > 0, in place; the same entries fire."""
    sae.score.scale_content_(factor_F)
    if sae.score.bias_F is not None:
        sae.score.bias_F.mul_(factor_F)
    sae.selector.scale_scores_(factor_F)
    if sae.cfg.selector == "gated":
        sae.selector.b_mag_F.mul_(factor_F)


@torch.no_grad()
def fold_input_scale(sae: SAE, s: float) -> SAE:
    """An SAE for x out of one that was trained on s · x: same codes, reconstructions divided by s.

    raw: `b += a ln s` (inner product: rows · s), decoder and centre divided by s; a value exponent δ multiplies scores,
    and all they are compared with, by s^δ besides. unit: only the centre is divided. layer_norm: nothing changes. A
    transcoder's targets are not scaled: its reconstructions stay.
    Raises CosaeError unless s is finite and positive.
    """
    check_positive("the input scale", s)
    folded = copy.deepcopy(sae)
    if sae.cfg.frame == "layer_norm":
        if folded.target is not None and sae.cfg.target_frame == "input":
            folded.target.size.mul_(s)
        return folded
    folded.centre_D.div_(s)
    if sae.cfg.sites and sae.cfg.frame == "raw":
        folded.site_scale_P.div_(s)
        return folded
    if folded.target is not None:
        if sae.cfg.norm_restoring if sae.cfg.frame == "raw" else sae.cfg.target_frame == "input":
            folded.target.size.mul_(s)  # lengths that are put back are those of x, s times less
        elif sae.cfg.frame == "raw" and folded.target.skip_OD is not None:
            folded.target.skip_OD.mul_(s)
    if sae.cfg.frame == "raw":
        folded.score.scale_input_(s)
        if folded.score.delta is not None:
            _scale_codes(folded, folded.score.delta.mul(math.log(s)).exp().expand(sae.d_sae))
        if not sae.cfg.norm_restoring and folded.target is None:
            folded.decoder.rows_FD.div_(s)
    return folded
