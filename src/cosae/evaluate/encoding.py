"""Activations → codes of all of them: the inference rule, batch by batch, nothing changed."""

from __future__ import annotations

import torch

from cosae.evaluate.rebuilt import Autoencoder
from cosae.types import Activations, Codes

ENCODE_TOKENS = 8192


@torch.no_grad()
def encode_all(sae: Autoencoder, activations: Activations) -> Codes:
    """Codes of N activations, encoded in batches. CPU tensors."""
    parts = [sae.encode(rows.float()) for rows in torch.split(activations.x_ND, ENCODE_TOKENS)]
    counts = torch.cat([codes.count_B for codes in parts]).cpu()
    offset = torch.zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offset[1:])
    return Codes(
        offset,
        torch.cat([codes.feature_E for codes in parts]).cpu(),
        torch.cat([codes.value_E for codes in parts]).detach().cpu(),
        sae.d_sae,
        (len(activations),),
    )
