"""What a command is doing and how far it is: a bar on a terminal or in a notebook, a plain line now and then elsewhere.

Work is done in named phases, one within another where it has parts. A phase that counts says how long it has left once
two of its lines are there: the first carries all that came before it, and no rate is taken from it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm.auto import tqdm

from cosae.io.escape import printable
from cosae.io.signals import Stop

T = TypeVar("T")
LINE_SECONDS = 15.0
"""Between two plain lines of a phase."""
BAR_SECONDS = 0.2
"""Between two drawings of a bar."""


def is_watched() -> bool:
    """Whether somebody sees a bar move: on a terminal, or in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def duration(seconds: float) -> str:
    """41 s, 4 min, 2.5 h, 3.1 days."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def _count(n: float) -> str:
    return f"{n:.0f}" if n < 10_000 else f"{n // 1000:.0f}k"


@dataclass
class Phase:
    """One named phase: how much of it is done, and since when it is counted."""

    name: str
    total: int | None
    unit: str
    done: float
    next_line: float
    bar: Any
    first: tuple[float, float] | None = None
    rate: float | None = None
    """Units a second between its first line and its latest; None before there are two."""

    def mark(self, now: float) -> None:
        """A line is being written: what the rate is taken from."""
        if self.first is None:
            self.first = self.done, now
        elif self.done > self.first[0] and now > self.first[1]:
            self.rate = (self.done - self.first[0]) / (now - self.first[1])

    @property
    def counted(self) -> str:
        """12k of 65k tokens."""
        unit = self.unit.removesuffix("s") if self.total == 1 else self.unit
        return f"{_count(self.done)} of {_count(self.total or 0)} {unit}"

    @property
    def left(self) -> str:
        """What is left, in words, where it is known."""
        if self.rate is None or self.total is None or self.done >= self.total:
            return ""
        return f", about {duration((self.total - self.done) / self.rate)} left"

    @property
    def text(self) -> str:
        return self.name if self.total is None else f"{self.name} ({self.counted}){self.left}"


class Progress:
    """The phases of one command.

    shown   whether anything is printed
    clock   seconds, from anywhere on
    stop    who listens for Ctrl-C and SIGTERM meanwhile; None where nobody does

    The methods may be called from any thread. `advance`, `reached` and `rows` count in the innermost phase, and raise
    where somebody asked to stop.
    """

    def __init__(self, shown: bool = True, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.shown, self.clock = shown, clock
        self.watched = shown and is_watched()
        self.stop: Stop | None = None
        self._phases: list[Phase] = []

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "tokens", done: int = 0) -> Iterator[Phase]:
        """A phase, for as long as the block takes; total: how many units it has, None where that is not known."""
        bar = None
        if self.watched:
            form = "{desc}  {elapsed}" if total is None else "{desc} |{bar:24}| {elapsed}{postfix}"
            bar = tqdm(total=total, initial=done, bar_format=form, leave=not self._phases, dynamic_ncols=True)
        one = Phase(name, total, unit, done, self.clock() + LINE_SECONDS, bar)
        self._phases.append(one)
        if bar is not None:
            bar.set_description_str(one.text)
        elif self.shown:
            print(printable(one.text), file=sys.stderr, flush=True)
        try:
            yield one
            if bar is not None:
                self.draw(one)
            self.check()
        finally:
            self._phases.remove(one)
            if bar is not None:
                bar.close()

    def each(
        self, items: Iterable[T], name: str, unit: str, total: int | None = None, size: Callable[[T], int] = lambda _: 1
    ) -> Iterator[T]:
        """The items, counted as they are done with, in a phase; total: where they have no length."""
        with self.phase(name, len(items) if total is None and isinstance(items, Sized) else total, unit):
            for item in items:
                yield item
                self.advance(size(item))

    def advance(self, n: float = 1) -> None:
        """So many more units of the innermost phase are done."""
        if self._phases:
            self._move(self._phases[-1], self._phases[-1].done + n)
        self.check()

    def reached(self, done: float, unit: str = "tokens") -> None:
        """So many units of the innermost phase are done, if it counts such units."""
        if self._phases and self._phases[-1].unit == unit:
            self._move(self._phases[-1], max(done, self._phases[-1].done))
        self.check()

    def rows(self, n: int) -> None:
        """A model made the activations of so many more tokens, whatever for."""
        if self._phases and self._phases[-1].unit == "tokens":
            self._move(self._phases[-1], self._phases[-1].done + n)
        if self.stop is not None:
            self.stop.check(reading=True)

    def check(self) -> None:
        """Raises what a signal asked for where nothing is left to save."""
        if self.stop is not None:
            self.stop.check()

    def note(self, text: str) -> None:
        """A line of its own, above the bars."""
        if self.watched:
            tqdm.write(printable(text, keep="\n"), file=sys.stderr)
        elif self.shown:
            print(printable(text, keep="\n"), file=sys.stderr, flush=True)

    def due(self, phase: Phase) -> bool:
        """Whether it is time for the phase's next line; if so, its rate is taken."""
        if (now := self.clock()) < phase.next_line:
            return False
        phase.next_line = now + (BAR_SECONDS if self.watched else LINE_SECONDS)
        phase.mark(now)
        return True

    def _move(self, phase: Phase, done: float) -> None:
        phase.done = done if phase.total is None else min(done, phase.total)
        if not self.shown or (phase.unit == "steps" and phase.bar is None):  # training has plain lines of its own
            return
        if not self.due(phase):
            return
        if phase.bar is not None:
            self.draw(phase)
        else:
            print(printable(phase.text), file=sys.stderr, flush=True)

    def draw(self, phase: Phase) -> None:
        """Bring a phase's bar up to date."""
        phase.bar.n = phase.done
        phase.bar.set_description_str(phase.text)


SILENT = Progress(shown=False)
"""For whoever wants to hear nothing."""
