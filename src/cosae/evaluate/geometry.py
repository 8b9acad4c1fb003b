"""The geometry of an SAE's features: how alike, how many dimensions, does the encoder look where the decoder points.

In: a cosae SAE (or decoder rows). Out: plain numbers. All rows are normalised first; nothing else is assumed of them.

    max cosine of i       max_{j ≠ i} cos(d_i, d_j), signed: opposite rows are not alike
    near duplicates       pairs i < j with cos(d_i, d_j) ≥ 0.9 (the paper counts from 0.5: pass duplicate_cosine)
    effective dimension   of the rows' second moment M = Σ d_i d_iᵀ / F (trace 1), from all D eigenvalues λ:
                          participation ratio 1 / Σ λ²,  entropy dimension exp(−Σ λ ln λ)
                          (the paper's rank-512 SVD caps it: paper §9 B14)
    alignment of i        cos(w_i, d_i)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cosae.activations.sinks import quantiles
from cosae.errors import CosaeError
from cosae.sae.model import SAE
from cosae.types import at_least_fp32

DUPLICATE_COSINE = 0.9
LISTED_PAIRS = 100
LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
CHUNK_ELEMENTS = 1 << 25
"""Cosines held at once: 128 MB in fp32."""


@torch.no_grad()
def geometry(sae: SAE, *, alive_F: Tensor | None = None, duplicate_cosine: float = DUPLICATE_COSINE) -> dict[str, Any]:
    """Geometry of all features, or of those where alive_F (F,) bool is True, as plain numbers.

    Keys: `features`, `decoder` and `encoder` (see `describe_rows`; the pairs listed are feature ids), `alignment`: mean
    and quantiles of cos(w_i, d_i) over features (`alignment` gives each).
    Raises CosaeError for a mask of another length or without features.
    """
    keep_F = torch.ones(sae.d_sae, dtype=torch.bool) if alive_F is None else alive_F.cpu()
    if keep_F.dtype != torch.bool or tuple(keep_F.shape) != (sae.d_sae,) or not bool(keep_F.any()):
        raise CosaeError(
            f"geometry needs a boolean mask with one entry for each of {sae.d_sae} features, at least one True."
        )
    aligned_F = alignment(sae)[keep_F]
    found: dict[str, Any] = {
        "features": int(keep_F.sum()),
        "decoder": describe_rows(sae.W_dec.detach()[keep_F], duplicate_cosine),
        "encoder": describe_rows(sae.W_enc.detach().T[keep_F], duplicate_cosine),
        "alignment": {
            "mean": float(aligned_F.mean()),
            "levels": list(LEVELS),
            "quantiles": list(quantiles(aligned_F, LEVELS)),
        },
    }
    ids = keep_F.nonzero()[:, 0].tolist()
    for side in ("decoder", "encoder"):
        near = found[side]["near_duplicates"]
        near["closest"] = [[ids[i], ids[j], cosine] for i, j, cosine in near["closest"]]
    return found


@torch.no_grad()
def alignment(sae: SAE) -> Tensor:
    """(F,) float64 on the CPU: cos(w_i, d_i) of each feature; 0 where either row is 0."""
    encoder_FD, decoder_FD = unit_rows(sae.W_enc.detach().T), unit_rows(sae.W_dec.detach())
    return (encoder_FD * decoder_FD).sum(-1, dtype=torch.float64).clamp(-1, 1).cpu()


@torch.no_grad()
def describe_rows(rows_FD: Tensor, duplicate_cosine: float = DUPLICATE_COSINE) -> dict[str, Any]:
    """Geometry of rows (F, D): `mean_max_cosine` and its quantiles, near duplicates, effective dimension.

    near_duplicates: {"cosine", "pairs" (how many), "features" (in at least one pair), "frac", "closest": up to 100 of
    [i, j, cosine], closest first; i and j count within the rows given}. Zero rows have cosine 0 with everything and are
    left out of the effective dimension. A single row has no max cosine (None).
    """
    if not 0 < duplicate_cosine <= 1:
        raise CosaeError(
            f"the cosine of near duplicates must lie above 0 and at most 1. Got {duplicate_cosine} instead."
        )
    closest_F, near_duplicates = _neighbours(unit_rows(rows_FD), duplicate_cosine)
    several = len(rows_FD) > 1
    return {
        "mean_max_cosine": float(closest_F.double().mean()) if several else None,
        "max_cosine_levels": list(LEVELS),
        "max_cosine_quantiles": list(quantiles(closest_F, LEVELS)) if several else None,
        "near_duplicates": near_duplicates,
        **effective_dimension(rows_FD),
    }


def effective_dimension(rows_FD: Tensor) -> dict[str, float | None]:
    """Participation ratio and entropy dimension of the normalised rows' second moment, from its full spectrum.

    Equal to n for n orthogonal directions used alike, and to 1 where all rows are parallel. None without non-zero rows.
    """
    unit_FD = unit_rows(rows_FD.double())
    unit_FD = unit_FD[(unit_FD != 0).any(-1)]
    if not len(unit_FD):
        return {"participation_ratio": None, "entropy_dimension": None}
    moment_DD = unit_FD.T @ unit_FD / len(unit_FD)
    spectrum_D = torch.linalg.eigvalsh(moment_DD).clamp_min(0)
    spectrum_D = spectrum_D / spectrum_D.sum()
    entropy = -float(torch.special.xlogy(spectrum_D, spectrum_D).sum())
    return {
        "participation_ratio": 1 / float(spectrum_D.square().sum()),
        "entropy_dimension": float(torch.tensor(entropy, dtype=torch.float64).exp()),
    }


def unit_rows(rows_FD: Tensor) -> Tensor:
    """Rows of length 1, at least fp32; zero rows stay zero."""
    wide_FD = at_least_fp32(rows_FD)
    return normalize(wide_FD, dim=-1, eps=torch.finfo(wide_FD.dtype).tiny)


def _neighbours(unit_FD: Tensor, duplicate_cosine: float) -> tuple[Tensor, dict[str, Any]]:
    """(F,) largest cosine with another row, and the near duplicates.

    By chunks; only the closest pairs are kept one by one, since F parallel rows make F²/2 of them.
    """
    n = len(unit_FD)
    closest_F, n_pairs, pairs = torch.zeros(n), 0, list[tuple[int, int, float]]()
    step = max(1, CHUNK_ELEMENTS // max(n, 1))
    for start in range(0, n, step):
        cosine_CF = unit_FD[start : start + step] @ unit_FD.T
        own = torch.arange(len(cosine_CF))
        cosine_CF[own, start + own] = -torch.inf
        closest_C = cosine_CF.max(-1).values
        closest_F[start : start + step] = closest_C.cpu()
        # most rows have no near duplicate: the costly search is over the others
        first_R = (closest_C >= duplicate_cosine).nonzero()[:, 0].cpu()
        cosine_RF = cosine_CF[first_R.to(cosine_CF.device)].cpu()
        near_RF = (cosine_RF >= duplicate_cosine) & (torch.arange(n)[None, :] > (start + first_R)[:, None])
        place_P, column_P = near_RF.nonzero(as_tuple=True)
        n_pairs += len(place_P)
        value_P, order_P = cosine_RF[place_P, column_P].clamp_max(1.0).sort(descending=True, stable=True)
        first = order_P[:LISTED_PAIRS]
        row_P = first_R[place_P[first]] + start
        pairs += zip(row_P.tolist(), column_P[first].tolist(), value_P[: len(first)].tolist(), strict=True)
        pairs = sorted(pairs, key=lambda pair: (-pair[2], pair[0], pair[1]))[:LISTED_PAIRS]
    paired_F = closest_F >= duplicate_cosine
    return closest_F.clamp_(max=1.0), {
        "cosine": duplicate_cosine,
        "pairs": n_pairs,
        "features": int(paired_F.sum()),
        "frac": float(paired_F.double().mean()),
        "closest": [list(pair) for pair in pairs],
    }
