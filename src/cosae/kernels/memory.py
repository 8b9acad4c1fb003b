"""Freed memory is reused by the whole process, where the system's allocator can be asked to."""

from __future__ import annotations

import ctypes
import sys

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
