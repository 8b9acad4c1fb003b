"""What one training step's search, gradients and optimiser hand to each other. The step owns it and passes it along.

Writing to a tensor is seen by torch's version counter, as autograd sees it; `x.data` has a counter of its own and
hides it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from cosae.kernels.deterministic import total

RETRY = 32
"""Searches after which an arm forgets what each format of the screen let pass, and tries anew."""


class Seen:
    """A tensor as it was when something was found out about it; holds no memory."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.place = x.shape, x.data_ptr()
        self.version = None if x.is_inference() else x._version  # inference tensors count no versions
        # a weak reference: that of freed memory equals no other's
        self.storage: Any = StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]

    def same_memory(self, x: Tensor) -> bool:
        """Whether x is that tensor, or a view of the same shape at its place, written to since or not."""
        if x.is_inference() or self.version is None or self.shape != x.shape or self.place != x.data_ptr():
            return False
        storage: Any = StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]
        return not self.storage.expired() and bool(self.storage == storage)

    def holds(self, x: Tensor) -> bool:
        """The same, and nothing was written to it since."""
        return self.same_memory(x) and self.version == x._version


@dataclass(frozen=True)
class Measured:
    """What the loop that made a gradient matrix saw of its rows while it had them.

    gradient, rows  the gradient, and what it is a gradient of
    along_F   (F,) component of each gradient row along its row of unit length; None where that was not asked for
    square    () float64 squared norm of the gradient, without those components where along_F is there
    """

    gradient: Seen
    rows: Seen
    along_F: Tensor | None
    square: Tensor


@dataclass
class Workspace:
    """Memory that is written over by every step; arms that step in turn may share one.

    Fresh memory is mapped page by page, which costs more than what fills it: up to 1.8 times a step.

    products  flat work buffers of the search's product, by dtype
    spares    (F, D) gradient matrices of the last step, for the next one's
    """

    products: dict[torch.dtype, Tensor] = field(default_factory=dict)
    spares: list[Tensor] = field(default_factory=list)

    def product(self, size: int, dtype: torch.dtype) -> Tensor:
        """(size,) uninitialised; the next call's is the same memory."""
        if dtype not in self.products or self.products[dtype].numel() < size:
            self.products[dtype] = torch.empty(size, dtype=dtype)
        return self.products[dtype][:size]

    def spare_like(self, x: Tensor) -> Tensor:
        """Uninitialised, contiguous, of x's shape, dtype and device: a spare where one fits, else fresh memory."""
        for place, spare in enumerate(self.spares):
            if spare.shape == x.shape and spare.dtype == x.dtype and spare.device == x.device:
                return self.spares.pop(place)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def keep(self, gradients: Iterable[Tensor]) -> None:
        """Hold these matrices for `spare_like`, instead of all that were held before.

        For gradients that nothing else refers to: they will be written over. Matrices that are part of larger memory
        are let go.
        """
        fit = (g for g in gradients if g.dim() == 2 and g.layout == torch.strided and g.is_contiguous())
        self.spares = [g for g in fit if g.untyped_storage().nbytes() == g.nbytes]

    def clear(self) -> None:
        """Let all of it go."""
        self.products, self.spares = {}, []


@dataclass
class Choices:
    """What one arm's searches learn of their formats; the step's cache keeps it. Changes no result.

    picked    the last format taken
    seconds   by format, of the screen alone, as it was chosen by; empty where no clock was asked
    tested    by format, exact scores of its last search
    searches  how many there were
    """

    picked: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    tested: dict[str, int] = field(default_factory=dict)
    searches: int = 0

    def learn(self, picked: str, tested: int) -> None:
        """One search in this format took so many exact scores."""
        self.searches += 1
        if self.searches % RETRY == 0:
            self.tested = {}
        self.picked, self.tested[picked] = picked, tested

    def __str__(self) -> str:
        times = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in sorted(self.seconds.items(), key=lambda pair: pair[1]))
        return f"{self.picked or 'fastest'} screen" + (f" (by the clock, ms: {times})" if times else "")


@dataclass
class StepCache:
    """What the parts of one arm's step tell each other, and the memory they work in.

    workspace  memory that is written over by every step
    row_stats  what the optimiser's sweep left of the encoder rows it had just written, with which rows these are:
               their norms (F,), or on a GPU their `UnitRows`; the next step's screen asks for it
    choices    what the arm's searches learnt of the screen's formats (cosae.kernels.select.pick)
    measured   what the gradients' loops saw of the matrices they made; the optimiser's clip asks for it
    """

    workspace: Workspace = field(default_factory=Workspace)
    row_stats: tuple[Seen, Any] | None = None
    measured: list[Measured] = field(default_factory=list)
    choices: Choices = field(default_factory=Choices)

    def leave_rows(self, rows_FD: Tensor, stats: Any) -> None:
        """Let `stats` be found for these rows until they are written to."""
        self.row_stats = (Seen(rows_FD), stats)

    def rows(self, rows_FD: Tensor, *, stale: bool = False) -> Any | None:
        """What was left for these very rows, or None; with `stale` also where they were written to since."""
        if self.row_stats is None:
            return None
        seen, stats = self.row_stats
        return stats if (seen.same_memory(rows_FD) if stale else seen.holds(rows_FD)) else None

    def leave_measured(self, grad_FD: Tensor, rows_FD: Tensor, along_F: Tensor | None, square_F: Tensor) -> None:
        """Let this be found for this gradient of these rows until either is written to."""
        self.measured.append(Measured(Seen(grad_FD), Seen(rows_FD), along_F, total(square_F)))

    def measured_of(self, grad_FD: Tensor, rows_FD: Tensor, unit: bool) -> Measured | None:
        """What is known of this gradient of these rows, measured for unit rows or others; or None."""
        for one in self.measured:
            if unit == (one.along_F is not None) and one.gradient.holds(grad_FD) and one.rows.holds(rows_FD):
                return one
        return None

    def end_step(self, gradients: Iterable[Tensor]) -> None:
        """The step is over: its gradients are memory for the next one, and what was measured of them is forgotten."""
        self.workspace.keep(gradients)
        self.measured = []
