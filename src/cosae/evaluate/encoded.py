"""One pass of a sample through an SAE, computed once and handed to every measurement.

In: anything with `encode`, `decode` and `d_sae`, and a Sample. Out: `EncodedPass`: codes of all tokens, and errors,
norms and cosines of every reconstruction. Encoding is the costly part, so no measurement encodes for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosae.activations.sample import SINKS, Sample
from cosae.errors import CosaeError
from cosae.types import Activations, Codes

BATCH_TOKENS = 4096
"""Rows encoded, or turned into float64, at once: a bound on memory. Only `fve_per_batch` depends on it."""

BLOCKS = 256
"""Blocks of consecutive rows that stand in for documents where there are none."""

Within = tuple[float, float]
"""Residual and total sum of squares, each about the mean of its own batch."""


class Autoencoder(Protocol):
    """What is asked of an SAE here: the inference rule and its inverse."""

    @property
    def d_sae(self) -> int: ...

    def encode(self, x_BD: Tensor, /) -> Codes: ...

    def decode(self, codes: Codes, /) -> Tensor: ...


S = TypeVar("S", bound=Autoencoder)
S_co = TypeVar("S_co", bound=Autoencoder, covariant=True)


@dataclass(frozen=True)
class EncodedPass(Generic[S_co]):
    """What one pass of N tokens through an SAE gives. Mappings have an entry for "sinks_out" and for "sinks_in".

    sae, sample
    codes        of all N tokens, on the CPU
    error_N      (N,) float64   |x - x̂|²; of a transcoder this and what follows are of its targets, in the place of x
    cosine_N     (N,) float64   cos(x, x̂), 0 where either is 0
    recon_norm_N (N,) float64   |x̂|
    l0_N         (N,) int64     codes ≠ 0, negative ones included
    keep         (N,) bool, the tokens that count; never padding (all-zero rows)
    quartile     (N,) int64, norm quartile 0..3 of a token among those that count, -1 for the others
    cuts         the five ends of the quartiles
    within       about each batch's own mean: of the set, then of each of its norm quartiles
    batch_tokens tokens encoded at once
    """

    sae: S_co
    sample: Sample
    codes: Codes
    error_N: Tensor
    cosine_N: Tensor
    recon_norm_N: Tensor
    l0_N: Tensor
    keep: Mapping[str, Tensor]
    quartile: Mapping[str, Tensor]
    cuts: Mapping[str, list[float]]
    within: Mapping[str, list[Within]]
    batch_tokens: int

    @property
    def target_ND(self) -> Tensor:
        """(N, D) what is reconstructed: the activations, or a transcoder's targets."""
        return target_of(self.sae, self.sample.activations)

    @cached_property
    def norm_N(self) -> Tensor:
        """(N,) float64 |x|, on the CPU."""
        return self.sample.activations.norm_N.cpu().double()

    @cached_property
    def target_norm_N(self) -> Tensor:
        """(N,) float64 norm of what is reconstructed."""
        own = self.target_ND is self.sample.activations.x_ND
        return self.norm_N if own else torch.linalg.vector_norm(self.target_ND.cpu(), dim=-1, dtype=torch.float64)

    @cached_property
    def firings(self) -> tuple[Tensor, Tensor]:
        """(E,) token and feature of every code ≠ 0."""
        on_E = self.codes.value_E != 0
        return self.codes.token_E[on_E], self.codes.feature_E[on_E]

    def fired(self, sinks: str) -> Tensor:
        """(4, F) int64: on how many tokens of each norm quartile of the set a feature fired."""
        token_E, feature_E = self.firings
        quartile_E = self.quartile[sinks][token_E]
        flat_E = (quartile_E * self.sae.d_sae + feature_E)[quartile_E >= 0]
        return torch.bincount(flat_E, minlength=4 * self.sae.d_sae).view(4, -1)

    def first(self, sinks: str) -> Tensor:
        """(F,) int64: tokens of the set before the first on which a feature fired; the set's size if it never did."""
        token_E, feature_E = self.firings
        keep_N = self.keep[sinks]
        in_E = keep_N[token_E]
        place_N = torch.cumsum(keep_N.long(), 0) - 1
        first_F = torch.full((self.sae.d_sae,), int(keep_N.sum()), dtype=torch.int64)
        return first_F.scatter_reduce_(0, feature_E[in_E], place_N[token_E[in_E]], "amin")


