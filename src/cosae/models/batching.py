"""How many sequences fit one forward pass.

    bytes(n) = b₁ + (n − 1) · (b₂ − b₁)

b₁ and b₂ are what passes over one and over two sequences hold at most at once, beside the weights: measured, by
following every tensor that the pass makes until it is let go. What single operations use and return within themselves
is not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cosae.errors import check_least
from cosae.io.memory import total_memory
from cosae.models.hooks import read_sites
from cosae.models.sites import resolve_site
from cosae.types import Sequences, Site

BUDGET_FRAC = 1 / 8
"""Of the device's memory, for what one pass holds beside the weights."""
ENOUGH_TOKENS = 4096
"""Tokens of a pass beyond which passes get no faster on a processor, and hardly on a GPU."""


def choose_batch(
    model: nn.Module,
    sites: str | Site | Sequence[str | Site],
    context: int,
    store_dtype: torch.dtype = torch.float32,
    budget_bytes: int | None = None,
) -> int:
    """Sequences of `context` tokens for one pass: the largest power of two within the budget and ENOUGH_TOKENS.

    budget_bytes: BUDGET_FRAC of the memory of the model's device where it is None: of all of it, not of what is free
    now, so that the same machine gives the same number. At least 1, even where one sequence is over the budget.
    """
    check_least("context", context, 1)
    asked = (sites,) if isinstance(sites, str | Site) else tuple(sites)
    places = [resolve_site(model, site) for site in asked]
    device = next(model.parameters()).device
    budget = int(BUDGET_FRAC * device_bytes(device)) if budget_bytes is None else budget_bytes
    one, two = (measure_pass(model, places, n, context, store_dtype) for n in (1, 2))
    fits = 1 + max(budget - one, 0) // max(two - one, 1)
    most = max(1, min(fits, ENOUGH_TOKENS // context))
    return int(2 ** (most.bit_length() - 1))


def measure_pass(
    model: nn.Module, sites: Sequence[Site], n_sequences: int, context: int, store_dtype: torch.dtype = torch.float32
) -> int:
    """Bytes that a capture of n_sequences × context tokens holds at most at once, beside the model's weights."""
    ids_ST = torch.zeros(n_sequences, context, dtype=torch.int64)
    index_ST = torch.arange(context, dtype=torch.int32).expand(n_sequences, context)
    real_ST = torch.ones_like(ids_ST, dtype=torch.bool)
    batch = Sequences(ids_ST, torch.zeros_like(index_ST), index_ST, real_ST, ~real_ST)
    read_sites(model, batch[:1], sites, store_dtype, "cpu")  # the first pass is longer: it is not cut short
    with _Live(model) as live:
        read_sites(model, batch, sites, store_dtype, "cpu")
    return int(live.peak)


def device_bytes(device: torch.device) -> int:
    """All memory of a device, as far as this process may use it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return total_memory()


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the memory of every tensor made while it is on. `peak`: bytes, at the worst moment."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._weights:
                    weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                    self._held[storage._cdata] = weak, storage.nbytes()
        held = self._held.items()
        self._held = {key: (weak, n) for key, (weak, n) in held if not weak.expired()}  # type: ignore[no-untyped-call]
        self.peak = max(self.peak, sum(n for _, n in self._held.values()))
        return made
