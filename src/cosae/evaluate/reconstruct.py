"""One pass of activations through an SAE, and what it leaves behind per token.

In: anything with `encode`, `decode` and `d_sae`; Activations; named sets of tokens. Out: `Reconstructed`, from
which `reconstruction` makes its numbers. Encoding is the costly part, so sets that overlap (sinks in, sinks
out) share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosae.errors import CosaeError
from cosae.types import Activations, Codes

CHUNK_TOKENS = 4096
"""Rows turned into float64 at once outside the encoder: a bound on memory, of no influence on the numbers."""

BLOCKS = 256
"""Blocks of consecutive rows that stand in for documents where there are none."""


class Autoencoder(Protocol):
    """What is asked of an SAE here: the inference rule and its inverse."""

    @property
    def d_sae(self) -> int: ...

    def encode(self, x_BD: Tensor, /) -> Codes: ...

    def decode(self, codes: Codes, /) -> Tensor: ...


@dataclass(frozen=True)
class Reconstructed:
    """What one pass through an SAE leaves behind. N tokens; the mappings have one entry per set of tokens.

    error_N (N,) float64   |x - x̂|²          cosine_N (N,) float64   cos(x, x̂), 0 where either is 0
    norm_N  (N,) float64   |x̂|                l0_N     (N,) int64     codes != 0, signed ones included
    keep    name -> (N,) bool, which tokens are in the set; never padding (all-zero rows)
    fired   name -> (4, F) int64, on how many tokens of each norm quartile of the set a feature fired
    first   name -> (F,) int64, tokens of the set before the first on which a feature fired; the set's size if none
    within  name -> residual and total sum of squares about each batch's own mean
    within_quartile  name -> the same for each norm quartile, about its own mean in the batch
    codes   of all N tokens, on the CPU, where they were asked for
    """

    error_N: Tensor
    cosine_N: Tensor
    norm_N: Tensor
    l0_N: Tensor
    keep: Mapping[str, Tensor]
    fired: Mapping[str, Tensor]
    first: Mapping[str, Tensor]
    within: Mapping[str, tuple[float, float]]
    within_quartile: Mapping[str, list[tuple[float, float]]]
    batch_tokens: int
    codes: Codes | None = None


@dataclass
class _Set:
    """One set of tokens while the batches pass: its members, their norm quartiles, and its sums so far."""

    keep_N: Tensor
    quartile_N: Tensor
    place_N: Tensor
    fired_4F: Tensor
    first_F: Tensor
    within_5: list[tuple[float, float]]

    @classmethod
    def of(cls, keep_N: Tensor, norm_N: Tensor, d_sae: int) -> _Set:
        return cls(
            keep_N=keep_N,
            quartile_N=norm_quartiles(norm_N, keep_N)[0],
            place_N=torch.cumsum(keep_N.long(), 0) - 1,
            fired_4F=torch.zeros(4, d_sae, dtype=torch.int64),
            first_F=torch.full((d_sae,), int(keep_N.sum()), dtype=torch.int64),
            within_5=[(0.0, 0.0)] * 5,
        )

    def add(self, rows: slice, token_E: Tensor, feature_E: Tensor, x_BD: Tensor, residual_BD: Tensor) -> None:
        """Batch `rows`, with entries (token within the batch, feature)."""
        quartile_B = self.quartile_N[rows]
        in_E = quartile_B[token_E] >= 0
        token_E, feature_E = token_E[in_E], feature_E[in_E]
        n_features = len(self.first_F)
        flat = torch.bincount(quartile_B[token_E] * n_features + feature_E, minlength=4 * n_features)
        self.fired_4F += flat.view(4, n_features)
        self.first_F.scatter_reduce_(0, feature_E, self.place_N[rows][token_E], "amin")
        chosen = [quartile_B >= 0, *(quartile_B == q for q in range(4))]
        for i, in_B in enumerate(chosen):
            residual, total = self.within_5[i]
            in_B = in_B.to(x_BD.device)
            self.within_5[i] = (
                residual + _about_own_mean(residual_BD[in_B]),
                total + _about_own_mean(x_BD[in_B]),
            )


@torch.no_grad()
def reconstruct(
    sae: Autoencoder,
    activations: Activations,
    keep: Mapping[str, Tensor],
    batch_tokens: int = 4096,
    keep_codes: bool = False,
) -> Reconstructed:
    """One pass of encode and decode over all tokens, for any number of sets of them. Changes no state."""
    n = len(activations)
    error_N, cosine_N, norm_N = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
    l0_N = torch.zeros(n, dtype=torch.int64)
    live_N = (activations.x_ND != 0).any(-1).cpu()
    length_N = activations.norm_N.cpu().double()
    sets = {name: _Set.of(_checked(kept_N, n) & live_N, length_N, sae.d_sae) for name, kept_N in keep.items()}
    kept: list[Codes] = []
    for rows in row_slices(n, batch_tokens):
        codes = sae.encode(activations.x_ND[rows].float())
        if keep_codes:
            kept.append(Codes.cat([codes]))
        recon_BD = sae.decode(codes).double()
        x_BD = activations.x_ND[rows].to(recon_BD.device).double()
        residual_BD = x_BD - recon_BD
        error_N[rows] = residual_BD.square().sum(-1).cpu()
        norm_N[rows] = recon_BD.norm(dim=-1).cpu()
        lengths_B = x_BD.norm(dim=-1) * recon_BD.norm(dim=-1)
        cosine_N[rows] = ((x_BD * recon_BD).sum(-1) / lengths_B.clamp_min(1e-300)).cpu()
        alive_E = (codes.value_E != 0).cpu()
        token_E, feature_E = codes.token_E.cpu()[alive_E], codes.feature_E.cpu()[alive_E]
        l0_N[rows] = torch.bincount(token_E, minlength=len(x_BD))
        for one in sets.values():
            one.add(rows, token_E, feature_E, x_BD, residual_BD)
    return Reconstructed(
        error_N,
        cosine_N,
        norm_N,
        l0_N,
        keep={name: one.keep_N for name, one in sets.items()},
        fired={name: one.fired_4F for name, one in sets.items()},
        first={name: one.first_F for name, one in sets.items()},
        within={name: one.within_5[0] for name, one in sets.items()},
        within_quartile={name: one.within_5[1:] for name, one in sets.items()},
        batch_tokens=batch_tokens,
        codes=Codes.cat(kept) if kept else None,
    )


def reconstruct_with_sinks(
    sae: Autoencoder, activations: Activations, sink_N: Tensor, batch_tokens: int = 4096, keep_codes: bool = False
) -> Reconstructed:
    """`reconstruct` with the sets "in" (all tokens but padding) and "out" (those of them where sink_N is False)."""
    sink_N = _checked(sink_N, len(activations))
    return reconstruct(sae, activations, {"in": torch.ones_like(sink_N), "out": ~sink_N}, batch_tokens, keep_codes)


def norm_quartiles(norm_N: Tensor, kept_N: Tensor) -> tuple[Tensor, list[float]]:
    """(N,) norm quartile 0..3, -1 where not kept; and the five cuts. Equal norms stay in one quartile."""
    if not bool(kept_N.any()):
        return torch.full_like(kept_N, -1, dtype=torch.int64), [0.0] * 5
    cuts = np.quantile(norm_N[kept_N].numpy(), [0, 0.25, 0.5, 0.75, 1]).tolist()
    quartile_N = torch.bucketize(norm_N, torch.tensor(cuts[1:4], dtype=torch.float64))
    return torch.where(kept_N, quartile_N, -1), cuts


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


def resampling_units(doc_n: Tensor) -> tuple[NDArray[np.int64], str]:
    """(n,) unit of each token, from 0, and what units are: documents, or blocks of rows where there are not two."""
    names, unit_n = np.unique(doc_n.cpu().numpy(), return_inverse=True)
    if len(names) >= 2:
        return unit_n.astype(np.int64), "documents"
    block = max(-(-len(doc_n) // BLOCKS), 1)
    return np.arange(len(doc_n)) // block, f"blocks of {block} rows"


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
