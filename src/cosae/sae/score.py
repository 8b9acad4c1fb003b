"""One family of scores (paper §1): s_i = exp(b_i) · r^{a_i} · |w_i|^u · κ_i + β_i.

    name                 u   a                   b
    inner                1   1                   0             the standard encoder ⟨w, z⟩ + β
    inner_unit           0   1                   0             unit rows, norm kept
    cosine_fixed         0   0                   learned ()    pure cosine, scaled
    cosine               0   learned ()          learned ()    the paper's global form
    cosine_per_feature   0   learned (F,)        learned (F,)
    cosine_base_delta    0   a0 + δ_i, learned   learned (F,)
    cosine_grouped       0   learned (G,)        learned (G,)  G contiguous blocks, the last takes the remainder

Encoder rows may have any length: where u = 0 their normalisation is part of the formula, not of the optimiser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cosae.kernels import ScoreTerms, StepCache
from cosae.types import Framed, at_least_fp32


@dataclass(frozen=True)
class Family:
    """A member of the family: who owns a and b. Owners are "fixed", "shared", "feature", "base_delta", "group"."""

    row_power: int
    exponent_owner: str
    gain_owner: str
    exponent: float | None = None
    """The value of a fixed exponent."""


SCORES: dict[str, Family] = {
    "inner": Family(1, "fixed", "fixed", 1.0),
    "inner_unit": Family(0, "fixed", "fixed", 1.0),
    "cosine_fixed": Family(0, "fixed", "shared", 0.0),
    "cosine": Family(0, "shared", "shared"),
    "cosine_per_feature": Family(0, "feature", "feature"),
    "cosine_base_delta": Family(0, "base_delta", "feature"),
    "cosine_grouped": Family(0, "group", "group"),
}


def sqrt_d_gain(d_in: int) -> float:
    """b = ½ ln d, the paper's default start (§1, initialisation)."""
    return 0.5 * math.log(d_in)


class Score(nn.Module):
    """Owns encoder rows, bias β, exponent a and log-gain b; `terms` hands them to the kernels.

    rows_FD (F, D); bias_F (F,) or None; exponent () | (F,) | (G,); for base_delta: exponent_base () and
    exponent_delta_F (F,); log_gain () | (F,) | (G,). Everything fp32. Fixed ones are buffers.
    """

    group_F: Tensor

    def __init__(self, name: str, d_in: int, d_sae: int, n_groups: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.name = name
        self.family = family = SCORES[name]
        self.rows_FD = nn.Parameter(torch.zeros(d_sae, d_in))
        self.bias_F = nn.Parameter(torch.zeros(d_sae)) if bias else None
        shape = {"fixed": (), "shared": (), "feature": (d_sae,), "base_delta": (), "group": (n_groups,)}
        if family.exponent_owner == "fixed":
            self.register_buffer("exponent", torch.tensor(float(family.exponent or 0.0)))
        elif family.exponent_owner == "base_delta":
            self.exponent_base = nn.Parameter(torch.zeros(()))
            self.exponent_delta_F = nn.Parameter(torch.zeros(d_sae))
        else:
            self.exponent = nn.Parameter(torch.zeros(shape[family.exponent_owner]))
        gain = torch.zeros(shape[family.gain_owner])
        if family.gain_owner == "fixed":
            self.register_buffer("log_gain", gain)
        else:
            self.log_gain = nn.Parameter(gain)
        size = d_sae // max(n_groups, 1)
        group_F = (torch.arange(d_sae) // max(size, 1)).clamp_max(n_groups - 1)
        self.register_buffer("group_F", group_F, persistent=False)

    def _spread(self, value: Tensor) -> Tensor:
        """() and (F,) as they are; (G,) becomes (F,)."""
        if self.family.exponent_owner == "group" and value.ndim == 1 and value.shape[0] != len(self.rows_FD):
            spread: Tensor = value[self.group_F]
            return spread
        return value

    @property
    def a(self) -> Tensor:
        """() or (F,) fp32: the exponent in force, differentiable."""
        if self.family.exponent_owner == "base_delta":
            return at_least_fp32(self.exponent_base + self.exponent_delta_F)
        return at_least_fp32(self._spread(self.exponent))

    @property
    def b(self) -> Tensor:
        """() or (F,) fp32: the log-gain in force, differentiable."""
        return at_least_fp32(self._spread(self.log_gain))

    @property
    def is_plain(self) -> bool:
        """True where every factor around the product is exactly 1: the standard inner product."""
        return self.family.row_power == 1

    def terms(self, framed: Framed, centre_only: bool = False, cache: StepCache | None = None) -> ScoreTerms:
        """What the kernels compute scores from; differentiable in everything.

        centre_only: parameters reach z as one vector taken from every row and x needs no gradient (ScoreTerms).
        cache: that of the training step, where this is one.
        """
        return ScoreTerms(
            z_BD=framed.z_BD,
            rows_FD=at_least_fp32(self.rows_FD),
            bias_F=None if self.bias_F is None else at_least_fp32(self.bias_F),
            exponent=self.a,
            log_gain=self.b,
            row_power=self.family.row_power,
            live_B=framed.live_B,
            plain=self.is_plain,
            centre_only=centre_only,
            cache=cache,
        )

    @torch.no_grad()
    def set_exponent(self, value: float) -> None:
        """Start every learned a at `value` (δ at 0)."""
        if self.family.exponent_owner == "base_delta":
            self.exponent_base.fill_(value)
            self.exponent_delta_F.zero_()
        elif self.family.exponent_owner != "fixed":
            self.exponent.fill_(value)

    @torch.no_grad()
    def set_log_gain(self, value: float) -> None:
        """Start every learned b at `value`."""
        if self.family.gain_owner != "fixed":
            self.log_gain.fill_(value)

    @torch.no_grad()
    def scale_content_(self, factor: Tensor) -> None:
        """Multiply the content part of every feature by factor (F,) > 0: a fold, rows keep their direction.

        Inner product: the rows take it. Everywhere else `b += ln factor`, and a shared b becomes one per feature,
        since scaling the rows of a cosine score changes nothing.
        """
        if self.is_plain:
            self.rows_FD.mul_(factor[:, None])
            return
        gain = (self.b.expand(len(factor)) + factor.log()).clone()
        self._replace("log_gain", gain)

    @torch.no_grad()
    def scale_input_(self, s: float) -> None:
        """Take r where s · r was taken before: `b += a ln s` (inner product: rows · s). A fold."""
        if self.is_plain:
            self.rows_FD.mul_(s)
            return
        gain = self.b + self.a * math.log(s)
        self._replace("log_gain", gain.clone())

    def _replace(self, name: str, value: Tensor) -> None:
        if name in self._parameters:
            setattr(self, name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)
