"""The numbers a store keeps of an activation vector, and what that costs.

    dtype      per value       |x − x̂| of one value is at most
    float32    4 bytes         0
    bfloat16   2 bytes         2⁻⁸ |x|
    float16    2 bytes         2⁻¹¹ |x| (and 2⁻²⁵ where |x| < 2⁻¹⁴); above 65 504 refused
    int8       1 byte          max_j |x_j| / 254 of its row (one fp32 scale a row: max_j |x_j| / 127)

int8 rounds all values of a row with one step, so a row in which one coordinate is a hundred times larger than the
rest (an attention sink) keeps little of the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosae.errors import check_choice

STORE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
LEVELS = 127
_FLOAT32 = torch.finfo(torch.float32)
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def store_dtype(name: str) -> str:
    """The full name of a store's dtype; fp32, bf16 and fp16 are understood. Raises CosaeError for any other."""
    full = _SHORT.get(name, name)
    check_choice("the dtype of a store", full, STORE_DTYPES)
    return full


def round_rows(x_ND: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """(N, D) finite floats → (N, D) as stored, and for int8 the (N,) fp32 scale of each row, otherwise None."""
    if dtype != "int8":
        return x_ND.to(STORE_DTYPES[dtype]).contiguous(), None
    x_ND = x_ND.float()
    largest_N = x_ND.abs().amax(-1)
    # never 0, and never so large that 127 · scale overflows
    scale_N = (largest_N / LEVELS).clamp(_FLOAT32.tiny, _FLOAT32.max / LEVELS * (1 - _FLOAT32.eps))
    level_ND = (x_ND / scale_N[:, None]).round().clamp(-LEVELS, LEVELS)
    return level_ND.to(torch.int8), scale_N


def restore_rows(stored_ND: Tensor, scale_N: Tensor | None) -> Tensor:
    """The inverse: int8 becomes fp32, the float dtypes stay what they are."""
    return stored_ND if scale_N is None else stored_ND.float() * scale_N[:, None]
