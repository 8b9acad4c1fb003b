"""cosae: train and evaluate sparse autoencoders with inner-product and cosine scores, side by side.

import cosae
sae = cosae.SAE.build(d_in=768, d_sae=12288, score="cosine", selector="batch_topk", k=64, seed=0)
codes = sae.encode(x)              # sparse
x_hat = sae.decode(codes)
run = cosae.fit(x, ["standard", "cosine"], d_sae=4096, k=32)
"""

import os as _os
import sys as _sys
from typing import TYPE_CHECKING, Any

if "torch" not in _sys.modules:
    # OpenMP threads that spin while they wait slow every step tenfold as soon as another program wants the cores;
    # read once, when torch loads. Set OMP_WAIT_POLICY yourself to decide otherwise.
    _os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if _sys.platform == "win32":
    import warnings as _warnings

    _why = "cosae needs a POSIX system (signals, renames and locks of open files): on Windows, run it in WSL"
    _warnings.warn(_why, RuntimeWarning, stacklevel=2)

if TYPE_CHECKING:
    from cosae.errors import CosaeError
    from cosae.models.intervene.splice import spliced
    from cosae.recipe import Recipe
    from cosae.run.execute import resume
    from cosae.run.finished import open_run
    from cosae.run.fit import fit
    from cosae.sae.config import SAEConfig
    from cosae.sae.file import load, save
    from cosae.sae.model import SAE
    from cosae.train.arm import Arm
    from cosae.types import Activations, Codes

    __version__: str

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
    "open_run",
    "resume",
    "save",
    "spliced",
]

_ROOMS = {
    "SAE": "cosae.sae.model",
    "Activations": "cosae.types",
    "Arm": "cosae.train.arm",
    "Codes": "cosae.types",
    "CosaeError": "cosae.errors",
    "Recipe": "cosae.recipe",
    "SAEConfig": "cosae.sae.config",
    "fit": "cosae.run.fit",
    "load": "cosae.sae.file",
    "load_dictionary": "cosae.interop.dictionary_learning.drop_in",
    "open_run": "cosae.run.finished",
    "resume": "cosae.run.execute",
    "save": "cosae.sae.file",
    "spliced": "cosae.models.intervene.splice",
}


def __getattr__(name: str) -> Any:
    """Rooms open when they are first asked for: torch alone takes a second or two to import."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("cosae")
        except PackageNotFoundError:  # a checkout that was never installed
            return "0+unknown"
    if name not in _ROOMS:
        raise AttributeError(f"module 'cosae' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    """The front door, and nothing else."""
    return sorted(__all__)
