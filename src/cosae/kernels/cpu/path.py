"""The sparse path of the CPU: selection by a screened product (`search`), gradients over active entries only.

Where numba is missing, and on any other device, the sums are plain PyTorch. Each function's definition is its twin in
`reference`; the gradients' formulas are in `gradients`.
"""

from __future__ import annotations

from functools import partial

from cosae.kernels import autograd as gradients
from cosae.kernels.cpu import sums
from cosae.kernels.select.search import select_above, select_batch_topk
from cosae.kernels.select.topk import select_topk

__all__ = [
    "NAME",
    "at_feature",
    "decode",
    "entry_content",
    "select_above",
    "select_batch_topk",
    "select_topk",
    "squared_errors",
]

NAME = "cpu"

entry_content = partial(gradients.entry_content, sums)
at_feature = partial(gradients.at_feature, sums)
decode = partial(gradients.decode, sums)
squared_errors = partial(gradients.squared_errors, sums)
