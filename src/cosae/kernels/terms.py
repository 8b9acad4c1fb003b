"""The score family as per-token and per-feature factors around one plain matrix product.

    s_bi = exp(log_gain_i) · r_b^{a_i} · |w_i|^{u} · κ_bi + β_i
         = ⟨z_b, w_i⟩ · exp(log_gain_i + (a_i − 1) · ln r_b) · |w_i|^{u − 1} + β_i

with r = |z|, κ = cos(z, w), u = row_power (paper §1). The inner product is a = 1,
log_gain = 0, u = 1: then every factor is exactly 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

R_MIN = 1e-8
"""Smallest r that enters a logarithm (paper §1, clamps)."""
ROW_MIN = 1e-12
"""Smallest encoder row length that is divided by (paper §1, clamps)."""


@dataclass(frozen=True)
class ScoreTerms:
    """What a score is made of; everything fp32 (or float64 in tests), differentiable.

    z_BD      (B, D) what is scored
    rows_FD   (F, D) encoder rows, of any length
    bias_F    (F,) or None
    exponent  () or (F,)  a
    log_gain  () or (F,)  b
    row_power 0 (rows enter by direction only) or 1 (their length counts: the standard inner product)
    live_B    (B,) bool; False rows have no scores at all and are never selected
    """

    z_BD: Tensor
    rows_FD: Tensor
    bias_F: Tensor | None
    exponent: Tensor
    log_gain: Tensor
    row_power: int
    live_B: Tensor
    plain: bool = False
    """True where a = 1, log_gain = 0 and row_power = 1 by construction: all factors are 1, skip them."""
    centre_only: bool = False
    """True where parameters reach z only as one vector taken from every row (z = x − c, x without gradient): then
    only Σ_b ∂L/∂z_b is used, and a path may return any gradient of z with that column sum (E gathers fewer)."""

    @property
    def log_r_B(self) -> Tensor:
        """(B,) ln r, r clamped at R_MIN."""
        length_B: Tensor = torch.linalg.vector_norm(self.z_BD, dim=-1)
        return length_B.clamp_min(R_MIN).log()

    @property
    def row_norm_F(self) -> Tensor:
        """(F,) |w_i|, clamped at ROW_MIN."""
        length_F: Tensor = torch.linalg.vector_norm(self.rows_FD, dim=-1)
        return length_F.clamp_min(ROW_MIN)

    def scaled(self, dot_E: Tensor, token_E: Tensor, feature_E: Tensor) -> Tensor:
        """(E,) content exp(b) r^a |w|^u κ of entries whose plain products ⟨z, w⟩ are given; differentiable."""
        if self.plain:
            return dot_E
        log_scale_E = (self.exponent - 1.0).expand(self.n_features)[feature_E] * self.log_r_B[token_E]
        log_scale_E = log_scale_E + self.log_gain.expand(self.n_features)[feature_E]
        content_E = dot_E * log_scale_E.exp()
        if self.row_power == 0:
            content_E = content_E / self.row_norm_F[feature_E]
        return content_E

    @property
    def n_features(self) -> int:
        return int(self.rows_FD.shape[0])

    @property
    def n_tokens(self) -> int:
        return int(self.z_BD.shape[0])

    def detached(self) -> ScoreTerms:
        """The same numbers without a graph: what selection looks at."""
        return ScoreTerms(
            self.z_BD.detach(),
            self.rows_FD.detach(),
            None if self.bias_F is None else self.bias_F.detach(),
            self.exponent.detach(),
            self.log_gain.detach(),
            self.row_power,
            self.live_B,
            self.plain,
            self.centre_only,
        )


@dataclass(frozen=True)
class Entries:
    """Selected (token, feature) pairs, sorted by token, then feature; int64.

    memo holds what a path already worked out about these entries (their grouping by feature, their plain products)
    so that one step works it out once; it never changes a result.
    """

    token_E: Tensor
    feature_E: Tensor
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return int(self.token_E.shape[0])
