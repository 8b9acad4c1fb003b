"""What lies in a store, and the numbers that it keeps of an activation vector.

    STORE/index.json                  what it holds: written last, and only then is the store finished
    STORE/SIDE-NNNNN.safetensors      shards of a side, held_out or train
    STORE/capture.json                while writing only: what was asked for (it decides every byte) and who wrote
    STORE/journal.jsonl               while writing only: one line a complete shard

    dtype      per value       |x − x̂| of one value is at most
    float32    4 bytes         0
    bfloat16   2 bytes         2⁻⁸ |x|
    float16    2 bytes         2⁻¹¹ |x| (and 2⁻²⁵ where |x| < 2⁻¹⁴); above 65 504 refused
    int8       1 byte          max_j |x_j| / 254 of its row (one fp32 scale a row: max_j |x_j| / 127)

int8 rounds all values of a row with one step, so a row in which one coordinate is a hundred times larger than the
rest (an attention sink) keeps little of the rest. And every dtype but float32 rounds relative to the value, while what
an SAE learns is how values differ from their mean: at a mean of 100 standard deviations bfloat16's noise is 3 % of the
variance, int8's 27 %. So a shard whose rows would lose more than NOISE of their variance is stored centred: `offset`
holds the median of each coordinate over some of its rows, and `x` the rows less that (version 2 of the format).

A shard is a safetensors file with some rows of one site, and everything that is known of each row:

    x          (N, D)  float32, bfloat16, float16 or int8
    scale      (N,)    float32: of int8 rows only
    norm       (N,)    float32: |x| in fp32, from before any rounding
    token, document, position, index   (N,) int32, as in types.Activations; -1 where unknown
    special    (N,)    bool
    labels     (N, L)  uint8: concept labels, bit-packed (little end first); only where the corpus has concepts
    labelled   (N,)    bool: whether the document could be labelled; with `labels`
    offset     (D,)    float32: what the stored rows are relative to; only where the shard is centred
    mean       (D,)    float64: of the shard's rows as stored
    squares    (1,)    float64: Σ |x − mean|² of the shard's rows as stored
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cosae.errors import check_choice

INDEX, CAPTURE, JOURNAL = "index.json", "capture.json", "journal.jsonl"
FORMAT, VERSION = "cosae-store", 2
SIDES: tuple[Literal["held_out", "train"], ...] = ("held_out", "train")
MAX_FLOAT16 = 65504.0
STORE_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "int8")}
LEVELS = 127
NOISE = 1e-3
"""Rounding noise, as a share of the variance, above which a shard is stored centred."""
WARN_NOISE = 1e-2
"""Above this a capture, and a run that reads the store, warn."""
_FLOAT32 = torch.finfo(torch.float32)
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def store_dtype(name: str) -> str:
    """The full name of a store's dtype; fp32, bf16 and fp16 are understood. Raises CosaeError for any other."""
    full = _SHORT.get(name, name)
    check_choice("the dtype of a store", full, STORE_DTYPES)
    return full


def round_rows(x_ND: Tensor, dtype: str, offset_D: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(N, D) finite floats → (N, D) as stored, and for int8 the (N,) fp32 scale of each row, otherwise None."""
    if offset_D is not None:
        x_ND = x_ND.float() - offset_D
    if dtype != "int8":
        return x_ND.to(STORE_DTYPES[dtype]).contiguous(), None
    x_ND = x_ND.float()
    largest_N = x_ND.abs().amax(-1)
    # never 0, and never so large that 127 · scale overflows
    scale_N = (largest_N / LEVELS).clamp(_FLOAT32.tiny, _FLOAT32.max / LEVELS * (1 - _FLOAT32.eps))
    level_ND = (x_ND / scale_N[:, None]).round().clamp(-LEVELS, LEVELS)
    return level_ND.to(torch.int8), scale_N


def restore_rows(stored_ND: Tensor, scale_N: Tensor | None, offset_D: Tensor | None = None) -> Tensor:
    """The inverse: int8 rows and centred ones become fp32, other float dtypes stay what they are."""
    plain_ND = stored_ND if scale_N is None else stored_ND.float() * scale_N[:, None]
    return plain_ND if offset_D is None else plain_ND.float() + offset_D


def choose_offset(x_ND: Tensor, dtype: str) -> tuple[Tensor | None, float]:
    """What to store rows (N, D) relative to, None where that would gain little; and the rounding noise that is left,
    as a share of the variance of an ordinary row.

    Both from up to 512 rows, by medians: a few sinks must not decide for all others.
    """
    x_ND = x_ND[torch.linspace(0, len(x_ND) - 1, min(len(x_ND), 512), dtype=torch.float64).long()].float().cpu()
    offset_D = x_ND.median(0).values
    plain, centred = (_noise(x_ND, offset_D, dtype, shift) for shift in (None, offset_D))
    return (offset_D, centred) if plain > NOISE and centred < plain / 2 else (None, plain)


def _noise(x_ND: Tensor, middle_D: Tensor, dtype: str, offset_D: Tensor | None) -> float:
    """The median over rows of |x − x̂|² / |x − middle|²; rows in the middle itself have none."""
    error_N = (restore_rows(*round_rows(x_ND, dtype, offset_D), offset_D).double() - x_ND).square().sum(-1)
    apart_N = (x_ND.double() - middle_D).square().sum(-1)
    share_N = (error_N / apart_N)[apart_N > 0]
    return float(share_N.median()) if len(share_N) else 0.0


COLUMNS = {name: f"{name}_N" for name in ("norm", "token", "document", "position", "index", "special")}
COLUMNS["document"] = "doc_N"
"""Name in a shard → field of Activations."""
_X_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}
NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "I8": "|i1", "I32": "<i4", "BOOL": "|b1", "U8": "|u1", "F64": "<f8"}
NUMPY_DTYPES["BF16"] = "<i2"  # read as int16 and viewed: NumPy has no such dtype


@dataclass(frozen=True)
class ShardTag:
    """Which shard of which store.

    store   64 hex digits of the request that decides the store's content
    side    train or held_out
    number  counted from 0 within its side
    """

    store: str
    side: str
    number: int

    @property
    def file(self) -> str:
        return f"{self.side}-{self.number:05d}.safetensors"


@dataclass(frozen=True)
class ShardShape:
    """What a shard's tensors look like.

    label_bytes  bytes of packed labels per row, 0 where there are none
    centred      whether the rows are stored relative to an offset
    """

    rows: int
    d_in: int
    dtype: str
    label_bytes: int = 0
    centred: bool = False

    def tensors(self) -> dict[str, tuple[str, list[int]]]:
        """Name → (safetensors dtype, shape)."""
        n = self.rows
        found = {"x": (_X_DTYPES[self.dtype], [n, self.d_in]), "norm": ("F32", [n]), "special": ("BOOL", [n])}
        found |= {name: ("I32", [n]) for name in ("token", "document", "position", "index")}
        if self.dtype == "int8":
            found["scale"] = ("F32", [n])
        if self.label_bytes:
            found |= {"labels": ("U8", [n, self.label_bytes]), "labelled": ("BOOL", [n])}
        if self.centred:
            found["offset"] = ("F32", [self.d_in])
        return found | {"mean": ("F64", [self.d_in]), "squares": ("F64", [1])}

    def row_bytes(self) -> int:
        """Bytes of one row on disk, header aside."""
        return sum(
            np.dtype(NUMPY_DTYPES[kind]).itemsize * int(np.prod(shape[1:], dtype=np.int64))
            for name, (kind, shape) in self.tensors().items()
            if name not in ("mean", "squares", "offset")
        )
