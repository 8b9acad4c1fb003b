"""The GPU path on one CUDA device: `python -m benchmarks.gpu`. Correctness first; nothing is timed while it is red.

First the tests marked `gpu` (every kernel compiled, against its twin), then at each batch size selection and gradients
of the path against the dense definition at full width. Only then whole steps (loss, sparse gradients, optimiser) are
timed, each beside the floor in the same rounds, and sparsify's TopK where it and its Triton path are installed.

    arithmetic floor   2·N·d·m at 800 TFLOP/s + 26 bytes · 2·m·d at 3.0 TB/s + four gathers of N·k rows at 3.0 TB/s
    measured floor     the bf16 product alone (cuBLAS) + one pass over 26 bytes a parameter (a copy of as many bytes)
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cosae.kernels import choose, describe, reference
from cosae.sae.model import SAE
from cosae.train.arm import Arm
from cosae.train.step import ArmState, OptimizerConfig, train_step

FLOPS, BANDWIDTH = 800e12, 3.0e12
"""An H100's bf16 product and memory rates that the arithmetic floor takes."""
STATE_BYTES = {"float32": 26, "bfloat16": 18, "int8": 14}
"""Bytes a parameter of one optimiser sweep: weight and two moments in and out, a bf16 copy; gradients fused away."""


def draw(n_tokens: int, d: int, seed: int) -> Tensor:
    """Sparse combinations of 4 d directions with log-normal norms, on the device."""
    source = torch.Generator("cuda").manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(4 * d, d, generator=source, device="cuda"), dim=-1)
    code = torch.relu(torch.randn(n_tokens, 4 * d, generator=source, device="cuda") - 2.0) * 3
    scale = torch.exp(0.3 * torch.randn(n_tokens, 1, generator=source, device="cuda"))
    return code @ directions * scale + 0.1 * torch.randn(n_tokens, d, generator=source, device="cuda")


def start(args: argparse.Namespace, score: str, x_BD: Tensor, state_dtype: str = "float32") -> ArmState:
    """A fresh arm on the GPU path."""
    sae = SAE.build(
        args.d, args.m, score=score, selector=args.selector, k=args.k, sample=x_BD[:2048].cpu(), centre="mean",
        device="cuda",
    )  # fmt: skip
    sae.kernel = "triton"
    arm = Arm.of(score, score, selector=args.selector, k=args.k, seed=0)
    return ArmState.start(arm, sae, float(x_BD.var(0).sum()), OptimizerConfig(state_dtype=state_dtype))


