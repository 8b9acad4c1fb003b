"""Explained variance: what SAEBench 0.6's core computes, and what the word means, from the same tokens.

With S = mean |x|², R = mean |x − x̂|², m = mean x, d = width, and means over batches of each batch's mean:

    fve                 1 − Σ|x − x̂|² / Σ|x − m|²             about the global mean m of all tokens: ours
    saebench_formula    1 − R / (S − (S/d)²)                   core's `explained_variance`
    uncentred           1 − R / S                              what saebench_formula comes close to where S ≪ d²

SAEBench means to subtract |mean x|². It collects the mean of x² instead of x, and joins the batches' vectors end to end
instead of stacking them, so that the mean over all of it is the number S/d (evals/core/main.py:585-587, 617-623 of
0.6.0; SAELens fixed its own copy in its pull request 665). Where activations have a strong mean that is
uncentred energy, which flatters; where S nears d² the denominator nears 0 and beyond it changes sign.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class VarianceTally:
    """Float64 sums over batches of (x, x̂); `report` turns them into the numbers above."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self.energy = self.residual = 0.0
        self.sum_D: Tensor | None = None
        self.batch_energy: list[float] = []
        self.batch_residual: list[float] = []

    def add(self, x_BD: Tensor, x_hat_BD: Tensor) -> None:
        """Count B tokens, (B, d) each, any float dtype. Empty batches count for nothing."""
        if not len(x_BD):
            return
        x_BD, x_hat_BD = x_BD.detach().double(), x_hat_BD.detach().double()
        energy, residual = float(x_BD.square().sum()), float((x_BD - x_hat_BD).square().sum())
        total_D = x_BD.sum(0).cpu()
        self.sum_D = total_D if self.sum_D is None else self.sum_D + total_D
        self.n_tokens += len(x_BD)
        self.energy += energy
        self.residual += residual
        self.batch_energy.append(energy / len(x_BD))
        self.batch_residual.append(residual / len(x_BD))

    def report(self, saebench: float | None = None) -> dict[str, Any]:
        """fve, saebench_formula, uncentred (None without variance), tokens, and SAEBench's own number beside them."""
        numbers: dict[str, Any] = {"fve": None, "saebench_formula": None, "uncentred": None, "tokens": self.n_tokens}
        if self.sum_D is not None:
            width, batches = len(self.sum_D), len(self.batch_energy)
            energy, residual = sum(self.batch_energy) / batches, sum(self.batch_residual) / batches
            variance = self.energy - float(self.sum_D.square().sum()) / self.n_tokens
            numbers["fve"] = _one_minus(self.residual, variance)
            numbers["saebench_formula"] = _one_minus(residual, energy - (energy / width) ** 2)
            numbers["uncentred"] = _one_minus(residual, energy)
        numbers["saebench_explained_variance"] = saebench
        numbers["note"] = (
            "fve is about the global mean of the same tokens, in float64. saebench_explained_variance is core's own: "
            "1 - R / (S - (S/d)^2), with S = mean |x|^2 where the mean of x was meant."
        )
        return numbers


def _one_minus(part: float, whole: float) -> float | None:
    return 1.0 - part / whole if whole else None


@contextlib.contextmanager
def tallied(core: Any) -> Iterator[dict[int, VarianceTally]]:
    """While open, the variance pass of `core` (sae_bench.evals.core.main) also fills a tally for each SAE, by id(sae).

    Only what passes through SAE and token store is looked at; core's own mask of special tokens is applied.
    """
    measured: dict[int, VarianceTally] = {}
    original = core.get_sparsity_and_variance_metrics

    def tallying(sae: Any, model: Any, activation_store: Any, *rest: Any, **named: Any) -> Any:
        tally = measured.setdefault(id(sae), VarianceTally())
        with _observed(sae, activation_store, named.get("ignore_tokens") or set(), tally):
            return original(sae, model, activation_store, *rest, **named)

    core.get_sparsity_and_variance_metrics = tallying
    try:
        yield measured
    finally:
        core.get_sparsity_and_variance_metrics = original


@contextlib.contextmanager
def _observed(sae: Any, store: Any, ignore: set[int | None], tally: VarianceTally) -> Iterator[None]:
    """Shadow three methods on the two instances, and take the shadows away again."""
    encode, decode, get_batch_tokens = sae.encode, sae.decode, store.get_batch_tokens
    seen: dict[str, Tensor] = {}

    def batch_tokens(*args: Any, **named: Any) -> Any:
        tokens = get_batch_tokens(*args, **named)
        seen["keep"] = torch.ones_like(tokens, dtype=torch.bool)
        for token in ignore:
            if token is not None:
                seen["keep"] &= tokens != token
        return tokens

    def encoding(x: Tensor) -> Tensor:
        seen["x"] = x
        codes: Tensor = encode(x)
        return codes

    def decoding(codes: Tensor) -> Tensor:
        x_hat: Tensor = decode(codes)
        keep = seen["keep"].to(x_hat.device)
        tally.add(seen["x"].to(x_hat.device)[keep], x_hat[keep])
        return x_hat

    shadows = ((sae, "encode", encoding), (sae, "decode", decoding), (store, "get_batch_tokens", batch_tokens))
    for owner, name, shadow in shadows:
        object.__setattr__(owner, name, shadow)
    try:
        yield
    finally:
        for owner, name, _ in shadows:
            owner.__dict__.pop(name, None)
