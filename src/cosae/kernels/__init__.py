"""The mathematics of `sae`, fast: one visible place, `choose`, decides which path serves."""

from cosae.kernels.cache import StepCache, Workspace
from cosae.kernels.choose import KERNELS, Kernel, choose, describe
from cosae.kernels.memory import keep_memory
from cosae.kernels.peers import ALONE, Peers
from cosae.kernels.terms import Entries, ScoreTerms

__all__ = [
    "ALONE",
    "KERNELS",
    "Entries",
    "Kernel",
    "Peers",
    "ScoreTerms",
    "StepCache",
    "Workspace",
    "choose",
    "describe",
    "keep_memory",
]
