"""The score family as per-token and per-feature factors around one plain matrix product.

    s_bi = exp(log_gain_i) · r_b^{a_i} · |w_i|^{u} · κ_bi + β_i
         = ⟨z_b, w_i⟩ · exp(log_gain_i + (a_i − 1) · ln r_b) · |w_i|^{u − 1} + β_i

with r = |z|, κ = cos(z, w), u = row_power (paper §1). The inner product is a = 1,
log_gain = 0, u = 1: then every factor is exactly 1. What is chosen has the value s, or r^δ · s where a score has a
value exponent δ.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cosae.kernels.cache import Seen, StepCache

R_MIN = 1e-8
"""Smallest r that enters a logarithm (paper §1, clamps)."""
ROW_MIN = 1e-12
"""Smallest encoder row length that is divided by (paper §1, clamps)."""
LEARNED = ("z_BD", "rows_FD", "bias_F", "exponent", "log_gain", "value_exponent")
"""Fields of ScoreTerms that may have a graph."""


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
    value_exponent  () or (F,)  δ: the value of a chosen entry is r^δ · s; None where it is s. No selection reads it
    """

    z_BD: Tensor
    rows_FD: Tensor
    bias_F: Tensor | None
    exponent: Tensor
    log_gain: Tensor
    row_power: int
    live_B: Tensor
    value_exponent: Tensor | None = None
    plain: bool = False
    """True where a = 1, log_gain = 0 and row_power = 1 by construction: all factors are 1, skip them."""
    centre_only: bool = False
    """True where parameters reach z only as one vector taken from every row (z = x − c, x without gradient): then
    only Σ_b ∂L/∂z_b is used, and a path may return any gradient of z with that column sum (E gathers fewer)."""
    cache: StepCache | None = None
    """That of the training step these terms are part of; changes no result."""

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

    @property
    def n_features(self) -> int:
        return int(self.rows_FD.shape[0])

    @property
    def n_tokens(self) -> int:
        return int(self.z_BD.shape[0])

    def detached(self) -> ScoreTerms:
        """The same numbers without a graph: what selection looks at."""
        held: dict[str, Any] = {name: value.detach() for name in LEARNED if (value := getattr(self, name)) is not None}
        return replace(self, **held)

    def of_tokens(self, token_S: Tensor) -> ScoreTerms:
        """Terms of some tokens alone."""
        return replace(self, z_BD=self.z_BD[token_S], live_B=self.live_B[token_S])

    def of_features(self, feature_S: Tensor, rows_SD: Tensor) -> ScoreTerms:
        """Terms of some features alone, whose rows are given."""
        bias_S = None if self.bias_F is None else self.bias_F[feature_S]
        names = ("exponent", "log_gain", "value_exponent")
        held = {name: x for name in names if (x := getattr(self, name)) is not None and x.dim()}
        return replace(self, rows_FD=rows_SD, bias_F=bias_S, **{name: x[feature_S] for name, x in held.items()})


@dataclass(frozen=True)
class Groups:
    """Entries token by token, as they lie, and feature by feature; all int64.

    offset_B1 (B + 1,) entries of token t are offset[t] : offset[t + 1]
    order_E (E,) entry positions feature by feature;  offset_F1 (F + 1,) where each feature's begin in it
    """

    offset_B1: Tensor
    order_E: Tensor
    offset_F1: Tensor


@dataclass(frozen=True)
class Products:
    """What selection computed of its entries: ⟨z, w⟩ (E,), ln r (B,), |w| (F,), and of which z and w they are."""

    z: Seen
    rows: Seen
    dot_E: Tensor
    log_r_B: Tensor
    norm_F: Tensor

    def of(self, terms: ScoreTerms) -> bool:
        """Whether they are still those of these terms."""
        return self.z.holds(terms.z_BD) and self.rows.holds(terms.rows_FD)


@dataclass(frozen=True)
class Entries:
    """Selected (token, feature) pairs, sorted by token, then feature; int64.

    groups, products  what selection knows of them, so that one step works it out once; no result depends on it
    cache             that of the training step they are part of
    """

    token_E: Tensor
    feature_E: Tensor
    groups: Groups | None = field(default=None, compare=False, repr=False)
    products: Products | None = field(default=None, compare=False, repr=False)
    cache: StepCache | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return int(self.token_E.shape[0])
