"""One family of scores (paper §1): s_i = exp(b_i) · r^{a_i} · |w_i|^u · κ_i + β_i.

    name                 u   a                   b
    inner                1   1                   0             the standard encoder ⟨w, z⟩ + β
    inner_unit           0   1                   0             unit rows, norm kept
    cosine_fixed         0   0                   learned ()    pure cosine, scaled
    cosine               0   learned ()          learned ()    the paper's global form
    cosine_per_feature   0   learned (F,)        learned (F,)
    cosine_base_delta    0   a0 + δ_i, learned   learned (F,)
    cosine_grouped       0   learned (G,)        learned (G,)  G contiguous blocks, the last takes the remainder
    cosine_two_exponents 0   owned by choice     as a          and a value exponent δ, owned by choice

Where a score has a value exponent δ, selection is on s and the value of what is selected is r^{δ_i} · s_i: a says how
much the norm counts for what fires, δ how much more it counts for what that is worth. It contains the inner product of
unit rows (a = 1, δ = 0, b = 0), the paper's cosine (δ = 0), and what that inner product does in the unit frame (a = 0,
δ = 1, b = 0): the same scores, thresholds and reconstructions, and |x − c| times its codes.

How a and δ learn: both by what they change in the values of kept entries. Under a selector that compares scores with
one another nothing else tells a, and this part of its gradient is the same as δ's but for the bias: it asks that a + δ
be about 1 and not how the two share it. Their starts decide that (a_init, value_exponent_init), or for BatchTopK a
window that lets a learn from what fires (SAEConfig.a_window, cosae.sae.selector).

Encoder rows may have any length: where u = 0 their normalisation is part of the formula, not of the optimiser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cosae.errors import CosaeError, check_choice
from cosae.kernels import ScoreTerms, StepCache
from cosae.types import Framed, at_least_fp32


@dataclass(frozen=True)
class Family:
    """A member of the family: who owns a, b and δ. Owners are "fixed", "shared", "feature", "base_delta", "group"."""

    row_power: int
    exponent_owner: str
    gain_owner: str
    exponent: float | None = None
    """The exponent of a score that has but one; None where a start is chosen."""
    value_owner: str | None = None
    """Who owns the value exponent δ; None where there is none."""

    def owned(self, exponent_owner: str | None, value_owner: str | None) -> Family:
        """This family with other owners of a (and of b with it) and of δ; None leaves one. Raises CosaeError."""
        if self.value_owner is None:
            for name, owner in (("a_owner", exponent_owner), ("value_exponent_owner", value_owner)):
                if owner is not None:
                    raise CosaeError(f"{name} can be chosen for the score {TWO_EXPONENTS} alone: drop {name}={owner}.")
            return self
        a, value = exponent_owner or self.exponent_owner, value_owner or self.value_owner
        check_choice("a_owner", a, OWNERS)
        check_choice("value_exponent_owner", value, OWNERS)
        return replace(self, exponent_owner=a, gain_owner="shared" if a == "fixed" else a, value_owner=value)


OWNERS = ("shared", "group", "feature", "fixed")
"""Of a and of δ where they can be chosen: one for all, one for each group, one a feature, or none that learns."""
TWO_EXPONENTS = "cosine_two_exponents"

SCORES: dict[str, Family] = {
    "inner": Family(1, "fixed", "fixed", 1.0),
    "inner_unit": Family(0, "fixed", "fixed", 1.0),
    "cosine_fixed": Family(0, "fixed", "shared", 0.0),
    "cosine": Family(0, "shared", "shared"),
    "cosine_per_feature": Family(0, "feature", "feature"),
    "cosine_base_delta": Family(0, "base_delta", "feature"),
    "cosine_grouped": Family(0, "group", "group"),
    TWO_EXPONENTS: Family(0, "shared", "shared", value_owner="shared"),
}


def sqrt_d_gain(d_in: int) -> float:
    """b = ½ ln d, the paper's default start (§1, initialisation)."""
    return 0.5 * math.log(d_in)


class Score(nn.Module):
    """Owns encoder rows, bias β, exponent a and log-gain b; `terms` hands them to the kernels.

    rows_FD (F, D); bias_F (F,) or None; exponent () | (F,) | (G,); for base_delta: exponent_base () and
    exponent_delta_F (F,); log_gain () | (F,) | (G,); value_exponent () | (F,) | (G,) where there is one. Everything
    fp32. Fixed ones are buffers.
    """

    group_F: Tensor
    exponent: Tensor
    log_gain: Tensor
    value_exponent: Tensor

    def __init__(self, family: Family, d_in: int, d_sae: int, n_groups: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.family = family
        self.rows_FD = nn.Parameter(torch.zeros(d_sae, d_in))
        self.bias_F = nn.Parameter(torch.zeros(d_sae)) if bias else None
        shape = {"fixed": (), "shared": (), "feature": (d_sae,), "base_delta": (), "group": (n_groups,)}
        if family.exponent_owner == "base_delta":
            self.exponent_base = nn.Parameter(torch.zeros(()))
            self.exponent_delta_F = nn.Parameter(torch.zeros(d_sae))
        else:
            self._own(
                "exponent", family.exponent_owner, torch.full(shape[family.exponent_owner], family.exponent or 0.0)
            )
        self._own("log_gain", family.gain_owner, torch.zeros(shape[family.gain_owner]))
        if family.value_owner is not None:
            self._own("value_exponent", family.value_owner, torch.zeros(shape[family.value_owner]))
        size = d_sae // max(n_groups, 1)
        group_F = (torch.arange(d_sae) // max(size, 1)).clamp_max(n_groups - 1)
        self.register_buffer("group_F", group_F, persistent=False)

    def _own(self, name: str, owner: str, start: Tensor) -> None:
        """A parameter, or a buffer where it is fixed."""
        if owner == "fixed":
            self.register_buffer(name, start)
        else:
            setattr(self, name, nn.Parameter(start))

    def _spread(self, value: Tensor) -> Tensor:
        """() and (F,) as they are; (G,) becomes (F,)."""
        if value.ndim == 1 and value.shape[0] != len(self.rows_FD):
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
    def delta(self) -> Tensor | None:
        """() or (F,) fp32: the value exponent in force, differentiable; None where there is none."""
        return None if self.family.value_owner is None else at_least_fp32(self._spread(self.value_exponent))

    @property
    def growth(self) -> Tensor:
        """() or (F,): the power of r in the value of a code without bias, a + δ."""
        return self.a if self.delta is None else self.a + self.delta

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
            value_exponent=self.delta,
            plain=self.is_plain,
            centre_only=centre_only,
            cache=cache,
        )

    @torch.no_grad()
    def set_exponent(self, value: float) -> None:
        """Start every a that is not the score's own at `value` (of base and delta, the delta at 0)."""
        if self.family.exponent_owner == "base_delta":
            self.exponent_base.fill_(value)
            self.exponent_delta_F.zero_()
        elif self.family.exponent is None:
            self.exponent.fill_(value)

    @torch.no_grad()
    def set_value_exponent(self, value: float) -> None:
        """Start every δ, where there is one, at `value`."""
        if self.family.value_owner is not None:
            self.value_exponent.fill_(value)

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
        """Take r where s · r was taken before: the same scores by `b += a ln s` (inner product: rows · s). A fold.

        Values still lack s^δ where there is a value exponent (`cosae.sae.fold.fold_input_scale` sees to it).
        """
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
