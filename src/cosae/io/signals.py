"""Ctrl-C and SIGTERM: asked once, a run saves and stops; asked again by Ctrl-C, it stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and has saved; `step` steps are done."""

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted after step {step}")
        self.step = step


class Stop:
    """Whether somebody asked to stop.

    asked    set by the first signal; read between steps
    at_once  what the next signal raises right away, once nothing is left to save; None while there is
    """

    def __init__(self, loud: bool = False) -> None:
        self.asked = False
        self.at_once: KeyboardInterrupt | None = None
        self._loud = loud

    def ask(self, signum: int, frame: FrameType | None) -> None:
        """The handler of both signals."""
        if self.at_once is not None:
            raise self.at_once
        if self.asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked and self._loud:
            with suppress(OSError, RuntimeError):  # a signal may come in the middle of another line
                print("\nstopping after this step, to save; Ctrl-C again stops at once", file=sys.stderr, flush=True)
        self.asked = True


@contextmanager
def stop_on_signals(loud: bool = False) -> Iterator[Stop]:
    """Listen for SIGINT and SIGTERM; outside the main thread, where that cannot be, for nothing."""
    stop = Stop(loud)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {s: signal.signal(s, stop.ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
