"""Ctrl-C and SIGTERM: asked once, a run saves and stops; asked again by Ctrl-C, it stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and has saved; `step` steps are done."""

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted after step {step}")
        self.step = step


class StopAsked(KeyboardInterrupt):
    """Somebody asked to stop while data were being read; whoever has something to save does so first."""


class Stop:
    """Whether somebody asked to stop.

    asked    set by the first signal; read between steps
    at_once  what a signal raises right away, while nothing is left to save; None while there is
    """

    def __init__(self, loud: bool = False, at_once: KeyboardInterrupt | None = None) -> None:
        self.asked = False
        self.at_once = at_once
        self._loud = loud

    def ask(self, signum: int, frame: FrameType | None) -> None:
        """The handler of both signals."""
        before, self.asked = self.asked, True
        if self.at_once is not None:
            raise self.at_once
        if before and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if not before and self._loud:
            with suppress(OSError, RuntimeError):  # a signal may come in the middle of another line
                print("\nstopping after this step, to save; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def check(self, reading: bool = False) -> None:
        """Raise what was asked for, in any thread: while there is something to save, only where data are `reading`.

        What the handler raises can be lost on its way, in a destructor of another library.
        """
        if self.asked and self.at_once is not None:
            raise self.at_once
        if self.asked and reading:
            raise StopAsked


@contextmanager
def stop_on_signals(loud: bool = False, at_once: KeyboardInterrupt | None = None) -> Iterator[Stop]:
    """Listen for SIGINT and SIGTERM; outside the main thread, where that cannot be, for nothing."""
    stop = Stop(loud, at_once)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {s: signal.signal(s, stop.ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def within_reach(call: Callable[[], T]) -> T:
    """What `call` gives, made in a thread of its own: a signal would wait for the end of a long call into C."""
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, name="cosae computes", daemon=True).start()
    return answer.result()
