"""Interleaved timing: every contestant runs in every round, so that a busy machine is busy for all of them."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from cosae.kernels import describe

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""cpu: seconds of processor time of all threads; on a machine shared with others the steadier of the two."""


def interleave(
    contestants: Mapping[str, Callable[[], object]], rounds: int, clock: str = "wall", warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, by contestant, `rounds` of them; the order turns by one each round."""
    now = CLOCKS[clock]
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        for step in range(len(names)):
            name = names[(turn + step) % len(names)]
            begin = now()
            contestants[name]()
            if turn >= warmup:
                seconds[name].append(now() - begin)
    return seconds


def median_ratio(seconds: list[float], base: list[float]) -> float:
    """Median over rounds of the ratio within the round: what a slow drift of the machine cannot move."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


def describe_machine() -> str:
    """One line: processor, threads, torch, and the path the kernels take."""
    processor = platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, {describe()}"
