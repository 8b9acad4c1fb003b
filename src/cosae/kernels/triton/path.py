"""The sparse path of CUDA devices: the same search and the same gradients as the CPU's, around Triton kernels.

Imported only where it is chosen, since it needs triton (which CUDA builds of torch bring along). With the environment
variable TRITON_INTERPRET=1 set before that, it runs on the CPU in Triton's interpreter: slow, for tests. Each
function's definition is its twin in `reference`.
"""

from __future__ import annotations

from functools import partial

import torch

from cosae.kernels import autograd as gradients
from cosae.kernels.select import search, topk
from cosae.kernels.triton import sums as triton_sums
from cosae.kernels.triton.survivors import survivors, unserved

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

NAME = "triton"

FINDER = search.Finder(unserved, survivors, guess_dtype=torch.bfloat16)

select_batch_topk = partial(search.select_batch_topk, finder=FINDER)
select_above = partial(search.select_above, finder=FINDER)
select_topk = partial(topk.select_topk, finder=FINDER)
entry_content = partial(gradients.entry_content, triton_sums)
at_feature = partial(gradients.at_feature, triton_sums)
decode = partial(gradients.decode, triton_sums)
squared_errors = partial(gradients.squared_errors, triton_sums)
