"""What capturing ahead in a thread gains: `python -m benchmarks.overlap`.

The embedded model captures while `--arms` SAEs train on what it captured before. For each number of threads a process
takes turns, round by round, between capturing in step (ahead 0) and capturing ahead; each turn opens the stream anew,
fills its buffer, and times `--steps` steps. All turns must end with the same digest, or nothing is printed.

Tokens per second of the whole, by wall clock, and the median over rounds of the ratio to the fastest way without
reading ahead. On a machine that others use too, trust the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.timing import describe_machine, median_ratio
from cosae.activations.filter import FilterPolicy
from cosae.activations.stream import ActivationStream
from cosae.kernels import keep_memory
from cosae.models import embedded
from cosae.models.sources import ModelSource
from cosae.sae.model import SAE
from cosae.text.packing import sequences
from cosae.text.pylib import documents
from cosae.text.tokenization import tokenize_documents
from cosae.train.arm import Arm
from cosae.train.step import ArmState, OptimizerConfig, train_step

ROOT = Path(__file__).parents[1]
TOKENS, CHUNK, BUFFER, WINDOW = 1024, 16, 16_384, 4096


def make_source(n_steps: int) -> ModelSource:
    """The embedded model on as much of its corpus as is read."""
    model, tokenizer = embedded.load()
    n_tokens = 2 * BUFFER + TOKENS * n_steps
    tokens = tokenize_documents(documents("train"), tokenizer, add_bos=True, max_tokens=n_tokens)
    rows = sequences(tokens, 256, pad_id=tokenizer.pad_token_id)
    return ModelSource(model, rows, "resid_post.5", chunk_sequences=CHUNK, batch_sequences=CHUNK)


def start_arms(n_arms: int, stream: ActivationStream) -> list[ArmState]:
    """Cosine SAEs of the demo's shape, each with its own seed."""
    states = []
    for seed in range(n_arms):
        sample = stream.sample_ND
        sae = SAE.build(d_in=192, d_sae=3072, score="cosine", k=32, seed=seed, sample=sample)
        arm = Arm.of(name=f"arm-{seed}", score="cosine", k=32, seed=seed)
        states.append(ArmState.start(arm, sae, stream.norm_summary.total_variance, OptimizerConfig()))
    return states


def turn(source: ModelSource, ahead: int, n_arms: int, n_steps: int) -> tuple[float, str]:
    """Seconds of n_steps steps after two that are not timed, and the digest of all that was handed out."""
    policy = FilterPolicy(window_tokens=WINDOW)
    options = {"batch_tokens": TOKENS, "buffer_tokens": BUFFER, "seed": 0, "prefetch_chunks": ahead}
    stream = ActivationStream(source, filter=policy, **options)  # type: ignore[arg-type]
    try:
        states = start_arms(n_arms, stream)
        for step in range(n_steps + 2):
            if step == 2:
                begun = time.perf_counter()
            x_BD = stream.next_batch().x_ND
            for state in states:
                train_step(state, x_BD, step, 1.0, 10**12)
        return time.perf_counter() - begun, stream.digest
    finally:
        stream.close()


def work(args: argparse.Namespace) -> None:
    """A process with its number of threads: a line of JSON for each number of chunks that it reads."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    keep_memory()
    torch.set_num_threads(args.work)
    source = make_source(args.steps)
    for line in sys.stdin:
        answers.write(json.dumps(turn(source, int(line), args.arms, args.steps)) + "\n")
        answers.flush()


def start_worker(threads: int, args: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.overlap", "--work", str(threads), "--arms", str(args.arms)]
    return subprocess.Popen(
        [*command, "--steps", str(args.steps)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("arms", 4), ("steps", 32), ("ahead", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        work(args)
        return
    ways = [(threads, ahead) for threads in args.threads for ahead in (0, args.ahead)]
    workers = {threads: start_worker(threads, args) for threads in args.threads}
    seconds: dict[tuple[int, int], list[float]] = {way: [] for way in ways}
    digests: dict[int, set[str]] = {threads: set() for threads in args.threads}
    for round_ in range(args.rounds + 1):  # the first warms up
        for i in range(len(ways)):
            threads, ahead = ways[(round_ + i) % len(ways)]
            pipes = workers[threads]
            assert pipes.stdin is not None
            assert pipes.stdout is not None
            pipes.stdin.write(f"{ahead}\n")
            pipes.stdin.flush()
            taken, digest = json.loads(pipes.stdout.readline())
            digests[threads].add(digest)
            if round_:
                seconds[threads, ahead].append(taken)
    for worker in workers.values():
        worker.communicate(timeout=30)
    if any(len(found) > 1 for found in digests.values()):
        sys.exit("not reported: reading ahead changed what was handed out")
    print(f"{describe_machine()}; {os.cpu_count()} processors")
    print(
        f"{args.arms} arms of d_sae 3072, k 32, {TOKENS} tokens a step, {args.steps} steps a turn, {args.rounds} rounds"
    )
    base = min((way for way in ways if way[1] == 0), key=lambda way: statistics.median(seconds[way]))
    for way in ways:
        speed = TOKENS * args.steps / statistics.median(seconds[way])
        gain = median_ratio(seconds[base], seconds[way])
        print(
            f"{way[0]} threads, {way[1]} chunks ahead: {speed:8.0f} tokens/s   {gain:5.2f} × {base[0]} threads, 0 ahead"
        )


if __name__ == "__main__":
    main()
