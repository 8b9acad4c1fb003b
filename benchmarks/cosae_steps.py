"""One training step of cosae on a chosen path, its check against the definition, and the floor under it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from benchmarks.shapes import Shape
from cosae.kernels import choose
from cosae.sae.model import SAE
from cosae.train.arm import Arm
from cosae.train.step import ArmState, OptimizerConfig, train_step

CHECKED_TOKENS, GRADIENT_TOKENS = 256, 32
NEVER = 10**12
"""Tokens after which a feature counts as dead: none does while it is timed."""
LR = 2e-4

PATHS = {
    "numba": ("auto", ""),
    "numba, fp32 screen": ("auto", "fp32"),
    "numba, bf16 screen": ("auto", "bf16"),
    "numba, int8 screen": ("auto", "int8"),
    "plain torch": ("auto", ""),
    "reference": ("reference", ""),
}
"""By name: kernel, and the screen's format (none leaves it to the clock). "plain torch" runs without numba."""


def take_path(path: str) -> str:
    """Force the path's screen in this process; returns its kernel."""
    kernel, os.environ["COSAE_SCREEN"] = PATHS[path]
    return kernel


def make_arm(score: str, shape: Shape, sample_ND: Tensor, kernel: str = "auto") -> ArmState:
    """A fresh arm."""
    sae = SAE.build(d_in=shape.d, d_sae=shape.m, score=score, k=shape.k, seed=0, sample=sample_ND, kernel=kernel)
    arm = Arm.of(name=score, score=score, k=shape.k, seed=0)
    return ArmState.start(arm, sae, float(sample_ND.var(0).sum()), OptimizerConfig(lr=LR))


def make_step(score: str, path: str, shape: Shape, sample_ND: Tensor) -> Callable[[Tensor], str]:
    """A step of cosae.train.step on a fresh arm; it returns which screen it took."""
    state = make_arm(score, shape, sample_ND, take_path(path))
    count = 0

    def step(x_ND: Tensor) -> str:
        nonlocal count
        train_step(state, x_ND, count, 1.0, NEVER)
        count += 1
        return str(state.cache.choices)

    return step


def gradients(sae: SAE, x_ND: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean squared error by parameter."""
    output = sae.train_forward(x_ND)
    (output.framed.z_BD - output.recon[-1]).square().sum(-1).mean().backward()
    return {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}


def find_fault(score: str, path: str, shape: Shape, x_ND: Tensor) -> str | None:
    """What is wrong with this path at this shape, or None.

    The chosen entries of CHECKED_TOKENS tokens must be the dense fp32 definition's but between scores that agree to
    rounding; the gradients of GRADIENT_TOKENS must be within 1e-4 of dense float64 autograd.
    """
    kernel = take_path(path)
    build = partial(SAE.build, d_in=shape.d, d_sae=shape.m, score=score, k=shape.k, seed=0, sample=x_ND)
    sae, some_ND = build(kernel=kernel), x_ND[:CHECKED_TOKENS]
    terms = sae.score.terms(sae._framed(some_ND)).detached()
    reference = choose("reference", "cpu")
    fast, smallest = choose(kernel, "cpu").select_batch_topk(terms, shape.k * len(some_ND))
    slow, _ = reference.select_batch_topk(terms, shape.k * len(some_ND))
    flat = [entries.token_E * shape.m + entries.feature_E for entries in (fast, slow)]
    found, count = torch.unique(torch.cat(flat), return_counts=True)
    odd_E = found[count == 1]
    if len(odd_E):
        score_E = reference.entry_content(terms, type(fast)(odd_E // shape.m, odd_E % shape.m))
        if terms.bias_F is not None:
            score_E = score_E + terms.bias_F[odd_E % shape.m]
        if bool(((score_E - smallest).abs() > 2e-6 * abs(smallest)).any()):
            return f"{len(odd_E)} selected entries differ by more than rounding"
    few_ND = x_ND[:GRADIENT_TOKENS]
    mine = gradients(sae, few_ND)
    for name, wanted in gradients(build(kernel="reference").double(), few_ND.double()).items():
        error = float((mine[name] - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if not error < 1e-4:
            return f"the gradient of {name} is off by {error:.1e} of its length"
    return None


def make_product(shape: Shape) -> Callable[[Tensor], None]:
    """The dense fp32 product of n × d × m alone, in chunks of at most 4096 features, into memory that is there."""
    rows_FD = torch.randn(min(shape.m, 4096), shape.d, generator=torch.Generator().manual_seed(0))
    out_FB = torch.empty(len(rows_FD), shape.n)

    def run(x_ND: Tensor) -> None:
        for first in range(0, shape.m, len(rows_FD)):
            part = min(len(rows_FD), shape.m - first)
            torch.mm(rows_FD[:part], x_ND.T, out=out_FB[:part])

    return run


def make_floor(shape: Shape) -> Callable[[Tensor], None]:
    """What a sparse step with an fp32 product cannot do without, each part by a bare torch call into memory that is
    there already.

    The product; four gathers of n·k rows of d fp32 (decode by token; codes', decoder's and encoder's gradients by
    feature); one fused Adam step on both matrices.
    """
    draw = torch.Generator().manual_seed(0)
    n_entries = shape.n * shape.k
    product = make_product(shape)
    matrices = [torch.zeros(shape.m, shape.d, requires_grad=True) for _ in range(2)]
    for matrix in matrices:
        matrix.grad = torch.zeros_like(matrix)
    adam = torch.optim.Adam(matrices, fused=True)
    feature_E = torch.randint(shape.m, (n_entries,), generator=draw)
    token_E = torch.arange(shape.n).repeat_interleave(shape.k)[feature_E.argsort()]
    of_token = torch.arange(0, n_entries, shape.k)
    count_F = torch.bincount(feature_E, minlength=shape.m)
    of_feature, weight_E = count_F.cumsum(0) - count_F, torch.ones(n_entries)

    def run(x_ND: Tensor) -> None:
        product(x_ND)
        with torch.no_grad():
            embedding_bag(feature_E, matrices[0], of_token, mode="sum", per_sample_weights=weight_E)
            for _ in range(3):
                embedding_bag(token_E, x_ND, of_feature, mode="sum", per_sample_weights=weight_E)
        adam.step()

    return run
