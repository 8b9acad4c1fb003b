"""Small pictures as PNG, by the standard library alone."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import torch
from torch import Tensor

MOST_SIDE = 64
"""Pixels of a thumbnail's longer side."""


def thumbnail(pixels_CHW: Tensor) -> bytes:
    """A PNG of what a model was given: each image from its darkest to its brightest value, shrunk to MOST_SIDE."""
    x = pixels_CHW.float().cpu()
    step = -(-max(x.shape[1:]) // MOST_SIDE)
    if step > 1:
        x = torch.nn.functional.avg_pool2d(x[None], step)[0]
    low, high = x.min(), x.max()
    levels = ((x - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8)
    return png(levels.permute(1, 2, 0).numpy())


def png(pixels_HWC: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    """Grey (H, W, 1) or coloured (H, W, 3) bytes as a PNG."""
    height, width, channels = pixels_HWC.shape
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(pixels_HWC))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
