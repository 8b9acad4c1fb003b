"""What a transcoder reconstructs: another site's vectors y, from codes of x. Enters y and the framed x; leaves t.

    raw    t = (y − c) / m               ŷ = m · t̂ + c
    input  t = (y − c) / (m · s)         ŷ = m · s · t̂ + c

with c the target's own centre, m a constant, and s what the input's frame took out of the token (|x − c| in `unit`, the
standard deviation in `layer_norm`): the norm of y itself is not known where codes are decoded. m = mean |t| / mean |z|
of a sample makes t as long as what is scored, so that scores, gains and aux-k begin as an SAE's do.

The decoder's sum approximates t; a linear skip adds W z to it, which begins at 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cosae.errors import CosaeError
from cosae.kernels.deterministic import matmul
from cosae.sae.frame import NORMS_HINT, SCALE_MIN, less_centre
from cosae.types import Framed, NormStats, at_least_fp32

TARGET_FRAMES = ("raw", "input")


class Target(nn.Module):
    """Owns centre_O (D_out,), size (), the constant m, and skip_OD (D_out, D_in) where there is a skip."""

    size: Tensor

    def __init__(self, d_in: int, d_out: int, frame: str, skip: bool) -> None:
        super().__init__()
        self.frame = frame
        self.centre_O = nn.Parameter(torch.zeros(d_out))
        self.register_buffer("size", torch.ones(()))
        self.skip_OD = nn.Parameter(torch.zeros(d_out, d_in)) if skip else None

    def of(self, y_BO: Tensor, stats: NormStats) -> Tensor:
        """(B, D_out) t of targets y; differentiable. stats: what `stats` gave."""
        return less_centre(y_BO.to(self.centre_O), at_least_fp32(self.centre_O)) / stats.scale_B[:, None]

    def stats(self, framed: Framed) -> NormStats:
        """What has to be put back to get ŷ; differentiable."""
        size = at_least_fp32(self.size)
        known = framed.norm_stats
        scale_B = size * known.scale_B if self.frame == "input" else size.expand(len(known.scale_B))
        added_BO = None if self.skip_OD is None else matmul(framed.z_BD, at_least_fp32(self.skip_OD).T)
        if added_BO is not None:
            added_BO = added_BO * framed.live_B[:, None]
        return NormStats(scale_B, torch.zeros_like(known.r_B), known.r_B, added_BO)

    def denormalize(self, recon_BO: Tensor, stats: NormStats | None) -> Tensor:
        """The decoder's sum → ŷ (B, D_out). Raises CosaeError where `stats` must say what is not known."""
        scale = None if stats is None else stats.scale_B[:, None]
        if self.skip_OD is not None:
            if stats is None or stats.added_BD is None:
                raise CosaeError(f"a linear skip adds a part of the input that these codes do not carry: {NORMS_HINT}")
            recon_BO = recon_BO + stats.added_BD
        if scale is None:
            if self.frame == "input":
                raise CosaeError(f"the target's frame puts back a norm that these codes do not carry: {NORMS_HINT}")
            scale = at_least_fp32(self.size)
        return scale * recon_BO + at_least_fp32(self.centre_O)

    @torch.no_grad()
    def fit(self, y_NO: Tensor, framed: Framed, centre_O: Tensor) -> None:
        """Take the centre given, and m from targets (n, D_out) of the framed inputs, live rows alone."""
        self.centre_O.copy_(centre_O)
        apart_NO = y_NO.to(self.centre_O) - self.centre_O
        if self.frame == "input":
            apart_NO = apart_NO / framed.norm_stats.scale_B[:, None]
        lengths = [torch.linalg.vector_norm(part, dim=-1)[framed.live_B].mean() for part in (apart_NO, framed.z_BD)]
        self.size.copy_((lengths[0] / lengths[1].clamp_min(SCALE_MIN)).clamp_min(SCALE_MIN))
