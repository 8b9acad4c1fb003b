"""One pass of activations through an SAE, and what it leaves behind per token.

In: anything with `encode`, `decode` and `d_sae`; Activations; named sets of tokens. Out: `Rebuilt`, from
which `reconstruction` makes its numbers. Encoding is the costly part, so sets that overlap (sinks in, sinks
out) share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cosae.types import Activations, Codes, CosaeError

CHUNK_TOKENS = 4096
"""Rows turned into float64 at once outside the encoder: a bound on memory, of no influence on the numbers."""


class Autoencoder(Protocol):
    """What is asked of an SAE here: the inference rule and its inverse."""

    @property
    def d_sae(self) -> int: ...

    def encode(self, x_BD: Tensor, /) -> Codes: ...

    def decode(self, codes: Codes, /) -> Tensor: ...


@dataclass(frozen=True)
class Rebuilt:
    """What one pass through an SAE leaves behind. N tokens; the mappings have one entry per set of tokens.

    error_N (N,) float64   |x - x̂|²          cosine_N (N,) float64   cos(x, x̂), 0 where either is 0
    norm_N  (N,) float64   |x̂|                l0_N     (N,) int64     codes != 0, signed ones included
    keep    name -> (N,) bool, which tokens are in the set
    fired   name -> (F,) int64, on how many tokens of the set each feature fired
    within  name -> residual and total sum of squares about each batch's own mean
    """

    error_N: Tensor
    cosine_N: Tensor
    norm_N: Tensor
    l0_N: Tensor
    keep: Mapping[str, Tensor]
    fired: Mapping[str, Tensor]
    within: Mapping[str, tuple[float, float]]
    batch_tokens: int


@torch.no_grad()
def rebuild(
    sae: Autoencoder, activations: Activations, keep: Mapping[str, Tensor], batch_tokens: int = 4096
) -> Rebuilt:
    """One pass of encode and decode over all tokens, for any number of sets of them. Changes no state."""
    n = len(activations)
    error_N, cosine_N, norm_N = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
    l0_N = torch.zeros(n, dtype=torch.int64)
    keep = {name: _checked(kept_N, n) for name, kept_N in keep.items()}
    fired = {name: torch.zeros(sae.d_sae, dtype=torch.int64) for name in keep}
    within = dict.fromkeys(keep, (0.0, 0.0))
    for rows in row_slices(n, batch_tokens):
        codes = sae.encode(activations.x_ND[rows].float())
        x_BD = activations.x_ND[rows].double()
        rebuilt_BD = sae.decode(codes).double()
        residual_BD = x_BD - rebuilt_BD
        error_N[rows] = residual_BD.square().sum(-1).cpu()
        norm_N[rows] = rebuilt_BD.norm(dim=-1).cpu()
        lengths_B = x_BD.norm(dim=-1) * rebuilt_BD.norm(dim=-1)
        cosine_N[rows] = ((x_BD * rebuilt_BD).sum(-1) / lengths_B.clamp_min(1e-300)).cpu()
        alive_E = (codes.value_E != 0).cpu()
        token_E, feature_E = codes.token_E.cpu()[alive_E], codes.feature_E.cpu()[alive_E]
        l0_N[rows] = torch.bincount(token_E, minlength=len(x_BD))
        for name, kept_N in keep.items():
            kept_B = kept_N[rows]
            fired[name] += torch.bincount(feature_E[kept_B[token_E]], minlength=sae.d_sae)
            residual, total = within[name]
            on_device_B = kept_B.to(x_BD.device)
            within[name] = (
                residual + _about_own_mean(residual_BD[on_device_B]),
                total + _about_own_mean(x_BD[on_device_B]),
            )
    return Rebuilt(error_N, cosine_N, norm_N, l0_N, keep, fired, within, batch_tokens)


def rebuild_with_sinks(sae: Autoencoder, activations: Activations, sink_N: Tensor, batch_tokens: int = 4096) -> Rebuilt:
    """`rebuild` with the sets "in" (all tokens) and "out" (those where sink_N is False)."""
    sink_N = _checked(sink_N, len(activations))
    return rebuild(sae, activations, {"in": torch.ones_like(sink_N), "out": ~sink_N}, batch_tokens)


def spread(activations: Activations, kept_N: Tensor) -> Tensor:
    """(N,) float64: |x - mean|² of every token, about the mean of the tokens where kept_N (N,) is True."""
    x_ND = activations.x_ND
    on_device_N = kept_N.to(x_ND.device)
    mean_D = torch.zeros(x_ND.shape[1], dtype=torch.float64, device=x_ND.device)
    for rows in row_slices(len(activations), CHUNK_TOKENS):
        mean_D += x_ND[rows][on_device_N[rows]].double().sum(0)
    mean_D /= max(int(kept_N.sum()), 1)
    total_N = torch.zeros(len(activations), dtype=torch.float64)
    for rows in row_slices(len(activations), CHUNK_TOKENS):
        total_N[rows] = (x_ND[rows].double() - mean_D).square().sum(-1).cpu()
    return total_N


def _about_own_mean(v_BD: Tensor) -> float:
    return float((v_BD - v_BD.mean(0)).square().sum()) if len(v_BD) else 0.0


def _checked(mask_N: Tensor, n: int) -> Tensor:
    if mask_N.dtype != torch.bool or tuple(mask_N.shape) != (n,):
        raise CosaeError(
            f"a choice of tokens must be a boolean tensor of shape ({n},), one entry per activation; "
            f"got {mask_N.dtype} of shape {tuple(mask_N.shape)} instead"
        )
    return mask_N.cpu()


def row_slices(n: int, size: int) -> Iterator[slice]:
    """0:size, size:2·size ... up to n."""
    if size < 1:
        raise CosaeError(f"batch_tokens must be at least 1; got {size} instead")
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
