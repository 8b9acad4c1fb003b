"""The mathematics of `sae`, fast: one visible place, `choose`, decides which path serves."""

from cosae.kernels.cache import StepCache, Workspace
from cosae.kernels.choose import KERNELS, Kernel, choose, describe
from cosae.kernels.memory import keep_memory
from cosae.kernels.terms import Entries, ScoreTerms

__all__ = ["KERNELS", "Entries", "Kernel", "ScoreTerms", "StepCache", "Workspace", "choose", "describe", "keep_memory"]
