"""Shapes and activations of the timed steps. Needs torch alone: the peers' environment reads it too."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

N_BATCHES = 8


@dataclass(frozen=True)
class Shape:
    """d wide activations, m features, k kept per token, n tokens a step."""

    d: int
    m: int
    k: int
    n: int

    def __str__(self) -> str:
        return f"d {self.d}, m {self.m}, k {self.k}, {self.n} tokens a step"


SHAPES = {
    "A": Shape(768, 12288, 64, 2048),
    "B": Shape(512, 32768, 32, 2048),
    "demo": Shape(192, 3072, 32, 1024),
    "quick": Shape(64, 1024, 8, 256),
}
SWEPT = Shape(512, 8192, 32, 1024)
"""Where each sweep starts from: one of n, m and k is changed, the others stay."""
SWEEPS: dict[str, tuple[int, ...]] = {"n": (256, 1024, 4096), "m": (2048, 8192, 32768), "k": (8, 32, 128)}
QUICK_SWEEPS: dict[str, tuple[int, ...]] = {"n": (128, 256), "m": (512, 1024), "k": (4, 8)}


def swept(name: str, value: int, quick: bool) -> Shape:
    """The sweep's shape with one number changed."""
    return replace(SHAPES["quick"] if quick else SWEPT, **{name: value})


def draw_batches(shape: Shape, count: int = N_BATCHES) -> list[Tensor]:
    """`count` of (n, d): sparse sums of 4 d random directions, log-normal norms (σ = 0.3), a little noise."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * shape.d, shape.d, generator=draw), dim=-1)
    batches = []
    for _ in range(count):
        code = torch.relu(torch.randn(shape.n, 4 * shape.d, generator=draw) - 2.0) * 3
        scale = torch.exp(0.3 * torch.randn(shape.n, 1, generator=draw))
        noise = 0.1 * torch.randn(shape.n, shape.d, generator=draw)
        batches.append(code @ directions * scale + noise)
    return batches
