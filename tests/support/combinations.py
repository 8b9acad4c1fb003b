"""Every frame × score × selector × decoder, as small SAEs whose parameters are nowhere at their special values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cosae.sae.frame import FRAMES
from cosae.sae.model import SAE
from cosae.sae.score import SCORES
from cosae.sae.selector import SELECTORS
from tests.support.all_pairs import all_pairs

D_IN, D_SAE, K, TOKENS = 12, 30, 4, 24
DECODERS: dict[str, tuple[tuple[int, ...], bool]] = {
    "plain": ((), False),
    "prefixes": ((7, 18), False),
    "norm_restoring": ((), True),
    "prefixes_norm_restoring": ((7, 18), True),
}
MASKED = (5, 17)
"""Rows of the batch that are all zero."""


@dataclass(frozen=True)
class Combination:
    frame: str
    score: str
    selector: str
    decoder: str

    def __str__(self) -> str:
        return f"{self.frame}-{self.score}-{self.selector}-{self.decoder}"

    @property
    def axes(self) -> tuple[str | tuple[int, ...] | bool, ...]:
        """Frame, score, selector, prefixes and norm restoring: a decoder is two choices."""
        return (self.frame, self.score, self.selector, self.prefixes, self.norm_restoring)

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Feature counts of all reconstructions."""
        return (*DECODERS[self.decoder][0], D_SAE)

    @property
    def norm_restoring(self) -> bool:
        return DECODERS[self.decoder][1]


COMBINATIONS = [Combination(*c) for c in itertools.product(FRAMES, SCORES, SELECTORS, DECODERS)]


def some_combinations(wanted: Callable[[Combination], bool]) -> pytest.MarkDecorator:
    """The combinations for which a property differs: all pairs of their parts, the rest of their grid as `slow`."""
    grid = {c.axes: c for c in COMBINATIONS if wanted(c)}
    quick = set(all_pairs(list(grid)))
    parameters = [
        pytest.param(c, id=str(c), marks=[] if axes in quick else [pytest.mark.slow]) for axes, c in grid.items()
    ]
    return pytest.mark.parametrize("combination", parameters)


every_combination = some_combinations(lambda c: True)


def make_x(seed: int = 0, tokens: int = TOKENS) -> Tensor:
    """(tokens, D_IN) fp32: log-normal norms around 3 · √d, off the origin, two masked rows."""
    draw = torch.Generator().manual_seed(1000 + seed)
    x_BD = torch.randn(tokens, D_IN, generator=draw) * torch.exp(0.5 * torch.randn(tokens, 1, generator=draw)) * 3
    x_BD = x_BD + torch.randn(D_IN, generator=draw)
    for row in MASKED:
        if row < tokens:
            x_BD[row] = 0
    return x_BD


@torch.no_grad()
def make_sae(c: Combination, seed: int = 0, kernel: str = "auto", calibrated: bool = True) -> SAE:
    """An SAE of this kind: rows of any length, biases, mixed exponents, a centre away from 0, a threshold."""
    prefixes, norm_restoring = DECODERS[c.decoder]
    sae = SAE.build(
        D_IN, D_SAE, c.score, c.selector, K, seed, c.frame,
        prefixes=prefixes, norm_restoring=norm_restoring, kernel=kernel,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    sae.centre_D.copy_(0.5 * normal(D_IN))
    sae.score.rows_FD.copy_(normal(D_SAE, D_IN) * torch.exp(0.5 * normal(D_SAE, 1)) * D_IN**-0.5)
    sae.decoder.rows_FD.copy_(normal(D_SAE, D_IN) * torch.exp(0.3 * normal(D_SAE, 1)))
    starts = (("exponent", 0.4, 0.5), ("exponent_base", 0.4, 0.0), ("exponent_delta_F", 0.0, 0.5))
    for name, middle, spread in (*starts, ("value_exponent", 0.3, 0.4)):
        parameter = sae.score._parameters.get(name)
        if parameter is not None:
            parameter.copy_(middle + spread * torch.rand(parameter.shape, generator=draw))
    if "log_gain" in sae.score._parameters:
        sae.score.log_gain.copy_(1.0 + 0.3 * normal(*sae.score.log_gain.shape))
    scores = sae.scores(make_x())
    scores = scores[scores.isfinite()]
    spread = float(scores.std())  # the frames and scores differ in scale by a factor of a hundred
    sae.score.bias_F.copy_(0.1 * spread * normal(D_SAE))
    cut = float(scores.quantile(1 - 1.2 * K / D_SAE, interpolation="midpoint"))
    if c.selector == "jumprelu":
        sae.selector.log_threshold_F.copy_(math.log(cut) + 0.3 * normal(D_SAE))
    if c.selector == "gated":
        sae.selector.r_mag_F.copy_(0.2 * normal(D_SAE))
        sae.selector.b_mag_F.copy_(0.3 * spread * normal(D_SAE))
    if c.selector in ("batch_topk", "gated") and calibrated:
        sae.selector.threshold.fill_(cut)
    return sae
