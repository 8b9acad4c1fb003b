"""Score terms on seeded random inputs: every member of the family that the kernels must serve."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cosae.kernels import ScoreTerms

FAMILY = ("inner", "inner_unit", "cosine", "cosine_per_feature", "gain_per_feature", "length_power")


def make_terms(
    kind: str,
    n_tokens: int = 37,
    width: int = 19,
    n_features: int = 53,
    seed: int = 0,
    bias: float | None = 0.1,
    spread: float = 0.6,
    dtype: torch.dtype = torch.float32,
) -> ScoreTerms:
    """Random tokens with log-normal norms (σ = spread) and rows of differing length."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    z_BD = normal(n_tokens, width) * torch.exp(spread * normal(n_tokens, 1))
    rows_FD = 0.5 * normal(n_features, width) * torch.exp(0.3 * normal(n_features, 1))
    bias_F = None if bias is None else bias * normal(n_features)
    exponent, log_gain, row_power = torch.tensor(0.3), torch.tensor(1.2), 0
    if kind == "inner":
        exponent, log_gain, row_power = torch.tensor(1.0), torch.tensor(0.0), 1
    elif kind == "inner_unit":
        exponent, log_gain = torch.tensor(1.0), torch.tensor(0.0)
    elif kind == "cosine_per_feature":
        exponent = 3 * torch.rand(n_features, generator=draw, dtype=torch.float64) - 1
        log_gain = 1.0 + 0.3 * normal(n_features)
    elif kind == "gain_per_feature":
        log_gain = 1.0 + 0.3 * normal(n_features)
    elif kind == "length_power":
        row_power = 1
        exponent = torch.rand(n_features, generator=draw, dtype=torch.float64)
    elif kind != "cosine":
        raise AssertionError(kind)
    return ScoreTerms(
        z_BD.to(dtype),
        rows_FD.to(dtype),
        None if bias_F is None else bias_F.to(dtype),
        exponent.to(dtype),
        log_gain.to(dtype),
        row_power,
        torch.ones(n_tokens, dtype=torch.bool),
        plain=kind == "inner",
    )


def aligned(n: int, width: int, seed: int, wanted: float) -> Tensor:
    """Rows whose every coordinate, after normalisation, sits next to a rounding boundary of bf16 on one side.

    wanted +1: just below a midpoint (rounds down, loses the most); −1: just above one (rounds up).
    """
    draw = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-4, 0, (n, width), generator=draw).double()
    mantissa = 1.0 + (torch.randint(0, 8, (n, width), generator=draw).double() + 0.5) * 2.0**-7
    rows = mantissa * (1 - wanted * 2.0**-12) * 2.0**exponent
    return (rows * torch.randint(0, 2, (n, width), generator=draw).mul(2).sub(1)).float()


def in_double(terms: ScoreTerms) -> ScoreTerms:
    bias_F = None if terms.bias_F is None else terms.bias_F.double()
    wide = {name: getattr(terms, name).double() for name in ("z_BD", "rows_FD", "exponent", "log_gain")}
    return replace(terms, bias_F=bias_F, **wide)


def on(terms: ScoreTerms, device: torch.device) -> ScoreTerms:
    """The same terms on another device."""
    names = ("z_BD", "rows_FD", "exponent", "log_gain", "live_B")
    moved = {name: getattr(terms, name).to(device) for name in names}
    return replace(terms, bias_F=None if terms.bias_F is None else terms.bias_F.to(device), **moved)
