"""What compressed Adam states cost in reconstruction: `python -m benchmarks.states`.

Arms that differ in `state_dtype` alone train in lockstep on the embedded model's activations: the same batches, the
same start, for every seed. Held-out tokens are then reconstructed by the training rule (k a token on average, so L0 is
equal), and FVE is taken about their mean. Differences to float32 are paired by (seed, score); the interval draws them.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from benchmarks.timing import describe_machine
from cosae.evaluate.statistics import paired_mean_interval
from cosae.kernels.moments import STATE_DTYPES
from cosae.presets import preset
from cosae.run.dataset.open import dataset_of
from cosae.sae.model import SAE
from cosae.train.arm import Arm
from cosae.train.step import ArmState, OptimizerConfig, lr_scale, train_step


def held_out_fve(sae: SAE, x_ND: Tensor) -> float:
    """1 − Σ|x − x̂|² / Σ|x − mean|², the best k · N codes of each 1024 tokens kept."""
    missed = 0.0
    with torch.no_grad():
        for part_BD in x_ND.split(1024):
            output = sae.train_forward(part_BD)
            missed += float((output.framed.z_BD - output.recon[-1]).double().square().sum())
    return 1.0 - missed / float((x_ND - x_ND.mean(0)).double().square().sum())


def train_seed(x_ND: Tensor, seed: int, args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float]]:
    """FVE by state dtype, one per score, and the seconds of its steps."""
    split = len(x_ND) * 4 // 5
    x_ND, held_out_ND = x_ND[:split], x_ND[split:]
    order = torch.Generator().manual_seed(seed)
    states = {}
    for dtype in STATE_DTYPES:
        config = OptimizerConfig(lr=args.lr, warmup_steps=args.steps // 20, state_dtype=dtype)
        for score in args.scores:
            sae = SAE.build(x_ND.shape[1], args.d_sae, score=score, k=args.k, seed=seed, sample=x_ND[:4096])
            arm = Arm.of(f"{score}-{dtype}", score, k=args.k, seed=seed, lr=args.lr)
            states[dtype, score] = ArmState.start(arm, sae, float(x_ND.var(0).sum()), config), config
    seconds = dict.fromkeys(STATE_DTYPES, 0.0)
    for step in range(args.steps):
        x_BD = x_ND[torch.randint(len(x_ND), (args.batch,), generator=order)]
        for (dtype, _), (state, config) in states.items():
            begun = time.process_time()
            train_step(state, x_BD, step, lr_scale(step, args.steps, config), 10**12)
            seconds[dtype] += time.process_time() - begun
    fve = {
        dtype: [held_out_fve(states[dtype, score][0].sae, held_out_ND) for score in args.scores] for dtype in seconds
    }
    return fve, {dtype: taken / args.steps / len(args.scores) for dtype, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=768)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--scores", nargs="+", default=["inner", "cosine"])
    args = parser.parse_args()
    sample = dataset_of(preset("embedded")).sample("held_out", args.tokens)
    x_ND = sample.activations.x_ND.float()
    x_ND = x_ND[torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(0))[: args.tokens]]
    print(describe_machine())
    print(f"{len(x_ND)} tokens, {args.seeds} seeds × {', '.join(args.scores)}; {vars(args)}")
    fve: dict[str, list[float]] = {dtype: [] for dtype in STATE_DTYPES}
    seconds: dict[str, list[float]] = {dtype: [] for dtype in STATE_DTYPES}
    for seed in range(args.seeds):
        found, taken = train_seed(x_ND, seed, args)
        for dtype in STATE_DTYPES:
            fve[dtype] += found[dtype]
            seconds[dtype].append(taken[dtype])
        print(f"seed {seed}: " + "; ".join(f"{d} {', '.join(f'{v:.5f}' for v in found[d])}" for d in found), flush=True)
    for dtype in STATE_DTYPES:
        gap = paired_mean_interval(fve[dtype], fve["float32"])
        print(
            f"{dtype:9} FVE {statistics.mean(fve[dtype]):.5f}, − float32 {gap['difference']:+.5f} "
            f"[{gap['low']:+.5f}, {gap['high']:+.5f}], {1e3 * statistics.median(seconds[dtype]):.1f} ms of CPU a step"
        )


if __name__ == "__main__":
    main()
