"""Training from a store against training from a tensor in memory: the same rows, the same steps, taken in turns.

    python -m benchmarks.store [--d 192] [--m 3072] [--k 32] [--tokens 262144] [--dtype bfloat16] [--rounds 8]

A round trains one arm for `--steps` steps from each source, reading included; the ratio is the median over rounds.
"data" is the stream alone, without any training. Before anything is timed the rows of the store are compared with
those of the tensor; where they differ nothing is reported.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from benchmarks.timing import CLOCKS, describe_machine, interleave, median_ratio
from cosae.activations.arrays import TensorSource
from cosae.activations.filter import FilterPolicy
from cosae.activations.store.format import restore_rows, round_rows
from cosae.activations.store.reader import Store
from cosae.activations.store.shards import ShardRows
from cosae.activations.store.source import StoreSource
from cosae.activations.store.writer import StoreWriter
from cosae.activations.stream import ActivationStream, Source
from cosae.activations.synthetic import SyntheticSource, World
from cosae.kernels import keep_memory
from cosae.train.arm import parse_arm
from cosae.train.step import ArmState, OptimizerConfig, train_step
from cosae.types import Activations


def write(folder: Path, x_ND: torch.Tensor, dtype: str, shard_tokens: int) -> Store:
    """A store with these rows as its train side."""
    writer = StoreWriter(
        folder, {"corpus": "benchmark"}, {}, d_in=x_ND.shape[1], dtype=dtype, shard_tokens=shard_tokens
    )
    writer.append("train", 0, ShardRows(Activations.bare(x_ND)))
    writer.finish({"train": [], "held_out": []})
    return Store(folder)


def find_fault(store: Store, source: StoreSource, x_ND: torch.Tensor, dtype: str) -> str | None:
    """What keeps the benchmark from being reported."""
    wanted = restore_rows(*round_rows(x_ND, dtype))
    if not torch.equal(store.take("train", torch.arange(len(x_ND))).x_ND, wanted):
        return "rows of the store are not those that were written"
    epoch = Activations.cat(list(islice(source.chunks(), source.chunks_per_epoch)))
    if not torch.equal(epoch.x_ND.float().sum(1).sort().values, wanted.float().sum(1).sort().values):
        return "an epoch is not every row once"
    return None


def stream_of(source: Source, batch: int) -> ActivationStream:
    policy = FilterPolicy(kind="none", window_tokens=4096)
    return ActivationStream(source, batch_tokens=batch, buffer_tokens=131072, seed=0, filter=policy)


def train(state: ArmState, stream: ActivationStream, steps: int, count: list[int]) -> None:
    for _ in range(steps):
        train_step(state, stream.next_batch().x_ND, count[0], 1.0, 10**12)
        count[0] += 1


def read(stream: ActivationStream, steps: int) -> None:
    for _ in range(steps):
        stream.next_batch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("d", 192), ("m", 3072), ("k", 32), ("tokens", 262144), ("batch", 1024), ("steps", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32", "int8"])
    parser.add_argument("--shard-tokens", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    keep_memory()
    print(describe_machine())
    world = SyntheticSource(World(d_in=args.d, n_features=4 * args.d, l0=8))
    x_ND = world.sample(args.tokens)[0].x_ND
    sound = True
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory() as temporary:
            store = write(Path(temporary) / "store", x_ND, dtype, args.shard_tokens)
            source = StoreSource(store)
            if fault := find_fault(store, source, x_ND, dtype):
                print(f"{dtype}: not reported, {fault}")
                sound = False
                continue
            time_one(dtype, source, TensorSource(x_ND, held_out_frac=1e-6), args)
    if not sound:
        sys.exit(1)


def time_one(dtype: str, source: StoreSource, memory: TensorSource, args: argparse.Namespace) -> None:
    contestants: dict[str, Callable[[], object]] = {}
    for name, one in (("memory", memory), ("store", source)):
        stream = stream_of(one, args.batch)
        arm = parse_arm(f"cosine,d_sae={args.m},k={args.k},seed=0")
        sae = arm.build(args.d, stream.sample_ND, "cpu")
        state = ArmState.start(arm, sae, stream.norm_summary.total_variance, OptimizerConfig())
        contestants[f"train, {name}"] = partial(train, state, stream, args.steps, [0])
        contestants[f"data, {name}"] = partial(read, stream_of(one, args.batch), args.steps)
    seconds = interleave(contestants, args.rounds, args.clock)
    tokens = args.batch * args.steps
    for what in ("train", "data"):
        here, base = seconds[f"{what}, store"], seconds[f"{what}, memory"]
        speeds = [tokens / statistics.median(taken) for taken in (here, base)]
        print(
            f"{dtype:9} {what:5} store {speeds[0]:9.0f}  memory {speeds[1]:9.0f} tokens/s   "
            f"store / memory {1 / median_ratio(here, base):.3f} ({args.clock} time, d {args.d}, m {args.m}, k {args.k})"
        )


if __name__ == "__main__":
    main()
