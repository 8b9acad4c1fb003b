"""What a user can get wrong, and the checks that everybody makes."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class CosaeWarning(UserWarning):
    """What goes on as asked, or as assumed, and may not be what was meant."""


class CosaeError(ValueError):
    """A mistake of the user's that one sentence can put right: what came, what is allowed, what to do."""


class NotFiniteError(CosaeError):
    """Activations that hold NaN or infinity; a run can be told to leave them out (`advises_to_drop`)."""


@contextmanager
def advises_to_drop() -> Iterator[None]:
    """For what trains, and so has the field data.non_finite: names it where activations are not finite."""
    try:
        yield
    except NotFiniteError as error:
        advice = "or leave such rows out with data.non_finite=drop."
        raise CosaeError(f"{str(error).removesuffix('.')}, {advice}") from error


SHORT = 240
"""Characters of what came that a message shows."""
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 12, 12, 8
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 160


def short(value: object) -> str:
    """A value as it is written in Python, cut where it is long: what came may be a stranger's, and nested."""
    text = " ".join(_SHORT.repr(value).split())
    return text if len(text) <= SHORT else f"{text[:SHORT]}…"


def sentences(*parts: object) -> str:
    """Parts of a message one after the other, each ended by a full stop where it has no end of its own."""
    said = [text for part in parts if (text := str(part).strip())]
    return " ".join(text if text[-1] in ".!?…" else f"{text}." for text in said)


def check_least(name: str, value: float | None, least: float) -> None:
    """Raises CosaeError for a value below the least one; None is no value."""
    if value is not None and value < least:
        raise CosaeError(f"{name} must be at least {least}. Got {short(value)} instead.")


def check_most(name: str, value: float | None, most: float) -> None:
    """Raises CosaeError for a value above the largest one; None is no value."""
    if value is not None and value > most:
        allowed = f"{most:,}" if isinstance(most, int) else f"{most:g}"
        raise CosaeError(f"{name} must be at most {allowed}. Got {short(value)} instead.")


def check_positive(name: str, value: float, *, zero: bool = False) -> None:
    """Raises CosaeError for what is not a finite number above 0 (with `zero`: of at least 0)."""
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        allowed = "finite number of at least 0" if zero else "positive number"
        raise CosaeError(f"{name} must be a {allowed}. Got {short(value)} instead.")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises CosaeError for a value that is not among the choices."""
    if value not in (listed := tuple(choices)):
        raise CosaeError(f"{name} must be one of {', '.join(map(str, listed))}. Got {short(value)} instead.")


def check_range(name: str, value: float, allowed: str) -> None:
    """Raises CosaeError for a value outside an interval written as "[0, 1)" or "(0, inf)"."""
    low, high = (float(end) for end in allowed[1:-1].split(","))
    above = value >= low if allowed[0] == "[" else value > low
    below = value <= high if allowed[-1] == "]" else value < high
    if not (above and below):
        raise CosaeError(f"{name} must lie in {allowed}. Got {short(value)} instead.")
