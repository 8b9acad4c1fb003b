"""delphi's cache of latent activations, as its own `LatentCache.save_splits` writes one (eai-delphi 0.1.3).

    OUT/{module}/{first}_{last}.safetensors   locations (n, 3) uint16, uint32 where numbers are larger: row, position,
                                              latent − first; activations (n,) float16; tokens (S, T) int64
    OUT/{module}/config.json                  what delphi calls CacheConfig, with model_name

delphi never tokenises again: the tokens stored are the ones it shows. Like its own cache this drops |activation| ≤
1e-5. Special tokens have no activations. Read with delphi.latents.LatentDataset(OUT, …, modules=[module]).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from torch import nn

from cosae.errors import CosaeError
from cosae.interop.cached_codes import CachedCodes, cache_codes
from cosae.io.staged import filled
from cosae.models.sources import digest_sequences
from cosae.sae.model import SAE
from cosae.types import Sequences, Site

MARK, FORMAT, VERSION = "cosae_export.json", "cosae-delphi", 1
LEAST, LARGEST = 1e-5, float(np.finfo(np.float16).max)
SPLIT_ENTRIES = 2**25
"""A split is read whole: by default there are as many as keep each below so many entries, and at least five."""


@dataclass(frozen=True)
class Written:
    """Where the cache lies, the folder name of its module, and how many entries delphi's rules left out."""

    out: Path
    module: str
    entries: int
    dropped: int


def write_cache(
    model: nn.Module,
    site: Site,
    sae: SAE,
    sequences: Sequences,
    out: Path,
    *,
    model_name: str,
    dataset: str,
    n_splits: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    batch_sequences: int = 16,
    log: Callable[[str], None] = lambda _: None,
) -> Written:
    """Write the cache to the folder `out`, whole or not at all; an earlier one of this kind there is replaced.

    model_name  what delphi gives to AutoTokenizer: a folder or a repository
    n_splits    files; None: five, more for many entries
    Raises CosaeError as `cache_codes` does, for codes beyond float16, and where `out` holds something else.
    """
    if n_splits is not None and not 1 <= n_splits <= sae.d_sae:
        raise CosaeError(f"n_splits must be between 1 and the {sae.d_sae} features. Got {n_splits} instead.")
    module = site.module_path if site.reads == "output" else site.hook_name.replace(":", "_")
    with filled(out, f"*/{MARK}") as staged, tempfile.TemporaryDirectory(prefix=".codes.", dir=staged) as work:
        codes = cache_codes(model, site, sae, sequences, Path(work), batch_sequences=batch_sequences, log=log)
        largest = float(codes.sums.largest_F.max(initial=0))
        if largest > LARGEST:
            where = f"{largest:.4g} at feature {int(codes.sums.largest_F.argmax())}"
            raise CosaeError(f"delphi keeps float16, up to {LARGEST:g}. Got {where}: train on scaled activations.")
        total = int(codes.sums.count_F.sum())
        wanted = n_splits or min(max(5, -(-total // SPLIT_ENTRIES)), sae.d_sae)
        edges = np.linspace(0, sae.d_sae, wanted + 1).astype(int)
        (staged / module).mkdir()
        kept = 0
        for first, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            kept += _write_split(codes, first, stop, staged / module / f"{first}_{stop - 1}.safetensors")
            log(f"wrote latents {first} to {stop - 1}")
        context = int(codes.ids_ST.shape[1])
        config = {
            "dataset_repo": dataset,
            "dataset_split": "",
            "dataset_name": "",
            "dataset_column": "text",
            "batch_size": batch_sequences,
            "cache_ctx_len": context,
            "ctx_len": context,
            "n_tokens": codes.n_tokens,
            "n_splits": wanted,
            "model_name": model_name,
        }
        mark = {
            "format": FORMAT,
            "version": VERSION,
            "module": module,
            "sequences_sha256": digest_sequences(sequences),
            "entries": kept,
            "dropped": total - kept,
            **(metadata or {}),
        }
        for name, value, indent in (("config.json", config, 4), (MARK, mark, 1)):
            (staged / module / name).write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
    return Written(out, module, kept, total - kept)


def _write_split(codes: CachedCodes, first: int, stop: int, path: Path) -> int:
    """Returns how many entries the file holds."""
    context = codes.ids_ST.shape[1]
    offset, token_E, value_E = codes.entries(first, stop)
    latent_E = np.repeat(np.arange(stop - first), np.diff(offset))
    keep_E = np.abs(value_E) > LEAST
    location_E3 = np.stack([token_E // context, token_E % context, latent_E], axis=1)[keep_E]
    small = max(len(codes.ids_ST), context, stop - first) <= 2**16
    tensors = {
        "locations": location_E3.astype(np.uint16 if small else np.uint32),
        "activations": value_E[keep_E].astype(np.float16),
        "tokens": codes.ids_ST.numpy().astype(np.int64),
    }
    save_file(tensors, path)
    return int(keep_E.sum())
