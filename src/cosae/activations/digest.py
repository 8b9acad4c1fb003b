"""A running hash over batches, by which two runs prove that they saw the same.

    h_0 = 0,  h_{n+1} = SHA-256(h_n ‖ row hashes of batch n ‖ its token, document, position and index ids)

One digest per batch and chained, so that the state of the hash is 32 bytes which any checkpoint can hold.
"""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor

from cosae.io.generators import keyed_generator
from cosae.types import Activations


def chain(digest: bytes, batch: Activations | bytes) -> bytes:
    """The digest after one more batch, x_ND (B, D) in float32, or after the batch whose `fingerprint` is given."""
    return hashlib.sha256(digest + (batch if isinstance(batch, bytes) else fingerprint(batch))).digest()


def fingerprint(batch: Activations) -> bytes:
    """What a batch adds to a digest: the hashes of its rows, then its ids. Arms in lockstep take it once.

    A row's hash is Σ_j w_j · bits_j mod 2⁶⁴ over its fp32 bits, w fixed odd numbers (multilinear hashing): the same on
    every device, a tenth of the cost of hashing every byte, and only 8 bytes a row leave the device.
    """
    ids = (batch.token_N, batch.doc_N, batch.position_N, batch.index_N)
    targets = () if batch.y_ND is None else (_hash_rows(batch.y_ND),)
    parts = (_hash_rows(batch.x_ND), *ids, *targets)
    return b"".join(part.cpu().numpy().tobytes() for part in parts)


def _hash_rows(x_BD: Tensor) -> Tensor:
    bits_BJ = torch.nn.functional.pad(x_BD, (0, x_BD.shape[1] % 2)).contiguous().view(torch.int64)
    return (bits_BJ * _weights(bits_BJ.shape[1], str(x_BD.device))).sum(-1)


@cache
def _weights(n: int, device: str) -> Tensor:
    """(n,) int64, odd, the same in every process."""
    draw = torch.randint(-(2**62), 2**62, (n,), generator=keyed_generator(0, "digest"))
    return (2 * draw + 1).to(device)
