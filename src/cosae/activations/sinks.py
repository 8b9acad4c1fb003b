"""Attention sinks: the tokens that evaluation reports separately, and the median norm that defines them.

    sink:  position 0 | special id | |x| >= factor · median |x|        (factor 10 in paper §3)

Training's filter (activations.filter) and every measurement take the median and the mask from here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosae.types import Activations

FACTOR = 10.0


def sink_mask(activations: Activations, median_norm: float, factor: float = FACTOR) -> Tensor:
    """(N,) bool: the sinks, whatever training did with them. Without positions and tokens only the norm counts."""
    large_N = activations.norm_N >= factor * median_norm
    return large_N | (activations.position_N == 0) | activations.special_N


def median_norm(norm_N: Tensor) -> float:
    """The median of norms (N,), in float64; the mean of the middle two where their number is even.

    Rows of norm 0 are padding or dead, and do not count; 0 where there are no others.
    """
    norm_N = norm_N[norm_N > 0]
    return quantiles(norm_N, (0.5,))[0] if len(norm_N) else 0.0


def quantiles(value_N: Tensor, marks: tuple[float, ...]) -> tuple[float, ...]:
    """Linear interpolation between order statistics; torch.quantile refuses more than 16 million values."""
    sorted_N = value_N.double().sort().values
    place_Q = torch.tensor(marks, dtype=torch.float64, device=value_N.device) * (len(sorted_N) - 1)
    low_Q, high_Q = place_Q.floor(), place_Q.ceil()
    return tuple(torch.lerp(sorted_N[low_Q.long()], sorted_N[high_Q.long()], place_Q - low_Q).tolist())
