"""Activations → codes of all of them: the inference rule, batch by batch, nothing changed."""

from __future__ import annotations

import torch

from cosae.evaluate.reconstruct import Autoencoder
from cosae.types import Activations, Codes

ENCODE_TOKENS = 4096


@torch.no_grad()
def encode_all(sae: Autoencoder, activations: Activations) -> Codes:
    """Codes of N activations, encoded in batches. CPU tensors."""
    return Codes.cat([sae.encode(rows.float()) for rows in torch.split(activations.x_ND, ENCODE_TOKENS)])
