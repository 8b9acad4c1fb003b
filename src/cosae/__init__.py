"""cosae: train and evaluate sparse autoencoders with inner-product and cosine scores, side by side.

import cosae
sae = cosae.SAE.build(d_in=768, d_sae=12288, score="cosine", selector="batch_topk", k=64, seed=0)
codes = sae.encode(x)              # sparse
x_hat = sae.decode(codes)
run = cosae.fit(x, ["standard", "cosine"], d_sae=4096, k=32)
"""

from __future__ import annotations

import os
import sys

if "torch" not in sys.modules:
    # OpenMP threads that spin while they wait slow every step tenfold as soon as another program wants the cores;
    # read once, when torch loads. Set OMP_WAIT_POLICY yourself to decide otherwise.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from cosae.errors import CosaeError
from cosae.sae.config import SAEConfig
from cosae.sae.file import load, save
from cosae.sae.model import SAE
from cosae.types import Activations, Codes

if TYPE_CHECKING:
    from cosae.models.intervene.splice import spliced
    from cosae.recipe import Recipe
    from cosae.run.execute import resume
    from cosae.run.fit import fit
    from cosae.train.arm import Arm

try:
    __version__ = version("cosae")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "SAE",
    "Activations",
    "Arm",
    "Codes",
    "CosaeError",
    "Recipe",
    "SAEConfig",
    "fit",
    "load",
    "resume",
    "save",
    "spliced",
]

_LATER = {
    "Recipe": "cosae.recipe",
    "fit": "cosae.run.fit",
    "resume": "cosae.run.execute",
    "Arm": "cosae.train.arm",
    "spliced": "cosae.models.intervene.splice",
    "load_dictionary": "cosae.interop.dictionary_learning.drop_in",
}


def __getattr__(name: str) -> Any:
    """Rooms that are heavier to import open when they are first asked for."""
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'cosae' has no attribute {name!r}")
