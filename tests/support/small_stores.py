"""Small stores and rows for them, that the tests of stores share."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cosae.activations.store.shards import ShardRows
from cosae.activations.store.writer import StoreWriter
from cosae.types import Activations

REQUEST = {"model": "none", "corpus": "made up", "seed": 0}
WRITTEN_BY = {"commit": None, "packages": {"torch": "2"}}
NAMES = {"held_out": ["doc a"], "train": ["doc b", "doc c"]}


def rows(n: int, d: int = 6, seed: int = 0, document: int = 1, labels: int = 0) -> ShardRows:
    """n rows of width d; every id is another number."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(n, d, generator=generator)
    some = torch.arange(n, dtype=torch.int32)
    bare = Activations.bare(x_ND, x_ND.norm(dim=-1))
    known = replace(
        bare,
        token_N=some + 7,
        doc_N=torch.full_like(some, document),
        position_N=some % 5,
        index_N=some + 3,
        special_N=some % 4 == 0,
    )
    if not labels:
        return ShardRows(known)
    packed_NL = torch.randint(0, 256, (n, -(-labels // 8)), dtype=torch.uint8, generator=generator)
    return ShardRows(known, packed_NL, some % 3 != 0)


def write_store(
    folder: Path,
    train: ShardRows,
    held_out: ShardRows | None = None,
    *,
    dtype: str = "float32",
    shard_tokens: int = 16,
    concepts: list[str] | None = None,
    request: dict[str, Any] | None = None,
) -> Path:
    """A finished store of these rows."""
    writer = StoreWriter(
        folder,
        request or REQUEST,
        WRITTEN_BY,
        d_in=int(train.activations.x_ND.shape[1]),
        dtype=dtype,
        shard_tokens=shard_tokens,
        concepts=concepts,
    )
    for side, some in (("held_out", held_out), ("train", train)):
        if some is not None:
            writer.append(side, 0, some)
        writer.end(side)
    writer.finish(NAMES)
    return folder


def fingerprint(folder: Path) -> str:
    """SHA-256 over the names and bytes of all files below a folder."""
    running = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            running.update(f"{path.relative_to(folder)}:".encode() + path.read_bytes())
    return running.hexdigest()
