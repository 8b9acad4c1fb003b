"""How much memory and disk there is, and what to say where a run needs more."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cosae.errors import CosaeError
from cosae.io.memory import available_memory


@dataclass(frozen=True)
class Item:
    """One thing that takes memory or disk, in words, and its bytes."""

    what: str
    n_bytes: int


@dataclass(frozen=True)
class Choice:
    """A number that can be lowered so that less is needed.

    setting  the recipe field or option
    value    what it is now
    least    below this it makes no sense
    needed   bytes in all with another value there
    """

    setting: str
    value: int
    least: int
    needed: Callable[[int], int]

    def fitting(self, available: int) -> int | None:
        """The largest value with which everything fits, in two or three leading digits; None where none does."""
        if self.value <= self.least or self.needed(self.least) > available:
            return None
        low, high = self.least, self.value  # fits, does not fit
        while high - low > max(1, low // 256):
            middle = (low + high) // 2
            low, high = (middle, high) if self.needed(middle) <= available else (low, middle)
        return _round_down(low, self.least)


def total(items: Sequence[Item]) -> int:
    """Bytes of all."""
    return sum(item.n_bytes for item in items)


def check_device(device: str) -> None:
    """Raises CosaeError for a device that is not, or that no run can use."""
    try:
        request = torch.device(device)
    except RuntimeError:
        request = None
    if request is None or request.type not in ("cpu", "cuda"):
        raise CosaeError(f"device must be cpu, cuda or cuda:N. Got {device!r} instead.")
    if request.type == "cuda" and not torch.cuda.is_available():
        raise CosaeError("device cuda was asked for, but this torch sees no CUDA device: use --device cpu.")


def free_memory(device: str = "cpu") -> int:
    """Bytes that can still be had on a device: available memory within this process' limits, or the GPU's free part."""
    check_device(device)
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return available_memory()


def free_disk(place: Path) -> int:
    """Bytes free where `place` is or will be."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def check_fits(items: Sequence[Item], choices: Iterable[Choice], available: int, of_what: str, otherwise: str) -> None:
    """Raises CosaeError where `items` take more than is available `of_what`, saying which choice to lower to what, or
    what to choose `otherwise`."""
    needed = total(items)
    if needed <= available:
        return
    largest = max(items, key=lambda item: item.n_bytes)
    raise CosaeError(
        f"this would take {human(needed)} of {of_what}, of which {human(max(available, 0))} are free; the largest part "
        f"is {largest.what} ({human(largest.n_bytes)}). {_advice(list(choices), available, otherwise)}"
    )


def _advice(choices: Sequence[Choice], available: int, otherwise: str) -> str:
    """The one number that has to give least; where none is enough, those that help most."""
    found = [(lower / c.value, c, lower) for c in choices if (lower := c.fitting(available)) is not None]
    if found:
        _, choice, lower = max(found, key=lambda one: one[0])
        return f"Lower {choice.setting} from {choice.value} to {lower}."
    able = sorted((c for c in choices if c.value > c.least), key=lambda c: c.needed(c.least))[:3]
    if not able:
        return f"Choose {otherwise}."
    return f"No single number is enough: lower {', '.join(c.setting for c in able)} together, or choose {otherwise}."


def _round_down(value: int, least: int) -> int:
    """Two leading digits, or three where that would be too small."""
    for digits in (2, 3):
        unit = int(10 ** max(len(str(value)) - digits, 0))
        if value // unit * unit >= least:
            return value // unit * unit
    return value


def human(n_bytes: float) -> str:
    """1.5 GB, 340 MB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes:.0f} bytes"