@torch.no_grad()
def encode_sample(
    sae: S, sample: Sample, batch_tokens: int = BATCH_TOKENS, on_rows: Callable[[int], None] = lambda n: None
) -> EncodedPass[S]:
    """Encode and decode every token once. Changes no state. Raises CosaeError without tokens, and for a transcoder
    without targets.

    on_rows: gets the number of tokens after each batch.
    """
    activations = sample.activations
    n = len(activations)
    live_N = (activations.x_ND != 0).any(-1).cpu()
    keep = {sinks: sample.keep(sinks) & live_N for sinks in SINKS}
    norm_N = activations.norm_N.cpu().double()
    quartile, cuts = {}, {}
    for sinks in SINKS:
        quartile[sinks], cuts[sinks] = norm_quartiles(norm_N, keep[sinks])
    error_N, cosine_N, recon_norm_N = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
    within: dict[str, list[Within]] = {sinks: [(0.0, 0.0)] * 5 for sinks in SINKS}
    parts: list[Codes] = []
    wanted_ND = target_of(sae, activations)
    for rows in row_slices(n, batch_tokens):
        codes = sae.encode(activations.x_ND[rows].float())
        recon_BD = sae.decode(codes).double()
        parts.append(Codes.cat([codes]))
        x_BD = wanted_ND[rows].to(recon_BD.device).double()
        residual_BD = x_BD - recon_BD
        error_N[rows] = residual_BD.square().sum(-1).cpu()
        recon_norm_N[rows] = recon_BD.norm(dim=-1).cpu()
        lengths_B = x_BD.norm(dim=-1) * recon_BD.norm(dim=-1)
        cosine_N[rows] = ((x_BD * recon_BD).sum(-1) / lengths_B.clamp_min(1e-300)).cpu()
        for sinks in SINKS:
            _add_within(within[sinks], quartile[sinks][rows], x_BD, residual_BD)
        on_rows(len(x_BD))
    if not parts:
        raise CosaeError("a measurement needs at least one token. Got none: check the filter, or ask for more tokens.")
    codes = Codes.cat(parts)
    l0_N = torch.bincount(codes.token_E[codes.value_E != 0], minlength=n)
    return EncodedPass(
        sae, sample, codes, error_N, cosine_N, recon_norm_N, l0_N, keep, quartile, cuts, within, batch_tokens
    )


def target_of(sae: object, activations: Activations) -> Tensor:
    """(N, D) what an SAE is to reconstruct of these tokens. Raises CosaeError for a transcoder without targets, or of
    another width."""
    if getattr(sae, "target", None) is None:
        return activations.x_ND
    y_ND, d_out = activations.y_ND, getattr(sae, "d_out", None)
    if y_ND is None or y_ND.shape[1] != d_out:
        came = "have none" if y_ND is None else f"have width {y_ND.shape[1]}"
        raise CosaeError(f"a transcoder is measured against its targets of width {d_out}, and these tokens {came}.")
    return y_ND


@torch.no_grad()
def encode_all(sae: Autoencoder, activations: Activations) -> Codes:
    """Codes of N activations, encoded in batches. CPU tensors."""
    return Codes.cat([sae.encode(rows.float()) for rows in torch.split(activations.x_ND, BATCH_TOKENS)])


def _add_within(within_5: list[Within], quartile_B: Tensor, x_BD: Tensor, residual_BD: Tensor) -> None:
    """One batch more: all of the set's tokens, and each quartile's."""
    for i, in_B in enumerate([quartile_B >= 0, *(quartile_B == q for q in range(4))]):
        here_B = in_B.to(x_BD.device)
        residual, total = within_5[i]
        within_5[i] = residual + _about_own_mean(residual_BD[here_B]), total + _about_own_mean(x_BD[here_B])


def _about_own_mean(v_BD: Tensor) -> float:
    return float((v_BD - v_BD.mean(0)).square().sum()) if len(v_BD) else 0.0


def norm_quartiles(norm_N: Tensor, kept_N: Tensor) -> tuple[Tensor, list[float]]:
    """(N,) norm quartile 0..3, -1 where not kept; and the five cuts. Equal norms stay in one quartile."""
    if not bool(kept_N.any()):
        return torch.full_like(kept_N, -1, dtype=torch.int64), [0.0] * 5
    cuts = np.quantile(norm_N[kept_N].numpy(), [0, 0.25, 0.5, 0.75, 1]).tolist()
    quartile_N = torch.bucketize(norm_N, torch.tensor(cuts[1:4], dtype=torch.float64))
    return torch.where(kept_N, quartile_N, -1), cuts


def spread(x_ND: Tensor, kept_N: Tensor) -> Tensor:
    """(N,) float64: |x - mean|² of every token, about the mean of the tokens where kept_N (N,) is True."""
    on_device_N = kept_N.to(x_ND.device)
    mean_D = torch.zeros(x_ND.shape[1], dtype=torch.float64, device=x_ND.device)
    for rows in row_slices(len(x_ND), BATCH_TOKENS):
        mean_D += x_ND[rows][on_device_N[rows]].double().sum(0)
    mean_D /= max(int(kept_N.sum()), 1)
    total_N = torch.zeros(len(x_ND), dtype=torch.float64)
    for rows in row_slices(len(x_ND), BATCH_TOKENS):
        total_N[rows] = (x_ND[rows].double() - mean_D).square().sum(-1).cpu()
    return total_N


def resampling_units(doc_n: Tensor) -> tuple[NDArray[np.int64], str]:
    """(n,) unit of each token, from 0, and what units are: documents, or blocks of rows where there are not two."""
    names, unit_n = np.unique(doc_n.cpu().numpy(), return_inverse=True)
    if len(names) >= 2:
        return unit_n.astype(np.int64), "documents"
    block = max(-(-len(doc_n) // BLOCKS), 1)
    return np.arange(len(doc_n)) // block, f"blocks of {block} rows"


def row_slices(n: int, size: int) -> Iterator[slice]:
    """0:size, size:2·size ... up to n."""
    if size < 1:
        raise CosaeError(f"batch_tokens must be at least 1; got {size} instead")
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
