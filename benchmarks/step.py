"""Whole training steps, tokens per second: `python -m benchmarks.step`.

cosae (loss, sparse gradients and optimiser of `cosae.train.step`; each path, inner and cosine score) against the
training steps of sae-lens, dictionary-learning and sparsify, and against the floor: one dense product, four gathers
of the active rows and one fused Adam pass, each by a bare torch call (`benchmarks.cosae_steps.make_floor`). Each runs
in a process of its own; one step each a round, so that all meet the same machine. Each shape is timed with the
allocator as it comes and with freed memory kept (for all). Before a shape is timed every path's selection and
gradients are compared with the dense definition; where they differ nothing is printed for it.

The peers need an environment of their own: `python benchmarks/peers.py` builds it.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from pathlib import Path

from benchmarks.peers import find_python
from benchmarks.race import BrokenError, Contestant, Result, Worker, best_peer, find_faults, race, ratio, started
from benchmarks.shapes import QUICK_SWEEPS, SHAPES, SWEEPS, Shape, swept
from benchmarks.timing import CLOCKS, describe_machine
from cosae.kernels.select.pick import exact_int8

PEER_NAMES = ("sae-lens BatchTopK", "dictionary-learning BatchTopK", "sparsify TopK, Adam")
SLOW_ROUNDS = 2
"""The dense definition and the dense peers take seconds a step: they run in the first rounds only."""
FLOORS = {"all": "floor, fp32", "product": "product, fp32"}
"""The whole lower bound of a step with an fp32 product, and this product alone."""
AS_IT_COMES, KEPT = "as it comes", "keeping memory"


def paths(wanted: list[str] | None) -> list[str]:
    """What the clock takes, the formats it chose from, plain torch and the definition; or those asked for."""
    if wanted is not None:
        return wanted
    numba = importlib.util.find_spec("numba") is not None
    screens = ["fp32", "bf16", *(["int8"] if exact_int8(64) else [])]
    ours = ["numba", *(f"numba, {name} screen" for name in screens)] if numba else []
    return [*ours, "plain torch", "reference"]


def line_up(scores: list[str], chosen: list[str], peers: list[str], python: str | None) -> list[Contestant]:
    """Everybody who runs in one race."""
    ours = [
        Contestant(
            f"cosae {score}, {path}", ("cosae", score, path), rounds=SLOW_ROUNDS if path == "reference" else None
        )
        for path in chosen
        for score in scores
    ]
    dense = PEER_NAMES[:2]
    theirs = [
        Contestant(name, ("peer", name), python, rounds=SLOW_ROUNDS if name in dense else None)
        for name in peers
        if python is not None
    ]
    return [*ours, *theirs, *(Contestant(name, ("floor", part)) for part, name in FLOORS.items())]


def table(contestants: list[Contestant], shape: Shape, results: dict[str, Result], clock: str) -> list[str]:
    """One line for each contestant: time, speed, ratios, memory."""
    best = best_peer(contestants, results, clock)
    floors = [name for name in FLOORS.values() if name in results]
    against = ([best] if best else []) + [n for n in PEER_NAMES[:1] if n in results and n != best]
    heads = [f"÷ {name}" for name in against] + [f"× {name}" for name in floors]
    head = ["", f"ms ({clock})", "tokens/s", *heads, "peak MiB", "pages mapped"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in contestants:
        result = results[one.name]
        middle = statistics.median(result.seconds(clock))
        faster = [f"{1 / ratio(results, one.name, name, clock):.2f}" for name in against]
        slower = [f"{ratio(results, one.name, name, clock):.2f}" for name in floors]
        cells = [one.name, f"{1e3 * middle:.0f}", f"{shape.n / middle:.0f}", *faster, *slower]
        cells += [f"{result.peak_mib:.0f}", f"{statistics.median(result.faults):.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def time_shape(label: str, contestants: list[Contestant], args: argparse.Namespace) -> bool:
    """Print one shape's tables; False where they may not be printed."""
    shape = SHAPES[label]
    ours = [one for one in contestants if one.who[0] == "cosae" and "reference" not in one.who]
    with started(ours, args.threads, keep=True) as workers:
        faults = find_faults(workers, shape)
    if faults:
        print(f"\nshape {label}: not reported: " + "; ".join(faults), flush=True)
        return False
    for memory in args.memory:
        with started(contestants, args.threads, keep=memory == KEPT) as workers:
            results = race(workers, shape, args.rounds)
        print(f"\n**Shape {label}** ({shape}), allocator {memory}, {args.rounds} rounds\n")
        print("\n".join(table(contestants, shape, results, args.clock)) + "\n")
        for one in contestants:
            if one.who[-1] in ("numba", "plain torch"):
                print(f"{one.name}: {results[one.name].screen}")
        for path in paths(args.paths):
            pair = [f"cosae {score}, {path}" for score in ("cosine", "inner")]
            if all(name in results for name in pair):
                print(f"cosine over inner, {path}: {ratio(results, *pair, args.clock):.3f}")
        sys.stdout.flush()
    return True


