"""An iterator prefetched by a thread of its own: while one chunk is used, the next ones are made.

What comes out is what the iterator gives, in its order; what it raises is raised where it would have come.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from queue import Full, Queue
from typing import Any, Generic, TypeVar

from cosae.errors import check_least

T = TypeVar("T")
POLL_SECONDS = 0.1


class Prefetcher(Generic[T]):
    """`items`, up to `depth` of them made before they are asked for, and one more under way. The thread starts with the
    first `next`.

    It ends with the items, with `close`, when this object is collected, and when the program ends. While it runs,
    only it may touch `items`. Raises CosaeError for a depth below 1.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        check_least("the number of prefetched chunks", depth, 1)
        self._stop = threading.Event()
        self._made: Queue[tuple[T | None, BaseException | None]] = Queue(maxsize=depth)
        self._thread = threading.Thread(target=_make, args=(items, self._made, self._stop), name="cosae prefetches")
        self._started = False
        self._ended: BaseException | None = None
        weakref.finalize(self, self._stop.set)

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        if self._ended is not None:
            raise self._ended
        if not self._started:
            self._started = True
            self._thread.start()
        item, error = self._made.get()
        if error is not None:
            self._ended = error
            raise error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread once the item it is making is made; nothing more comes. May be called again."""
        self._stop.set()
        self._ended = self._ended or StopIteration()
        if self._thread.is_alive():
            self._thread.join()


def _make(items: Iterator[Any], made: Queue[Any], stop: threading.Event) -> None:
    """The thread: no reference to its `Prefetcher`, which must not be kept from being collected."""
    last: BaseException = StopIteration()
    try:
        for item in items:
            if not _put(made, (item, None), stop):
                return
    except BaseException as error:
        last = error
    finally:
        if close := getattr(items, "close", None):
            close()
    _put(made, (None, last), stop)


def _put(made: Queue[Any], item: Any, stop: threading.Event) -> bool:
    """Whether there was room before the end."""
    while not stop.is_set() and threading.main_thread().is_alive():
        try:
            made.put(item, timeout=POLL_SECONDS)
        except Full:
            continue
        return True
    return False
