"""Whole training steps, tokens per second: `python -m benchmarks.step`.

Loss, sparse gradients and optimiser of `cosae.train.step` on random planted activations, for the inner product and
the cosine scores, on the dense definition ("reference") and the sparse path ("auto"), interleaved. Before a shape is
timed its selection and its gradients are compared with the definition; where they differ nothing is printed for it.

The floor is the one dense product that no step can do without, in bf16 where the processor has it, measured in the
same rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.timing import CLOCKS, describe_machine, interleave, median_ratio
from cosae.kernels import choose, keep_memory
from cosae.kernels.survivors import screen_dtype
from cosae.sae.model import SAE
from cosae.train.arm import Arm
from cosae.train.step import ArmState, OptimizerConfig, train_step

SHAPES = {"demo": (192, 3072, 32, 1024), "A": (768, 12288, 64, 2048), "B": (512, 32768, 32, 2048)}
"""d, m, k, tokens a step: the demo's, and A and B of the performance notes."""
CHECKED_TOKENS = 64


def draw_batches(d: int, n_tokens: int, count: int) -> list[Tensor]:
    """Sparse non-negative combinations of 4 d random directions, log-normal norms (σ = 0.3), a little noise."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * d, d, generator=draw), dim=-1)
    batches = []
    for _ in range(count):
        code = torch.relu(torch.randn(n_tokens, 4 * d, generator=draw) - 2.0) * 3
        scale = torch.exp(0.3 * torch.randn(n_tokens, 1, generator=draw))
        batches.append(code @ directions * scale + 0.1 * torch.randn(n_tokens, d, generator=draw))
    return batches


def start(score: str, kernel: str, shape: tuple[int, int, int, int], x_BD: Tensor) -> ArmState:
    """A fresh arm on its path."""
    d, m, k, _ = shape
    sae = SAE.build(d_in=d, d_sae=m, score=score, k=k, seed=0, sample=x_BD, kernel=kernel)
    arm = Arm(name=f"{score}-{kernel}", score=score, k=k, seed=0)
    return ArmState.start(arm, sae, float(x_BD.var(0).sum()), OptimizerConfig())


def gradients(sae: SAE, x_BD: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean squared error by parameter."""
    output = sae.train_forward(x_BD)
    (output.framed.z_BD - output.rebuilt[-1]).square().sum(-1).mean().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}


def find_fault(score: str, shape: tuple[int, int, int, int], x_BD: Tensor) -> str | None:
    """What is wrong with the sparse path at this shape, or None."""
    d, m, k, _ = shape
    sae = SAE.build(d_in=d, d_sae=m, score=score, k=k, seed=0, sample=x_BD, kernel="auto")
    terms = sae.score.terms(sae._framed(x_BD)).detached()
    fast, smallest = choose("auto", "cpu").select_batch_topk(terms, k * len(x_BD))
    slow, _ = choose("reference", "cpu").select_batch_topk(terms, k * len(x_BD))
    flat = [entries.token_E * m + entries.feature_E for entries in (fast, slow)]
    odd = torch.unique(torch.cat(flat), return_counts=True)
    odd_E = odd[0][odd[1] == 1]
    if len(odd_E):
        kernel = choose("reference", "cpu")
        single = type(fast)(odd_E // m, odd_E % m)
        score_E = kernel.entry_content(terms, single)
        if terms.bias_F is not None:
            score_E = score_E + terms.bias_F[single.feature_E]
        if bool(((score_E - smallest).abs() > 2e-6 * float(abs(smallest))).any()):
            return f"{len(odd_E)} selected entries differ by more than rounding"
    few = x_BD[:CHECKED_TOKENS]
    found = gradients(sae, few)
    wide = SAE.build(d_in=d, d_sae=m, score=score, k=k, seed=0, sample=x_BD, kernel="reference").double()
    for name, wanted in gradients(wide, few.double()).items():
        error = float((found[name] - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if not error < 1e-4:
            return f"the gradient of {name} is off by {error:.1e} of its length"
    return None


def time_shape(label: str, args: argparse.Namespace) -> bool:
    """Print one shape's table; False where it may not be printed."""
    shape = SHAPES[label]
    d, m, k, n_tokens = shape
    batches = draw_batches(d, n_tokens, 4)
    for score in args.scores:
        fault = find_fault(score, shape, batches[0])
        if fault:
            print(f"shape {label}: not reported, {score}: {fault}")
            return False
    contestants: dict[str, Callable[[], object]] = {}
    for kernel in args.kernels:
        for score in args.scores:
            state = start(score, kernel, shape, batches[0])
            contestants[f"{score}, {kernel}"] = partial(_next_step, state, batches, [0])
    dtype = screen_dtype()
    x_BD, rows_FD = batches[0].to(dtype), torch.randn(min(m, 4096), d).to(dtype)
    out_BF = torch.empty(n_tokens, len(rows_FD), dtype=dtype)
    contestants["floor"] = lambda: [torch.mm(x_BD, rows_FD.T, out=out_BF) for _ in range(m // len(rows_FD))]
    seconds = interleave(contestants, args.rounds, args.clock, warmup=3)
    print(f"\nshape {label}: d {d}, m {m}, k {k}, {n_tokens} tokens a step ({args.clock} time)")
    base = seconds[f"{args.scores[0]}, {args.kernels[-1]}"]
    for name, taken in seconds.items():
        speed = n_tokens / statistics.median(taken)
        over_floor, over_base = median_ratio(taken, seconds["floor"]), median_ratio(taken, base)
        print(
            f"{name:32} {1e3 * statistics.median(taken):8.1f} ms  {speed:9.0f} tokens/s  "
            f"{over_floor:6.2f} × floor  {over_base:6.2f} × {args.scores[0]}, {args.kernels[-1]}"
        )
    return True


def _next_step(state: ArmState, batches: list[Tensor], count: list[int]) -> None:
    train_step(state, batches[count[0] % len(batches)], count[0], 1.0, 10**12)
    count[0] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["demo", "A", "B"])
    parser.add_argument("--scores", nargs="+", default=["inner", "cosine", "cosine_per_feature"])
    parser.add_argument("--kernels", nargs="+", default=["reference", "auto"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--free-memory", action="store_true", help="leave the allocator as it is")
    args = parser.parse_args()
    if not args.free_memory:
        keep_memory()
    print(describe_machine())
    reported = [time_shape(label, args) for label in args.shapes]
    if not all(reported):
        sys.exit(1)


if __name__ == "__main__":
    main()
