"""Why ranks stopped: one sentence, said once, that names the rank and the cause.

A rank that fails leaves its sentence in torchrun's store. The others notice by a collective that breaks (at once where
a process died, after `timeout` seconds where it hangs) and look there; a rank that left nothing and does not answer is
named as lost.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cosae.errors import CosaeError

ANSWER_SECONDS = 5.0
"""How long the others have to say that they are alive, or what stopped them."""


class Faults:
    """What ranks leave in the store for each other when something breaks."""

    def __init__(self, store: Any, rank: int, n: int, timeout: float) -> None:
        self.store, self.rank, self.n, self.timeout = store, rank, n, timeout

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around a collective: what breaks it becomes a CosaeError that names rank and cause."""
        try:
            yield
        except RuntimeError as error:
            raise CosaeError(self.cause(error)) from None

    def leave(self, sentence: str) -> None:
        """Say what stopped this rank."""
        with suppress(Exception):  # the store may be gone with torchrun
            self.store.set(f"fault/{self.rank}", sentence)

    def speaks(self) -> bool:
        """Whether nobody said yet why the run stopped; True to one rank."""
        try:
            return int(self.store.add("said", 1)) == 1
        except Exception:  # the store is gone with torchrun
            return True

    def cause(self, error: Exception) -> str:
        """Which rank stopped, and why, as far as it can be known within ANSWER_SECONDS."""
        with suppress(Exception):
            self.store.set(f"alive/{self.rank}", "1")
            others = [rank for rank in range(self.n) if rank != self.rank]
            end, lost = time.monotonic() + ANSWER_SECONDS, others
            while lost and time.monotonic() < end:
                for rank in others:
                    if self.store.check([f"fault/{rank}"]):
                        return f"rank {rank} of {self.n}: {self.store.get(f'fault/{rank}').decode()}"
                lost = [rank for rank in others if not self.store.check([f"alive/{rank}"])]
                time.sleep(0.05)
            if lost:
                slow = "imed out" in str(error)
                what = f"did not answer within {self.timeout:g} s" if slow else "ended without a word: it was killed"
                names = ", ".join(map(str, lost))
                return f"rank {names} of {self.n} {what}. The run goes on from its last checkpoint with `cosae resume`."
        return f"rank {self.rank} of {self.n} lost the others ({str(error).splitlines()[0][:200]})."
