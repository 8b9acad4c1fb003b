"""Contestants in processes of their own, one step each a round: what they took, and the memory they needed."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.shapes import Shape
from benchmarks.timing import median_ratio, turned

ROOT = Path(__file__).parents[1]
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}
"""glibc keeps freed blocks of any size in the process."""


@dataclass(frozen=True)
class Contestant:
    """Who runs: ("cosae", score, path), ("peer", name) or ("floor", part); `rounds` None takes part in all."""

    name: str
    who: tuple[str, ...]
    python: str = sys.executable
    rounds: int | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Plain torch is the path where numba is not used; a floor never pays for fresh memory.

        cosae's threads wait as `import cosae` lets them wait where it comes before torch, as its command line does.
        """
        if self.who[0] == "peer":
            return {}
        own = KEPT if self.who[0] == "floor" else {}
        native = {"COSAE_NATIVE": "0"} if "plain torch" in self.who else {}
        return {"OMP_WAIT_POLICY": "PASSIVE", **own, **native}


@dataclass
class Result:
    """Seconds of each timed step; MiB above what was resident before anything was built; pages mapped a step; the
    screen it took."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)
    peak_mib: float = 0.0
    screen: str | None = None

    def seconds(self, clock: str) -> list[float]:
        return self.wall if clock == "wall" else self.cpu


class BrokenError(RuntimeError):
    """A contestant's process ended before its time."""


class Worker:
    """A process of `benchmarks.worker`."""

    def __init__(self, one: Contestant, threads: int, keep: bool) -> None:
        self.one = one
        path = [str(ROOT)] if one.who[0] == "peer" else [str(ROOT), os.environ.get("PYTHONPATH", "")]
        own = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": str(threads), **one.environment}
        outer = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        self.process = subprocess.Popen(
            [one.python, "-m", "benchmarks.worker", json.dumps({"who": one.who, "threads": threads})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**outer, **own, **(KEPT if keep else {})},
        )

    def tell(self, word: str, shape: Shape | None = None) -> None:
        """Send one line of work."""
        assert self.process.stdin is not None
        numbers = "" if shape is None else f" {shape.d} {shape.m} {shape.k} {shape.n}"
        try:
            self.process.stdin.write(word + numbers + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise BrokenError(f"{self.one.name}: its process has ended") from None

    def hear(self) -> dict[str, Any]:
        """Wait for the answer. Raises BrokenError."""
        assert self.process.stdout is not None
        reply = self.process.stdout.readline()
        if not reply:
            raise BrokenError(f"{self.one.name}: its process ended (code {self.process.wait()})")
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def end(self) -> None:
        """Close its input and wait; kill it where it does not go."""
        try:
            self.process.communicate(timeout=10)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.process.kill()
            self.process.wait()


@contextmanager
def started(contestants: Sequence[Contestant], threads: int, keep: bool) -> Iterator[dict[str, Worker]]:
    """A process for each, ended when the block ends."""
    workers = {one.name: Worker(one, threads, keep) for one in contestants}
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.end()


def find_faults(workers: dict[str, Worker], shape: Shape) -> list[str]:
    """What is wrong with cosae's paths at this shape, one sentence each; the definition itself is not asked."""
    faults = []
    for name, worker in workers.items():
        if worker.one.who[0] == "cosae" and "reference" not in worker.one.who:
            worker.tell("check", shape)
            fault = worker.hear()["fault"]
            faults += [f"{name}: {fault}"] if fault else []
    return faults


def race(workers: dict[str, Worker], shape: Shape, rounds: int, warmup: int = 2) -> dict[str, Result]:
    """One step of every contestant a round, in turning order; by name. Those done with their rounds are ended."""
    results = {name: Result() for name in workers}
    for worker in workers.values():
        worker.tell("build", shape)
        worker.hear()
    for turn in range(warmup + rounds):
        for name in turned(list(workers), turn):
            workers[name].tell("step")
            answer, result = workers[name].hear(), results[name]
            result.peak_mib, result.screen = answer["peak_mib"], answer["screen"]
            if turn >= warmup:
                result.wall.append(answer["wall"])
                result.cpu.append(answer["cpu"])
                result.faults.append(answer["faults"])
        for name in [name for name, worker in workers.items() if worker.one.rounds == turn + 1 - warmup]:
            workers.pop(name).end()
    return results


def best_peer(contestants: Sequence[Contestant], results: dict[str, Result], clock: str) -> str | None:
    """The peer with the smallest median, or None where none ran."""
    names = [one.name for one in contestants if one.who[0] == "peer"]
    return min(names, key=lambda name: statistics.median(results[name].seconds(clock)), default=None)


def ratio(results: dict[str, Result], above: str, below: str, clock: str) -> float:
    """Median over rounds of one's seconds over another's."""
    return median_ratio(results[above].seconds(clock), results[below].seconds(clock))
