"""How many processes train together, and what each of them has. No torch.distributed here: a recipe reads it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from cosae.errors import CosaeError, check_least, check_positive

AXES = ("data", "feature", "arm")


def started() -> int:
    """How many processes torchrun started; 1 without it."""
    known = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return int(os.environ["WORLD_SIZE"]) if known else 1


@dataclass(frozen=True)
class ParallelConfig:
    """The mesh of processes that torchrun starts: data · feature · arm of them. Raises CosaeError."""

    data: int = 1
    """Processes that share a batch: each has some of its tokens."""
    feature: int = 1
    """Processes that share a dictionary: each has some of its features."""
    arm: int = 1
    """Processes that share the arms: each trains some of them."""
    timeout: float = 600.0
    """Seconds after which a process that does not answer is given up."""

    def __post_init__(self) -> None:
        for axis in AXES:
            check_least(axis, getattr(self, axis), 1)
        check_positive("timeout", self.timeout)
        if not math.isfinite(self.timeout):
            raise CosaeError("timeout must be a number of seconds. Got infinity instead.")

    @property
    def n(self) -> int:
        """Processes."""
        return self.data * self.feature * self.arm

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1) or "data=1"

    @classmethod
    def parse(cls, text: str) -> ParallelConfig:
        """ "data=2,feature=4" → ParallelConfig. Raises CosaeError."""
        found: dict[str, int] = {}
        for part in filter(None, text.split(",")):
            axis, _, number = part.strip().partition("=")
            if axis not in AXES or not number.isdecimal() or axis in found:
                raise CosaeError(f"--parallel takes data=N,feature=N,arm=N, each at most once. Got {text!r} instead.")
            found[axis] = int(number)
        return cls(**found)
