"""One contestant in a process of its own, so that its memory is its own: started by `benchmarks.step`.

python -m benchmarks.worker '{"who": …, "threads": …}'   and lines on standard input, each answered by a line of JSON:
check D M K N    what is wrong with this path at that shape, or null (cosae only)
build D M K N    start afresh at that shape
step             one step: seconds, pages mapped, the peak of memory since `build`, and the screen it took (cosae only)

Whatever else a library prints goes to standard error.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from benchmarks.shapes import Shape, draw_batches


def private_output() -> TextIO:
    """Standard output for answers alone: file descriptor 1 becomes standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def memory_kib(key: str) -> int:
    """VmRSS (now) or VmHWM (most so far) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def forget_peak() -> None:
    """Let VmHWM start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def make(job: dict[str, Any], shape: Shape, batches: list[Tensor]) -> Callable[[Tensor], str | None]:
    """The contestant's step; its libraries are imported here."""
    kind, *rest = job["who"]
    if kind == "peer":
        from benchmarks.peer_steps import PEERS

        return PEERS[rest[0]](shape)
    from benchmarks import cosae_steps

    if kind == "floor":
        return cosae_steps.make_floor(shape) if rest[0] == "all" else cosae_steps.make_product(shape)
    return cosae_steps.make_step(rest[0], rest[1], shape, batches[0])


def warm_up(job: dict[str, Any]) -> None:
    """Two tiny steps: what libraries load and compile on first use is not counted as the step's memory."""
    tiny = Shape(16, 64, 4, 32)
    batches = draw_batches(tiny, 2)
    step = make(job, tiny, batches)
    for x_ND in batches:
        step(x_ND)


def timed(step: Callable[[Tensor], str | None], x_ND: Tensor) -> dict[str, Any]:
    """One step, and what it took."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    wall, cpu = time.perf_counter(), time.process_time()
    screen = step(x_ND)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "wall": wall,
        "cpu": cpu,
        "screen": screen,
        "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults,
    }


def main() -> None:
    answers = private_output()
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    batches: list[Tensor] = []
    step: Callable[[Tensor], str | None] | None = None
    before = count = 0
    for line in sys.stdin:
        word, *numbers = line.split()
        answer: dict[str, Any] = {}
        if word == "check":
            from benchmarks.cosae_steps import find_fault

            shape = Shape(*map(int, numbers))
            answer["fault"] = find_fault(job["who"][1], job["who"][2], shape, draw_batches(shape, 1)[0])
        elif word == "build":
            step = None
            warm_up(job)
            shape, count = Shape(*map(int, numbers)), 0
            batches = draw_batches(shape)
            gc.collect()
            forget_peak()
            before = memory_kib("VmRSS")
            step = make(job, shape, batches)
        else:
            assert step is not None
            answer = timed(step, batches[count % len(batches)])
            answer["peak_mib"] = (memory_kib("VmHWM") - before) / 1024
            count += 1
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
