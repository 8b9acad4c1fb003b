"""Run by an environment with the real eai-sparsify: SAEs it saves, read here. Prints JSON rows as its neighbours do."""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sparsify import SparseCoder, SparseCoderConfig

from cosae.errors import CosaeError
from cosae.interop.read import read_sae

D, F, K = 12, 40, 4


def made(**more: Any) -> SparseCoder:
    sae = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, **more))
    g = torch.Generator().manual_seed(1)
    for parameter in sae.parameters():
        parameter.data = (0.3 if parameter.ndim == 1 else 1.0) * torch.randn(parameter.shape, generator=g)
    return sae


@torch.no_grad()
def compare(folder: Path) -> float:
    """As the package itself opens the folder again; its decoder normalised or not."""
    theirs, mine = SparseCoder.load_from_disk(folder), read_sae(folder)
    x = torch.randn(400, D, generator=torch.Generator().manual_seed(9))
    found = theirs.encode(x)
    features = torch.zeros(len(x), F).scatter(-1, found.top_indices.long(), found.top_acts)
    recon = theirs.decode(found.top_acts, found.top_indices)
    codes = mine.encode(x)
    pairs = ((codes.to_dense(), features), (mine.decode(codes), recon))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


if __name__ == "__main__":
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, more in {"topk": {}, "topk, free decoder": {"normalize_decoder": False}}.items():
            sae = made(**more)
            if not more:
                sae.set_decoder_norm_to_unit_norm()
            sae.save_to_disk(Path(scratch) / name)
            worst = compare(Path(scratch) / name)
            rows.append({"format": "sparsify", "direction": "read", "architecture": name, "difference": worst})
        for name, more in {"transcoder": {"transcode": True}, "skip connection": {"skip_connection": True}}.items():
            made(**more).save_to_disk(Path(scratch) / name)
            said = ""
            try:
                read_sae(Path(scratch) / name)
            except CosaeError as error:
                said = str(error)
            assert name in said, said or f"a {name} was read"
    print(json.dumps({"package": f"eai-sparsify {version('eai-sparsify')}", "rows": rows}))
