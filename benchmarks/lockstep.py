"""What arms in lockstep cost each other: `python -m benchmarks.lockstep`.

Time: one arm's step taken alone, and the same arm's step between those of the others, by turns; the batch's shared
facts are timed beside them. Two arms side by side, as `cosae.train` takes them, are timed against the same two in turn,
and must be the same to the bit. Memory: the peak of one process that trains n arms in turn, above what it held before
they were built; expected are n times an arm's parameters and moments, and one arm's work on top.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

import torch

from benchmarks.cosae_steps import LR, NEVER
from benchmarks.shapes import SHAPES, Shape, draw_batches
from benchmarks.timing import CLOCKS, describe_machine, interleave, median_ratio
from benchmarks.worker import forget_peak, memory_kib
from cosae.activations.digest import fingerprint
from cosae.kernels import Workspace, keep_memory
from cosae.sae.model import SAE
from cosae.train.arm import Arm
from cosae.train.side_by_side import SideBySide
from cosae.train.step import ArmState, Batch, OptimizerConfig, train_step
from cosae.types import Activations

SCORES = ("inner", "cosine", "cosine_per_feature", "inner_unit")


def start(score: str, shape: Shape, x_ND: torch.Tensor, workspace: Workspace) -> ArmState:
    """A fresh arm that steps in this memory."""
    sae = SAE.build(d_in=shape.d, d_sae=shape.m, score=score, k=shape.k, seed=0, sample=x_ND)
    arm = Arm.of(score, score, k=shape.k, seed=0)
    state = ArmState.start(arm, sae, float(x_ND.var(0).sum()), OptimizerConfig(lr=LR))
    state.cache.workspace = workspace
    return state


def time_company(shape: Shape, rounds: int, clock: str) -> None:
    """Print each arm's step in company over the same step alone."""
    x_ND = draw_batches(shape, 1)[0]
    workspace = Workspace()
    states = [start(score, shape, x_ND, workspace) for score in SCORES]
    batch, bare = Batch.of(x_ND), Activations.bare(x_ND)

    def step(state: ArmState) -> None:
        train_step(state, batch, 0, 1.0, NEVER)

    company = {state.arm.name: (lambda state=state: step(state)) for state in states}
    together = interleave(company, rounds, clock)
    metadata = interleave({"facts": lambda: (Batch.of(x_ND), fingerprint(bare))}, rounds, clock)["facts"]
    print(f"facts of the batch, once for all arms: {1e3 * statistics.median(metadata):.2f} ms ({clock})")
    for state in states:
        alone = interleave({"alone": lambda state=state: step(state)}, rounds, clock)["alone"]
        ms, ratio = 1e3 * statistics.median(together[state.arm.name]), median_ratio(together[state.arm.name], alone)
        print(f"{state.arm.name:20} {ms:8.1f} ms in company, {ratio:5.2f} × alone")


def time_side_by_side(shape: Shape, rounds: int) -> None:
    """Print what two arms side by side take over the same two in turn; raises where they are not the same arms."""
    x_ND = draw_batches(shape, 1)[0]
    batch = Batch.of(x_ND)
    pairs = {how: [start(score, shape, x_ND, Workspace()) for score in SCORES[:2]] for how in ("in turn", "beside")}

    def step(state: ArmState) -> None:
        train_step(state, batch, 0, 1.0, NEVER)

    def in_turn() -> None:
        for state in pairs["in turn"]:
            step(state)

    with SideBySide(pairs["beside"]) as side_by_side:
        if side_by_side.n < 2:
            print("two arms side by side: not timed, there is one thread")
            return
        contestants = {"in turn": in_turn, "beside": lambda: side_by_side.run(step, pairs["beside"])}
        taken = interleave(contestants, rounds, "wall")
    for one, other in zip(pairs["in turn"], pairs["beside"], strict=True):
        for name, value in one.tensors().items():
            assert torch.equal(value.nan_to_num(), other.tensors()[name].nan_to_num()), f"{name} differs"
    ms = {how: 1e3 * statistics.median(seconds) for how, seconds in taken.items()}
    ratio = median_ratio(taken["in turn"], taken["beside"])
    print(
        f"two arms, ms: {ms['in turn']:.1f} in turn, {ms['beside']:.1f} side by side: {ratio:.2f} × as fast, same bits"
    )


def measure_memory(shape: Shape, n_arms: int) -> dict[str, float]:
    """MiB: peak of n arms' steps, and what their parameters and moments take."""
    x_ND = draw_batches(shape, 1)[0]
    tiny = Shape(16, 64, 4, 32)
    train_step(start("cosine", tiny, draw_batches(tiny, 1)[0], Workspace()), draw_batches(tiny, 1)[0], 0, 1.0, NEVER)
    forget_peak()
    before = memory_kib("VmRSS")
    workspace = Workspace()
    states = [start(SCORES[i % len(SCORES)], shape, x_ND, workspace) for i in range(n_arms)]
    for _ in range(3):
        for state in states:
            train_step(state, Batch.of(x_ND), 0, 1.0, NEVER)
    state_bytes = sum(t.nbytes for state in states for t in state.tensors().values())
    return {"peak": (memory_kib("VmHWM") - before) / 1024, "states": state_bytes / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="A")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--memory-of", type=int, help="only print, as JSON, the memory that this many arms take")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    if args.memory_of:
        print(json.dumps(measure_memory(shape, args.memory_of)))
        return
    keep_memory()
    print(f"lockstep, {shape}; {describe_machine()}")
    time_company(shape, args.rounds, args.clock)
    time_side_by_side(shape, args.rounds)
    for n_arms in (1, 2, 4):
        command = [sys.executable, "-m", "benchmarks.lockstep", "--shape", args.shape, "--memory-of", str(n_arms)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        work = found["peak"] - found["states"]
        print(f"{n_arms} arms: peak {found['peak']:.0f} MiB = {found['states']:.0f} of states + {work:.0f} of work")


if __name__ == "__main__":
    main()
