"""Codes → reconstructions of z, one for each prefix. Unit rows are kept by the optimiser, not by this formula.

plain           ẑ = Σ_i f_i d_i
norm restoring  u = Σ_i f_i d_i / |d_i|,  ẑ = u · r / |u|      (paper §1, magnitude bypass)
prefixes p      ẑ_p = Σ_{i < p} f_i d_i                        (Matryoshka; the last prefix is d_sae)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cosae.kernels import ALONE, Entries, Kernel, Peers
from cosae.types import NormStats, at_least_fp32

LENGTH_MIN = 1e-8
"""Smallest |u| that is divided by when a norm is restored (paper §1)."""


class Decoder(nn.Module):
    """Owns decoder rows rows_FD (F, D); prefixes are feature counts, ascending, the last is F."""

    def __init__(self, d_in: int, d_sae: int, prefixes: tuple[int, ...], norm_restoring: bool) -> None:
        super().__init__()
        self.rows_FD = nn.Parameter(torch.zeros(d_sae, d_in))
        self.prefixes = prefixes or (d_sae,)
        self.norm_restoring = norm_restoring

    def reconstruct(
        self,
        kernel: Kernel,
        value_E: Tensor,
        entries: Entries,
        n_tokens: int,
        norm_stats: NormStats | None,
        peers: Peers = ALONE,
    ) -> tuple[Tensor, ...]:
        """One (B, D) reconstruction of z for each prefix; differentiable in values and rows."""
        rows_FD = at_least_fp32(self.rows_FD)
        if self.norm_restoring:
            norm_F: Tensor = torch.linalg.vector_norm(rows_FD, dim=-1).clamp_min(LENGTH_MIN)
            value_E = value_E / norm_F[entries.feature_E]
        sums: list[Tensor] = []
        low = 0
        for high in self.prefixes:
            if len(self.prefixes) == 1:
                part_BD = kernel.decode(value_E, entries, rows_FD, n_tokens)
            else:
                inside = ((entries.feature_E >= low) & (entries.feature_E < high)).nonzero()[:, 0]
                chosen = Entries(entries.token_E[inside], entries.feature_E[inside], cache=entries.cache)
                part_BD = kernel.decode(value_E[inside], chosen, rows_FD, n_tokens)
            sums.append(sums[-1] + part_BD if sums else part_BD)
            low = high
        if peers.feature_ranks > 1:
            sums = list(peers.features(torch.stack(sums)))
        if not self.norm_restoring:
            return tuple(sums)
        assert norm_stats is not None
        return tuple(self._restore(u_BD, norm_stats.r_B) for u_BD in sums)

    @staticmethod
    def _restore(u_BD: Tensor, r_B: Tensor) -> Tensor:
        """u · r / |u|. Where |u| = 0 (no codes, or entries of value 0: JumpReLU's window below θ, closed gates) the
        reconstruction is 0, and so is the gradient: u / max(|u|, LENGTH_MIN) would pass r / LENGTH_MIN times it."""
        length_B: Tensor = torch.linalg.vector_norm(u_BD, dim=-1)
        return u_BD * torch.where(length_B > 0, r_B / length_B.clamp_min(LENGTH_MIN), 0.0)[:, None]