def find_fault(args: argparse.Namespace, score: str, x_BD: Tensor) -> str | None:
    """What is wrong with selection or gradients of the first tokens at full width, or None."""
    sae = start(args, score, x_BD).sae
    few_BD = x_BD[: args.checked_tokens]
    terms = sae.score.terms(sae._framed(few_BD)).detached()
    paths = [choose(name, "cuda") for name in ("triton", "reference")]
    (fast, smallest), (slow, _) = (path.select_batch_topk(terms, args.k * len(few_BD)) for path in paths)
    flat = torch.cat([entries.token_E * args.m + entries.feature_E for entries in (fast, slow)])
    odd, count = torch.unique(flat, return_counts=True)
    odd = odd[count == 1]
    if len(odd):
        score_E = reference.scores(terms)[odd // args.m, odd % args.m]
        if bool(((score_E - smallest).abs() > 2e-6 * abs(smallest)).any()):
            return f"{len(odd)} selected entries differ by more than rounding"
    found = _gradients(sae, few_BD)
    wide = start(args, score, x_BD).sae
    wide.kernel = "reference"
    for name, wanted in _gradients(wide.double(), few_BD.double()).items():
        error = float((found[name].double() - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if not error < 1e-4:
            return f"the gradient of {name} is off by {error:.1e} of its length"
    return None


def _gradients(sae: SAE, x_BD: Tensor) -> dict[str, Tensor]:
    output = sae.train_forward(x_BD)
    torch.autograd.backward((output.framed.z_BD - output.recon[-1]).square().sum(-1).mean())
    return {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}


def time_rounds(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds by contestant, by CUDA events, everyone in every round."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 3):
        for name, call in contestants.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if turn >= 3:
                taken[name].append(begin.elapsed_time(end))
    return {name: statistics.median(times) for name, times in taken.items()}


def make_floor(args: argparse.Namespace, x_BD: Tensor) -> Callable[[], object]:
    """The bf16 product and one pass over the optimiser's bytes."""
    x_BD, rows_FD = x_BD.bfloat16(), torch.randn(args.m, args.d, device="cuda", dtype=torch.bfloat16)
    out_BF = torch.empty(len(x_BD), args.m, device="cuda", dtype=torch.bfloat16)
    moved = torch.empty(STATE_BYTES["float32"] * args.m * args.d, dtype=torch.uint8, device="cuda")
    into = torch.empty_like(moved)

    def floor() -> None:
        torch.mm(x_BD, rows_FD.T, out=out_BF)
        into.copy_(moved)  # reads and writes as many bytes: 2 × 26 · m · d

    return floor


def make_sparsify(args: argparse.Namespace, batches: list[Tensor]) -> Callable[[], object] | str:
    """sparsify's TopK step with torch's fused Adam, or why it is not timed."""
    try:
        from sparsify import SparseCoder, SparseCoderConfig
    except ImportError as reason:
        return f"sparsify is not installed ({reason})"
    config = SparseCoderConfig(num_latents=args.m, k=args.k)
    peer = SparseCoder(args.d, config, device="cuda", dtype=torch.float32)
    adam = torch.optim.Adam(peer.parameters(), lr=1e-3, fused=True)
    turn = [0]

    def step() -> None:
        peer.set_decoder_norm_to_unit_norm()
        turn[0] += 1
        torch.autograd.backward(peer(batches[turn[0] % len(batches)]).fvu)
        peer.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    return step


def time_batch(args: argparse.Namespace, n_tokens: int) -> bool:
    """Print one batch size's table; False where it may not be printed."""
    batches = [draw(n_tokens, args.d, seed) for seed in range(2)]
    for score in args.scores:
        if fault := find_fault(args, score, batches[0]):
            print(f"batch {n_tokens}: not timed, {score}: {fault}")
            return False
        torch.cuda.empty_cache()
    arithmetic = 1e3 * (
        2 * n_tokens * args.d * args.m / FLOPS
        + (2 * STATE_BYTES["float32"] * args.m * args.d + 16 * n_tokens * args.k * args.d) / BANDWIDTH
    )
    print(
        f"\nbatch {n_tokens}: d {args.d}, m {args.m}, k {args.k}, {args.selector}; arithmetic floor {arithmetic:.2f} ms"
    )
    results: dict[str, tuple[float, float]] = {}
    for label, make in contestants_of(args, batches).items():
        call = make()
        if isinstance(call, str):
            print(f"{label}: {call}")
            continue
        torch.cuda.reset_peak_memory_stats()
        # one contestant's state fills much of the card: each is timed beside the floor alone, in the same rounds
        times = time_rounds({label: call, "floor": make_floor(args, batches[0])}, args.rounds)
        results[label] = times[label], times["floor"]
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(
            f"{label:28} {times[label]:8.2f} ms {n_tokens / times[label]:8.0f}k tokens/s "
            f"{times[label] / times['floor']:6.2f} × measured floor {times[label] / arithmetic:6.2f} × arithmetic "
            f"{peak:6.1f} GiB"
        )
        del call
        gc.collect()
        torch.cuda.empty_cache()
    if "sparsify" in results:
        for label, (taken, _) in results.items():
            print(f"{label:28} {results['sparsify'][0] / taken:6.2f} × as fast as sparsify")
    return True


def contestants_of(
    args: argparse.Namespace, batches: list[Tensor]
) -> dict[str, Callable[[], Callable[[], object] | str]]:
    """How to make each contestant, by name."""

    def ours(score: str, state_dtype: str) -> Callable[[], object]:
        state, turn = start(args, score, batches[0], state_dtype), [0]

        def step() -> None:
            turn[0] += 1
            train_step(state, batches[turn[0] % len(batches)], turn[0], 1.0, 10**12)

        return step

    made: dict[str, Callable[[], Callable[[], object] | str]] = {}
    for score in args.scores:
        for state_dtype in args.states:
            made[f"{score}, {state_dtype}"] = lambda s=score, t=state_dtype: ours(s, t)  # type: ignore[misc]
    made["sparsify"] = lambda: make_sparsify(args, batches)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--m", type=int, default=65536)
    parser.add_argument("--k", type=int, default=80)
    parser.add_argument("--batches", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--selector", choices=("batch_topk", "topk"), default="batch_topk")
    parser.add_argument("--scores", nargs="+", default=["inner", "cosine"])
    parser.add_argument("--states", nargs="+", choices=STATE_BYTES, default=["float32", "bfloat16", "int8"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--checked-tokens", type=int, default=32)
    parser.add_argument("--skip-tests", action="store_true", help="leave out the tests marked gpu")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA device, and this torch sees none.")
    print(f"torch {torch.__version__}, {describe('triton', 'cuda')}")
    if not args.skip_tests:
        tests = Path(__file__).parents[1] / "tests" / "kernels"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(tests)]
        if subprocess.run(command, check=False).returncode:
            sys.exit("not timed: the tests marked gpu do not pass.")
    if not all(time_batch(args, n_tokens) for n_tokens in args.batches):
        sys.exit(1)


if __name__ == "__main__":
    main()
