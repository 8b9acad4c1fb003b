"""Interleaved timing: every contestant runs in every round, so that a busy machine is busy for all of them."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

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
        for name in turned(names, turn):
            begin = now()
            contestants[name]()
            if turn >= warmup:
                seconds[name].append(now() - begin)
    return seconds


def turned(names: Sequence[str], turn: int) -> list[str]:
    """The names, begun `turn` places later: so that none is always first."""
    return [names[(turn + place) % len(names)] for place in range(len(names))]


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds both took part in of the ratio within the round: what drift of the machine cannot move."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=False))


def describe_machine() -> str:
    """One line: processor, threads, torch, and the path the kernels take."""
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {describe()}"


def processor() -> str:
    """The processor's name, and which of its vector units matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        metadata = dict(line.split(":", 1) for line in lines if ":" in line)
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, value in metadata.items()}
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.machine())} ({', '.join(units)})"