def time_sweep(name: str, workers: dict[str, Worker], args: argparse.Namespace) -> bool:
    """Print one sweep's table, milliseconds a step by value; False where a check failed."""
    values = (QUICK_SWEEPS if args.quick else SWEEPS)[name]
    columns: list[dict[str, Result]] = []
    for value in values:
        shape = swept(name, value, args.quick)
        faults = find_faults(workers, shape)
        if faults:
            print(f"\nsweep over {name}: not reported at {value}: " + "; ".join(faults), flush=True)
            return False
        columns.append(race(workers, shape, args.sweep_rounds))
    print(f"\n**Sweep over {name}** from {swept(name, values[0], args.quick)}, ms a step ({args.clock}), {KEPT}\n")
    print("| | " + " | ".join(f"{name} {value}" for value in values) + " |")
    print("|" + "---|" * (len(values) + 1))
    for one in workers:
        cells = [f"{1e3 * statistics.median(c[one].seconds(args.clock)):.1f}" for c in columns]
        print(f"| {one} | " + " | ".join(cells) + " |", flush=True)
    return True


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; `--quick` is a small sanity run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, help="default: A B")
    parser.add_argument("--sweeps", nargs="*", choices=SWEEPS, default=[], help="numbers to sweep; default: none")
    parser.add_argument("--scores", nargs="+", default=["inner", "cosine"])
    parser.add_argument("--paths", nargs="+", help="default: every path of this machine")
    parser.add_argument("--peers", nargs="+", choices=[*PEER_NAMES, "none"], help="default: all")
    parser.add_argument("--peers-python", help="interpreter of the peers' environment; default: peers.py's own")
    parser.add_argument("--memory", nargs="+", choices=[AS_IT_COMES, KEPT], default=[AS_IT_COMES, KEPT])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sweep-rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds: does it all run?")
    args = parser.parse_args(argv)
    if args.shapes is None:
        args.shapes = ["quick"] if args.quick else ["A", "B"]
    if args.quick:
        args.rounds, args.sweep_rounds = min(args.rounds, 3), min(args.sweep_rounds, 2)
    return args


def find_peers(args: argparse.Namespace) -> tuple[list[str], str | None]:
    """Which peers run and by what interpreter; ends the program where they are wanted and not there."""
    if args.peers == ["none"]:
        return [], None
    python = args.peers_python or find_python()
    if python is None or not Path(python).is_file():
        sys.exit("the peers' environment is not there: build it with `python benchmarks/peers.py`, or say --peers none")
    return list(args.peers or PEER_NAMES), str(python)


def main() -> None:
    args = parse()
    peers, python = find_peers(args)
    contestants = line_up(args.scores, paths(args.paths), peers, python)
    print(f"{describe_machine().replace(' threads', ' threads here')}; {args.threads} threads a contestant")
    sweepers = [one for one in contestants if "reference" not in one.who and "plain torch" not in one.who]
    try:
        fine = [time_shape(label, contestants, args) for label in args.shapes]
        if args.sweeps:
            with started(sweepers, args.threads, keep=True) as workers:
                fine += [time_sweep(name, workers, args) for name in args.sweeps]
    except BrokenError as fault:
        sys.exit(f"not reported: {fault}")
    if not all(fine):
        sys.exit(1)


if __name__ == "__main__":
    main()
