"""What a cosine score costs in encoding beside the inner product: `python -m benchmarks.encode`.

Both SAEs have the same rows and batch and a threshold that keeps k entries per token. Printed: median milliseconds,
and the median over rounds of the ratio to the inner product's time in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial

import torch
from torch import Tensor

from benchmarks.timing import CLOCKS, describe_machine, interleave, median_ratio
from cosae.kernels import keep_memory
from cosae.sae.model import SAE

SCORES = ("inner", "cosine", "cosine_per_feature")
LIMIT = 1.03
"""Largest allowed cost of the global cosine score, inner product = 1."""


def make_saes(d_in: int, d_sae: int, k: int, x_BD: Tensor, kernel: str) -> dict[str, SAE]:
    """One SAE for each score, thresholds set to keep k entries per token of x."""
    saes = {}
    for score in SCORES:
        sae = SAE.build(d_in=d_in, d_sae=d_sae, score=score, k=k, seed=0, kernel=kernel)
        sae.score.set_exponent(0.3)
        if score == "cosine_per_feature":
            with torch.no_grad():
                sae.score.exponent.copy_(torch.linspace(0.0, 0.6, d_sae))
        terms = sae.score.terms(sae._framed(x_BD))
        sae.selector.set_margin(sae._kernel().select_batch_topk(terms, k * len(x_BD))[1])
        saes[score] = sae.requires_grad_(False)
    return saes


def check(saes: dict[str, SAE], x_BD: Tensor) -> None:
    """Every encoder agrees with the dense definition; raises SystemExit where one does not."""
    for score, sae in saes.items():
        fast, kernel = sae.encode(x_BD).to_dense(), sae.kernel
        sae.kernel = "reference"
        slow = sae.encode(x_BD).to_dense()
        sae.kernel = kernel
        differ = (fast - slow).abs() > 1e-4 * slow.abs().max()
        differ &= (torch.maximum(fast, slow) - sae.threshold).abs() > 1e-5 * sae.threshold.abs()
        if bool(differ.any()):
            sys.exit(f"not reported: {score} gives {int(differ.sum())} codes that the definition does not")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("d", 768), ("m", 12288), ("batch", 2048), ("k", 64), ("rounds", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kernel", default="auto", help="auto or reference")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    keep_memory()
    draw = torch.Generator().manual_seed(0)
    x_BD = torch.randn(args.batch, args.d, generator=draw) * torch.exp(0.3 * torch.randn(args.batch, 1, generator=draw))
    saes = make_saes(args.d, args.m, args.k, x_BD, args.kernel)
    check(saes, x_BD)
    seconds = interleave({name: partial(sae.encode, x_BD) for name, sae in saes.items()}, args.rounds, args.clock)
    print(f"encode, d {args.d}, m {args.m}, batch {args.batch}, k {args.k}, kernel {args.kernel}; {describe_machine()}")
    for name, taken in seconds.items():
        ratio = median_ratio(taken, seconds["inner"])
        print(f"{name:20} {1e3 * statistics.median(taken):8.1f} ms ({args.clock})   {ratio:5.3f} × inner")
    if median_ratio(seconds["cosine"], seconds["inner"]) > LIMIT:
        print(f"the cosine score costs more than {LIMIT} × the inner product")
        sys.exit(1)


if __name__ == "__main__":
    main()
