"""Which path serves: the sparse one of the device, or the dense definition."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from cosae.errors import CosaeError, check_choice
from cosae.kernels import reference
from cosae.kernels.cache import Choices
from cosae.kernels.cpu import native, sums
from cosae.kernels.path import SparsePath
from cosae.kernels.peers import ALONE, Peers
from cosae.kernels.select import search
from cosae.kernels.terms import Entries, ScoreTerms

KERNELS = ("auto", "reference", "cpu", "triton")


class Kernel(Protocol):
    """What every path offers; `reference` says what each function means."""

    @property
    def NAME(self) -> str: ...
    def select_batch_topk(
        self, terms: ScoreTerms, n_keep: int, hint: float | None = None, peers: Peers = ALONE
    ) -> tuple[Entries, float]: ...
    def select_topk(self, terms: ScoreTerms, k: int, absolute: bool = False) -> Entries: ...
    def select_above(self, terms: ScoreTerms, threshold: Tensor) -> Entries: ...
    def entry_content(self, terms: ScoreTerms, entries: Entries) -> Tensor: ...
    def entry_values(self, terms: ScoreTerms, entries: Entries, score_E: Tensor) -> Tensor: ...
    def at_feature(self, parameter_F: Tensor, entries: Entries) -> Tensor: ...
    def decode(self, value_E: Tensor, entries: Entries, decoder_FD: Tensor, n_tokens: int) -> Tensor: ...
    def squared_errors(self, z_BD: Tensor, recon_BD: Tensor, centre_only: bool = False) -> Tensor: ...


CPU = SparsePath("cpu", search.CPU, sums)


def choose(kernel: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Kernel:
    """The path that serves.

        kernel=      cpu tensors                     cuda tensors
        reference    reference                       reference
        cpu          cpu                             cpu: dense selection, sums in plain PyTorch
        auto         cpu                             triton; cpu where triton cannot serve, said once
        triton       triton in its interpreter,      triton
                     where TRITON_INTERPRET=1

    Within a path shapes and scores decide further: where a screen cannot serve (float64, scales beyond float32, most
    scores wanted, nothing to score) the selection is the definition's, the sums stay sparse, and the reason is logged
    once. Raises CosaeError for a name that is not one of KERNELS, and for `triton` where it cannot run.
    """
    check_choice("kernel", kernel, KERNELS)
    if kernel == "reference":
        return reference
    on_cuda = torch.device(device).type == "cuda"
    if kernel == "cpu" or (kernel == "auto" and not on_cuda):
        return CPU
    path: SparsePath | str
    if dtype != torch.float32:
        path = f"it computes in float32 and the SAE is {str(dtype).removeprefix('torch.')}"
    elif not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        path = "the tensors are not on a CUDA device (and TRITON_INTERPRET=1 is not set)"
    else:
        path = _triton()
    if isinstance(path, SparsePath):
        return path
    if kernel == "triton":
        raise CosaeError(f"kernel triton cannot run, because {path}: use kernel auto, cpu or reference.")
    search.log_once(f"the plain path serves on {torch.device(device).type}", path, logging.WARNING)
    return CPU


@lru_cache(maxsize=1)
def _triton() -> SparsePath | str:
    """The path of CUDA devices, or why there is none.

    triton comes with CUDA builds of torch and is imported only where it is chosen. With TRITON_INTERPRET=1 set before
    that, it runs on the CPU in its interpreter: slow, for tests.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'cosae[gpu]')"
    try:
        from cosae.kernels.triton import sums as triton_sums
        from cosae.kernels.triton import survivors
    except Exception as fault:  # triton meets drivers and compilers that it breaks on in ways of its own
        return f"triton cannot be used ({fault})"
    finder = search.Finder(survivors.unserved, survivors.survivors, guess_dtype=torch.bfloat16)
    return SparsePath("triton", finder, triton_sums)


def describe(kernel: str = "auto", device: torch.device | str = "cpu", choices: Choices | None = None) -> str:
    """One line for a run's record: which path `kernel` takes on this device, and by what means.

    choices: what the searches of one arm took (`StepCache.choices`); without them the screen is "the fastest".
    """
    path = choose(kernel, device)
    device = torch.device(device)
    if path.NAME == reference.NAME:
        return "reference: dense PyTorch"
    if path.NAME == "triton":
        from cosae.kernels.triton.survivors import screen_dtype

        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter"
        short = "bf16" if screen_dtype(device) == torch.bfloat16 else "fp32"
        return f"triton: {short} screen with exact fp32 scores, on {where}"
    if device.type != "cpu":
        return "cpu: dense selection, sparse sums in plain PyTorch"
    loops = "numba" if native.serves() else "plain PyTorch"
    return f"cpu: {choices or Choices()} with exact fp32 scores, {loops} loops"
