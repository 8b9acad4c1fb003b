"""What is scored and reconstructed. Enters x (B, D); leaves z (B, D) and what has to be put back.

    raw         z = x − c                         x̂ = ẑ + c
    unit        z = (x − c) / |x − c|             x̂ = |x − c| · ẑ + c
    layer_norm  z = (x − mean x) / std x − c      x̂ = std x · (ẑ + c) + mean x

Of a crosscoder, whose x joins the vectors of P sites, each site has a frame of its own: in `raw` z is (x − c) / m with
a constant m a site (1, or its root mean square), in `unit` every site's part has length 1 / √P.

The same for every score, selector and decoder. `unit` and `layer_norm` take the norm out of the whole problem and
not only out of the score; layer-normed inputs are what OpenAI's TopK autoencoders take (arXiv 2406.04093, §2.1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.kernels.autograd import apply
from cosae.types import Framed, NormStats, at_least_fp32

FRAMES = ("raw", "unit", "layer_norm")
NORMS_HINT = "decode codes that `encode` returned, or pass norm_stats=codes.norm_stats."
SCALE_MIN = 1e-8
"""Smallest length or standard deviation that is divided by."""


class Sites(NamedTuple):
    """What a crosscoder's x joins: the widths of the sites, and (P,) what each is divided by in the raw frame."""

    widths: tuple[int, ...]
    scale_P: Tensor

    def spread(self, value: Tensor) -> Tensor:
        """(..., P) → (..., D), each site's number at its coordinates."""
        widths = torch.tensor(self.widths, device=value.device)
        return value.repeat_interleave(widths, dim=-1, output_size=sum(self.widths))

    def lengths(self, x_BD: Tensor) -> Tensor:
        """(B, P) length of each site's part."""
        return torch.stack([torch.linalg.vector_norm(part, dim=-1) for part in self.parts(x_BD)], dim=-1)

    def parts(self, x_BD: Tensor) -> tuple[Tensor, ...]:
        """(B, d) of each site."""
        return torch.split(x_BD, list(self.widths), dim=-1)


def live_rows(x_BD: Tensor) -> Tensor:
    """(B,) bool: False where a whole row is zero, which is how padding looks."""
    if x_BD.device.type != "cpu":
        return (x_BD != 0).any(dim=-1)
    # one pass; a row whose squares are too small for fp32 is looked at again
    live_B: Tensor = torch.linalg.vector_norm(x_BD, dim=-1) != 0
    odd = (~live_B).nonzero(as_tuple=True)
    if len(odd[0]):
        live_B[odd] = (x_BD[odd] != 0).any(dim=-1)
    return live_B


class _LessCentre(torch.autograd.Function):
    """x − c for x without gradient: −Σ_b of the gradient is c's, with no (B, D) matrix of it made."""

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, centre_D: Tensor) -> Tensor:
        return x_BD - centre_D

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, -grads[0].sum(0)


def less_centre(x_BD: Tensor, centre_D: Tensor) -> Tensor:
    """(B, D) x − c, differentiable."""
    if x_BD.requires_grad or not centre_D.requires_grad:
        return x_BD - centre_D
    return apply(_LessCentre, x_BD, centre_D)


def normalize(
    frame: str, x_BD: Tensor, centre_D: Tensor, live_B: Tensor | None = None, sites: Sites | None = None
) -> Framed:
    """x (B, D) any float dtype, centre (D,) → Framed, in the centre's precision, at least fp32.

    All-zero rows of x are masked: `live_B` is False for them (`live_rows`; pass it where it is known already).
    """
    live_B = live_rows(x_BD) if live_B is None else live_B
    centre_D = at_least_fp32(centre_D)
    x_BD = x_BD.to(centre_D.dtype)
    if sites is not None:
        return _normalize_sites(frame, x_BD, centre_D, live_B, sites)
    zero_B = x_BD.new_zeros(x_BD.shape[0])
    if frame == "layer_norm":
        shift_B = x_BD.mean(dim=-1)
        deviation_BD = x_BD - shift_B[:, None]
        scale_B = deviation_BD.square().mean(dim=-1).sqrt().clamp_min(SCALE_MIN)
        z_BD = less_centre(deviation_BD / scale_B[:, None], centre_D)
        norm_stats = NormStats(scale_B, shift_B, torch.linalg.vector_norm(z_BD, dim=-1))
        return Framed(z_BD, norm_stats, live_B)
    z_BD = less_centre(x_BD, centre_D)
    r_B = torch.linalg.vector_norm(z_BD, dim=-1)
    if frame == "unit":
        scale_B = r_B.clamp_min(SCALE_MIN)
        z_BD = z_BD / scale_B[:, None]
        return Framed(z_BD, NormStats(scale_B, zero_B, r_B / scale_B), live_B)
    return Framed(z_BD, NormStats(torch.ones_like(r_B), zero_B, r_B), live_B)


def _normalize_sites(frame: str, x_BD: Tensor, centre_D: Tensor, live_B: Tensor, sites: Sites) -> Framed:
    shift_BP = x_BD.new_zeros(len(x_BD), len(sites.widths))
    if frame == "layer_norm":
        shift_BP = torch.stack([part.mean(dim=-1) for part in sites.parts(x_BD)], dim=-1)
        x_BD = x_BD - sites.spread(shift_BP)
        scale_BP = torch.stack([part.square().mean(dim=-1).sqrt() for part in sites.parts(x_BD)], dim=-1)
        scale_BP = scale_BP.clamp_min(SCALE_MIN)
        z_BD = less_centre(x_BD / sites.spread(scale_BP), centre_D)
    else:
        z_BD = less_centre(x_BD, centre_D)
        scale_BP = sites.scale_P.to(z_BD).expand(len(z_BD), -1)
        if frame == "unit":
            scale_BP = sites.lengths(z_BD).clamp_min(SCALE_MIN) * len(sites.widths) ** 0.5
        z_BD = z_BD / sites.spread(scale_BP)
    return Framed(z_BD, NormStats(scale_BP, shift_BP, torch.linalg.vector_norm(z_BD, dim=-1)), live_B)


def denormalize(
    frame: str, recon_BD: Tensor, norm_stats: NormStats | None, centre_D: Tensor, sites: Sites | None = None
) -> Tensor:
    """Reconstruction of z (B, D) → reconstruction of x (B, D).

    Raises CosaeError where the frame took something out and `norm_stats` does not say what.
    """
    centre_D = at_least_fp32(centre_D)
    if frame == "raw":
        return (recon_BD if sites is None else recon_BD * sites.spread(sites.scale_P.to(recon_BD))) + centre_D
    if norm_stats is None:
        raise CosaeError(f"the {frame!r} frame puts a norm back that these codes do not carry: {NORMS_HINT}")
    if sites is not None:
        scale_BD, shift_BD = sites.spread(norm_stats.scale_B), sites.spread(norm_stats.shift_B)
        return scale_BD * recon_BD + centre_D if frame == "unit" else scale_BD * (recon_BD + centre_D) + shift_BD
    if frame == "unit":
        return norm_stats.scale_B[:, None] * recon_BD + centre_D
    return norm_stats.scale_B[:, None] * (recon_BD + centre_D) + norm_stats.shift_B[:, None]
