"""One writer a folder: a lock that goes with its process, however that ends."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cosae.errors import CosaeError
from cosae.io.atomic import written

LOCK = ".lock"


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """Make the folder `out` where there is none, and be the only one that writes a run or a store there.

    Worker processes do not inherit the lock. File systems without locks get none. Raises CosaeError where another
    process (named), or this one, holds it already, and where the disk refuses.
    """
    place = out / LOCK
    with written(out, "choose another folder"):
        out.mkdir(parents=True, exist_ok=True)
        place.open("a").close()
    lock = FileLock(place, blocking=False, fallback_to_soft=False)
    with suppress(OSError):  # a file system without locks
        try:
            lock.acquire()
            place.write_text(f"{_this_process()}\n", encoding="utf-8")
        except Timeout:
            raise _held(out) from None
    try:
        yield
    finally:
        lock.release()


def _this_process() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _held(out: Path) -> CosaeError:
    holder = ""
    with suppress(OSError):  # some systems keep others from reading a locked file
        holder = (out / LOCK).read_text(encoding="utf-8").strip()
    if holder == _this_process():
        return CosaeError(f"{out} is being written by this very process: wait for it, or choose another folder.")
    return CosaeError(f"{out} is being written by another process ({holder or 'unknown'}): wait for it or stop it.")
