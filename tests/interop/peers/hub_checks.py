"""Runs where sae-lens is installed beside what cosae needs: SAELens loads what cosae pushed, from a server that the
caller started (HF_ENDPOINT). Prints the codes of fixed inputs as JSON.

    PYTHONPATH=src HF_ENDPOINT=… python hub_checks.py REPO FOLDER D
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sae_lens import SAE

    import cosae.interop.saelens.plugin  # noqa: F401  # makes the cosine scores known to SAELens


def main(repo: str, folder: str, d: str) -> dict[str, Any]:
    sae = SAE.from_pretrained(repo, folder)
    if isinstance(sae, tuple):
        sae = sae[0]
    x = torch.randn(20, int(d), generator=torch.Generator().manual_seed(3)) * 3
    with torch.no_grad():
        return {"class": type(sae).__name__, "codes": sae.encode(x).tolist(), "reconstructed": sae(x).tolist()}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
