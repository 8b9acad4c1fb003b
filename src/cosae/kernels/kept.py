"""What is known of a tensor until somebody writes to it: left by whoever sweeps over it, found by whoever asks next.

Writing is seen by torch's version counter, as autograd sees it; `x.data` has a counter of its own and hides it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

MANY = 64
"""Notes above which those of dead tensors are dropped."""


@dataclass(frozen=True)
class _Note:
    storage: Any
    version: int
    shape: torch.Size
    facts: Any


_notes: dict[int, _Note] = {}


def _storage(x: Tensor) -> Any:
    """A weak reference to x's memory; that of freed memory equals no other's."""
    return StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]


def leave(x: Tensor, facts: Any) -> None:
    """Let `facts` be found for x, and for views of the same shape at the same place, until x is written to or freed."""
    if x.is_inference():
        return  # it has no version counter
    if len(_notes) >= MANY:
        for place in [place for place, note in list(_notes.items()) if note.storage.expired()]:
            _notes.pop(place, None)
    _notes[x.data_ptr()] = _Note(_storage(x), x._version, x.shape, facts)


def before(x: Tensor) -> Any | None:
    """What was left for this memory last, whether it still holds or not: to be overwritten."""
    note = _note(x)
    return None if note is None else note.facts


def found(x: Tensor) -> Any | None:
    """What was left for these very numbers, or None."""
    note = _note(x)
    return None if note is None or note.version != x._version else note.facts


def _note(x: Tensor) -> _Note | None:
    note = None if x.is_inference() else _notes.get(x.data_ptr())
    if note is None or note.shape != x.shape or note.storage.expired() or note.storage != _storage(x):
        return None
    return note
