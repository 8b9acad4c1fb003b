"""Adam's two moments in 4, 2 or 1 bytes a number: what is kept between steps, and how it is rounded.

    float32    as it is
    bfloat16   the upper half of fp32's bits, rounded stochastically
    int8       one byte, and an fp32 scale for every BLOCK numbers of a row (block-wise, arXiv 2110.02861): with
               u = |x| / scale, scale the block's largest |x|, the code c means u = (c / L)^p.
               mean: L = 127, p = 3, signed; square: L = 255, p = 6, so that √square has the mean's curve.
               A square above 0 keeps c ≥ 1: Adam divides by its root

Rounding is stochastic and unbiased (up with the probability that makes the expected value exact; the floor c ≥ 1
aside). To nearest, a square would stand still: one step lowers it by at most 1 − β2 = 0.1 %, and half of bf16's
spacing is 0.2–0.4 %. The draws are a hash of (key, position) and nothing else, the key one of (seed, parameter, step):
they carry no state, so a run that goes on from a checkpoint rounds as the run that was never stopped, and every path
draws the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from cosae.kernels.cache import StepCache

STATE_DTYPES = ("float32", "bfloat16", "int8")
BLOCK = 256
"""Numbers of a row that share one scale."""
MEAN, SQUARE = (127, 3), (255, 6)
"""Levels L and power p of the codes."""
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Moment:
    """One moment of one parameter, written in place.

    data      shaped like the parameter: fp32 or float64, bf16, int8 (mean) or uint8 (square)
    scale_RK  (rows, blocks) fp32 for int8, else None
    """

    data: Tensor
    scale_RK: Tensor | None = None

    @classmethod
    def zero(cls, like: Tensor, dtype: str, signed: bool) -> Moment:
        """A moment of 0. Only fp32 matrices are ever compressed: vectors and scalars keep their own precision."""
        like = like.detach()
        if dtype == "float32" or like.dim() != 2 or like.dtype != torch.float32:
            return cls(torch.zeros_like(like))
        if dtype == "bfloat16":
            return cls(torch.zeros_like(like, dtype=torch.bfloat16))
        data = torch.zeros_like(like, dtype=torch.int8 if signed else torch.uint8)
        return cls(data, like.new_zeros(like.shape[0], -(-like.shape[1] // BLOCK)))

    @property
    def uncompressed(self) -> bool:
        """True where nothing is compressed."""
        return self.scale_RK is None and self.data.dtype != torch.bfloat16

    def read(self, rows: slice) -> Tensor:
        """(r, D) values of some rows; a view where nothing is compressed."""
        if self.uncompressed:
            return self.data[rows]
        if self.scale_RK is None:
            return self.data[rows].float()
        levels, power = _code_of(self.data)
        code = self.data[rows].float()
        value = (code.abs() / levels).pow(power).mul_(code.sign())
        scale = self.scale_RK[rows].repeat_interleave(BLOCK, dim=1)[:, : value.shape[1]]
        return value.mul_(scale)

    def write(self, rows: slice, value: Tensor, key: int) -> None:
        """Keep value (r, D) in those rows, rounded by the draws of `key`."""
        if self.uncompressed:
            self.data[rows] = value
            return
        draw = draws(key, rows.start, value.shape[0], value.shape[1], value.device)
        if self.scale_RK is None:
            bits = (value.contiguous().view(torch.int32) + (draw >> 16).int()) >> 16
            self.data[rows] = bits.short().view(torch.bfloat16)
            return
        code, self.scale_RK[rows] = _encode(value, draw, *_code_of(self.data))
        self.data[rows] = code.to(self.data.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors behind it: "" and, for int8, "_scale"."""
        return {"": self.data} | ({} if self.scale_RK is None else {"_scale": self.scale_RK})


def _code_of(data: Tensor) -> tuple[int, int]:
    return MEAN if data.dtype == torch.int8 else SQUARE


def _encode(value: Tensor, draw: Tensor, levels: int, power: int) -> tuple[Tensor, Tensor]:
    """Codes (r, D) as fp32 and scales (r, blocks)."""
    n_rows, width = value.shape
    n_blocks = -(-width // BLOCK)
    padded = torch.nn.functional.pad(value.abs(), (0, n_blocks * BLOCK - width)).view(n_rows, n_blocks, BLOCK)
    scale = padded.amax(-1)
    inverse = torch.where(scale > 0, 1.0 / scale.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    share = (padded * inverse[:, :, None]).view(n_rows, -1)[:, :width].clamp_max(1.0)
    low = (levels * (share.clamp_min(1e-38).log2() / power).exp2()).floor().clamp(0, levels - 1)
    below, above = (low / levels).pow(power), ((low + 1) / levels).pow(power)
    up = (draw >> 8).float() * 2.0**-24 < (share - below) / (above - below)
    code = low + up
    if power == SQUARE[1]:
        code = torch.where(share > 0, code.clamp_min(1.0), 0.0)
    return code * value.sign(), scale


def key_of(seed: int, name: str, count: int) -> int:
    """31 bits that name the draws of one moment at one step."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{count}".encode()).digest()[:4]) >> 1


def draws(key: int, first_row: int, n_rows: int, width: int, device: torch.device) -> Tensor:
    """(r, D) int64 draws from 0 … 2³² − 1 for those rows of a matrix: murmur3's finaliser of position and key."""
    x = torch.arange(first_row * width, (first_row + n_rows) * width, device=device)
    x = (x * 0x9E3779B9 + key) & _MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return (x ^ (x >> 16)).view(n_rows, width)


@dataclass(frozen=True)
class Task:
    """A parameter and everything its step reads.

    along_R     (R,) component of each gradient row along its unit row; None where rows are not unit
    rate        lr / (1 − β1^t);  root_bias2  √(1 − β2^t);  clip  factor on the gradient
    keys        of the draws that round mean and square
    cache       where the new rows' norms (on a GPU: unit rows) are left, where the next step's screen wants them
    """

    grad: Tensor
    weight: Tensor
    mean: Moment
    square: Moment
    along_R: Tensor | None
    rate: float
    root_bias2: float
    clip: float
    betas: tuple[float, float]
    eps: float
    keys: tuple[int, int]
    cache: StepCache | None = None
