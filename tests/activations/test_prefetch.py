"""Reading ahead: the same items, the same error at the same place, and no thread left over."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from cosae.activations.prefetch import Prefetcher
from cosae.errors import CosaeError


def wait_for(condition: object, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.01)
    return False


def alone() -> bool:
    return not any(thread.name == "cosae prefetches" for thread in threading.enumerate())


def test_items_come_in_order_and_end() -> None:
    assert list(Prefetcher(iter(range(50)), 3)) == list(range(50))
    assert wait_for(alone)
    ended = Prefetcher(iter(()), 1)
    for _ in range(2):
        assert next(ended, None) is None


def test_no_more_is_made_than_was_asked_for() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    ahead = Prefetcher(items(), 2)
    assert made == []  # nothing before the first is wanted
    next(ahead)
    assert wait_for(lambda: len(made) == 4)  # one taken, two waiting, one in hand
    time.sleep(0.3)
    assert len(made) == 4
    ahead.close()
    assert alone()


def test_an_error_comes_in_its_turn_and_again() -> None:
    closed: list[bool] = []

    def items() -> Iterator[int]:
        try:
            yield 1
            yield 2
            raise CosaeError("row 3 is broken")
        finally:
            closed.append(True)

    ahead = Prefetcher(items(), 5)
    assert [next(ahead), next(ahead)] == [1, 2]
    for _ in range(2):
        with pytest.raises(CosaeError, match="row 3 is broken"):
            next(ahead)
    assert closed == [True]
    assert wait_for(alone)


def test_it_ends_when_it_is_forgotten_or_closed() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 0

    forgotten = Prefetcher(endless(), 1)
    next(forgotten)
    del forgotten
    gc.collect()
    assert wait_for(alone)
    closed = Prefetcher(endless(), 1)
    next(closed)
    closed.close()
    closed.close()
    assert alone()
    with pytest.raises(StopIteration):
        next(closed)
    with pytest.raises(CosaeError, match="at least 1"):
        Prefetcher(endless(), 0)


def test_it_does_not_keep_a_program_from_ending() -> None:
    code = (
        "import itertools\nfrom cosae.activations.prefetch import Prefetcher\n"
        "kept = Prefetcher(itertools.count(), 2)\nnext(kept)\nraise KeyboardInterrupt"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip().endswith("KeyboardInterrupt")
