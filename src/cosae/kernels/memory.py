"""Memory that a step needs is mapped once, not afresh by every step: gradients' matrices, and freed blocks at large."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterable

import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_memory() -> bool:
    """Ask glibc to reuse freed blocks of any size; True where it agreed. Changes the whole process, for its life.

    glibc maps blocks above 32 MB (and at first above 128 kB) afresh on each allocation and unmaps them when freed;
    a training step then pays for zeroed pages of every gradient (a fifth of a step at d 192, m 3072 on a virtual
    machine). For programs, at their start; libraries should not. Other systems' allocators are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))


_held = threading.local()


def spare_like(x: Tensor) -> Tensor:
    """Uninitialised, contiguous, of x's shape, dtype and device: a spare where one fits, else fresh memory."""
    spares: list[Tensor] = getattr(_held, "spares", [])
    for place, spare in enumerate(spares):
        if spare.shape == x.shape and spare.dtype == x.dtype and spare.device == x.device:
            return spares.pop(place)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def keep_spares(gradients: Iterable[Tensor]) -> None:
    """Hold these matrices for the calling thread's next `spare_like`, instead of all that were held before.

    For gradients that nothing else refers to: they will be written over. Only one arm's are held at a time. Matrices
    that are part of larger memory are let go.
    """
    fit = (g for g in gradients if g.dim() == 2 and g.layout == torch.strided and g.is_contiguous())
    _held.spares = [g for g in fit if g.untyped_storage().nbytes() == g.nbytes]
