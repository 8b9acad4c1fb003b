"""Loops over active entries, compiled by numba where it is installed (`pip install cosae[fast]`).

Nothing here defines a result: every loop has a plain PyTorch twin in `sums` or `search`, which serves where numba
is missing. Loops take numpy views of fp32 tensors and a (part, n_parts) pair; parts are contiguous ranges, each
output row is summed by one part in a fixed order, so results do not depend on the number of threads.

Threads are torch's number (`torch.get_num_threads`), run by a pool of plain Python threads over loops that release
the interpreter lock. numba's own `prange` was measured 2–8 times slower between torch products (its OpenMP pool
spins against torch's), and its work-queue layer aborts the process when two threads enter it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from importlib import import_module
from typing import Any, TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")
_log = logging.getLogger(__name__)

AVAILABLE = importlib.util.find_spec("numba") is not None and os.environ.get("COSAE_NATIVE", "1") != "0"
"""True where numba is installed; the environment variable COSAE_NATIVE=0 turns the compiled loops off."""

SMALL_WORK = 1 << 20
"""Multiply-adds below which waking a second thread costs more than it saves."""


@lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:
    return pool_of(max(1, os.cpu_count() or 1), 1)


def pool_of(n: int, each: int) -> ThreadPoolExecutor:
    """A pool of n threads, each with so many of torch's own; the caller keeps its number.

    torch keeps the number both by thread and, for threads that have not asked yet, for all of the process.
    """
    own, started = torch.get_num_threads(), threading.Barrier(n)

    def start() -> None:
        torch.get_num_threads()  # a thread that never asked takes the process's number at its first call
        torch.set_num_threads(each)
        started.wait()

    pool = ThreadPoolExecutor(n, thread_name_prefix="cosae")
    try:
        wait([pool.submit(start) for _ in range(n)])
    finally:
        torch.set_num_threads(own)
    return pool


def parts_for(work: int, pieces: int = 1) -> int:
    """How many parts a loop of `work` multiply-adds is cut into: `pieces` for each thread."""
    return 1 if work < SMALL_WORK else pieces * torch.get_num_threads()


def run_parts(loop: Callable[..., Any], n_parts: int, *arguments: Any) -> list[Any]:
    """loop(part, n_parts, *arguments) for every part; results by part.

    The calling thread and as many others as torch's number allows take one part after the other, so that one which is
    held up leaves its share to the rest.
    """
    if n_parts <= 1:
        return [loop(0, 1, *arguments)]
    return _share_out(loop, n_parts, arguments, join=True)


def run_single(call: Callable[..., Any], n_parts: int, *arguments: Any) -> list[Any]:
    """`run_parts` for what calls torch: each part has one thread of torch's, whoever runs it."""
    if torch.get_num_threads() == 1:
        return [call(part, n_parts, *arguments) for part in range(n_parts)]
    return _share_out(call, n_parts, arguments, join=False)


def each(call: Callable[[T], U], items: Sequence[T]) -> list[U]:
    """call(item) of every item, by `run_single`."""
    return run_single(lambda part, _: call(items[part]), len(items))


def _share_out(loop: Callable[..., Any], n_parts: int, arguments: tuple[Any, ...], *, join: bool) -> list[Any]:
    """Parts taken one after the other by as many threads as torch has, the calling one among them if it may `join`."""
    parts, results = deque(range(n_parts)), [None] * n_parts  # a shared iterator is not safe without Python's lock

    def work() -> None:
        while True:
            try:
                part = parts.popleft()
            except IndexError:
                return
            results[part] = loop(part, n_parts, *arguments)

    others = min(n_parts, torch.get_num_threads()) - join
    waiting = [_pool(os.getpid()).submit(work) for _ in range(others)]
    try:
        if join:
            work()
    finally:
        wait(waiting)
    for future in waiting:
        future.result()
    return results


@lru_cache(maxsize=1)
def _import_loops() -> dict[str, Any] | None:
    """Modules of compiled loops by name (compiled or read from numba's cache on first call), or None, said once."""
    try:
        return {name: import_module(f"cosae.kernels.cpu.loops.{name}") for name in ("search", "sums", "adam", "pairs")}
    except Exception as fault:  # numba refuses some versions of numpy, and breaks in ways of its own
        _log.warning("kernels: plain PyTorch serves, because numba cannot be used (%s)", fault)
        return None


def serves() -> bool:
    """Whether compiled loops are to be had here."""
    return AVAILABLE and _import_loops() is not None


def loops(name: str) -> Any:
    """The compiled loops of the search, the sums over entries ("sums"), the optimiser ("adam") or
    pairs of features ("pairs"); where `serves`."""
    modules = _import_loops()
    assert modules is not None
    return modules[name]
