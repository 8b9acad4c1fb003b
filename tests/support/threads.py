"""A call on a number of torch's threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Answer = TypeVar("Answer")


def with_threads(n: int, call: Callable[[], Answer]) -> Answer:
    """call() with n threads of torch's; the number is put back."""
    own = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        return call()
    finally:
        torch.set_num_threads(own)
