"""The same mathematics, fast: one visible place decides which path serves.

`kernel="auto"` takes the sparse path of the device; `kernel="reference"` forces the dense definition.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from cosae.kernels import cpu, native, reference
from cosae.kernels.memory import keep_memory
from cosae.kernels.screen import has_fast_bf16
from cosae.kernels.terms import Entries, ScoreTerms
from cosae.types import CosaeError

__all__ = ["KERNELS", "Entries", "Kernel", "ScoreTerms", "choose", "describe", "keep_memory"]

KERNELS = ("auto", "reference", "cpu")


class Kernel(Protocol):
    """What every path offers; `reference` says what each function means."""

    NAME: str

    def select_batch_topk(self, terms: ScoreTerms, n_keep: int, hint: float | None = None) -> tuple[Entries, float]: ...
    def select_topk(self, terms: ScoreTerms, k: int, absolute: bool = False) -> Entries: ...
    def select_above(self, terms: ScoreTerms, threshold: Tensor) -> Entries: ...
    def entry_content(self, terms: ScoreTerms, entries: Entries) -> Tensor: ...
    def at_feature(self, parameter_F: Tensor, entries: Entries) -> Tensor: ...
    def decode(self, value_E: Tensor, entries: Entries, decoder_FD: Tensor, n_tokens: int) -> Tensor: ...


def choose(kernel: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Kernel:
    """The path that serves: `reference` on request, else `cpu`, the sparse path in PyTorch and compiled loops.

    The sparse path takes any device and dtype: where its screen cannot serve (float64, another device, scales beyond
    float32, most scores wanted) its selection is the definition's, its sums stay sparse, and the reason is logged
    once. Raises CosaeError for a name that is not one of KERNELS.
    """
    if kernel not in KERNELS:
        raise CosaeError(f"kernel must be one of {', '.join(KERNELS)}. Got {kernel!r} instead.")
    return cast(Kernel, reference if kernel == "reference" else cpu)


def describe(kernel: str = "auto") -> str:
    """One line for a run's record: which path `kernel` takes on this machine, and by what means."""
    if choose(kernel, "cpu") is cast(Kernel, reference):
        return "reference: dense PyTorch"
    screen = "bf16" if has_fast_bf16() else "fp32"
    return f"cpu: {screen} screen with exact fp32 scores, {'numba' if native.serves() else 'plain PyTorch'} loops"
