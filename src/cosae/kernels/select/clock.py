"""What a few calls take on this machine: timed once, and remembered by processor, torch version and threads.

A processor flag does not say what is fast; a clock does. The file lies in the user's cache directory and is worth
nothing but time: what cannot be read is timed again, what cannot be written is timed in the next process.
"""

from __future__ import annotations

import json
import math
import platform
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch

from cosae.errors import CosaeError
from cosae.io.atomic import write_text
from cosae.io.fetched.cache import cache_folder
from cosae.io.untrusted import read_json

ROUNDS = 3
"""Calls of each contestant, one of each a round after a first that is not counted; the shortest is taken."""
HOPELESS = 3.0
"""A contestant that took so many times what the fastest did is not called again."""


def default_file() -> Path:
    """Where the choices are remembered."""
    return cache_folder() / "kernels.json"


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's name, and a digest-like word of its vector units where Linux lists them."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        named = re.search(r"^model name.*?:(.*)", text, re.MULTILINE)
        flags = re.search(r"^(?:flags|Features).*?:(.*)", text, re.MULTILINE)
        units = [f for f in (flags[1].split() if flags else ()) if re.match(r"avx|amx|sve|i8mm|bf16|asimd", f)]
        if named or units:
            return " ".join([named[1].strip() if named else platform.machine(), *units])
    return platform.processor() or platform.machine()


class Clock:
    """Seconds by contestant, for each key once a process.

    now   a clock, in seconds
    file  where they are remembered between processes; None remembers nothing
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter, file: Path | None = None) -> None:
        self.now, self.file = now, file
        self._known: dict[str, dict[str, float]] = {}
        self._lock = threading.Lock()  # who is timed beside another is timed wrong

    def seconds(self, key: str, contestants: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """The shortest call of each contestant that runs; one that raises RuntimeError or the like is left out."""
        machine = f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
        key = f"{machine}, {key}"
        with self._lock:
            if key not in self._known:
                found = _numbers(self._read().get(key), contestants)
                if found is None:
                    found = self._race(contestants)
                    self._write(key, found)
                self._known[key] = found
            return self._known[key]

    def _race(self, contestants: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        best: dict[str, float] = {}
        running = dict(contestants)
        for turn in range(ROUNDS + 1):
            for name, call in list(running.items()):
                begun = self.now()
                try:
                    call()
                except (RuntimeError, AttributeError, TypeError, NotImplementedError):
                    del running[name]
                    best.pop(name, None)
                    continue
                if turn > 0:
                    best[name] = min(best.get(name, math.inf), self.now() - begun)
            limit = HOPELESS * min(best.values(), default=math.inf)
            running = {name: call for name, call in running.items() if not best.get(name, 0.0) > limit}
        return best

    def _read(self) -> dict[str, object]:
        try:
            found = None if self.file is None else read_json(self.file)
        except (CosaeError, OSError):
            found = None
        return found if isinstance(found, dict) else {}

    def _write(self, key: str, found: dict[str, float]) -> None:
        if self.file is None or not found:
            return
        with suppress(OSError):  # a cache that cannot be written is none
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, json.dumps(self._read() | {key: found}, indent=1, sort_keys=True))


def _numbers(value: object, wanted: Mapping[str, object]) -> dict[str, float] | None:
    """A remembered answer, or None where it is none: some of the wanted names, each with seconds above 0."""
    if not isinstance(value, dict) or not value or not set(value) <= set(wanted):
        return None
    sound = all(type(x) in (int, float) and math.isfinite(x) and x > 0 for x in value.values())
    return {name: float(x) for name, x in value.items()} if sound else None
