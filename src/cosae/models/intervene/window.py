"""The tokens of one forward pass: which are real, where each stands, and which of them something is done to.

A pass of `generate` with a key-value cache holds the new tokens only; their positions go on counting from
those in the cache, so that a position means the same with and without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cosae.activations.filter import Filter
from cosae.activations.sinks import sink_mask
from cosae.errors import CosaeError
from cosae.io.values import from_plain
from cosae.models.hooks import positions
from cosae.types import Activations

Where = str | Tensor | slice | tuple[int, ...]
"""Which tokens an edit is made at: see `chosen`."""

Policy = str | Filter | Tensor | Callable[[Activations], Tensor]
"""Which tokens an SAE stands in for: see `covered`. None in its place: the SAE's own filter."""


@dataclass(frozen=True)
class Window:
    """The tokens of one pass. S sequences, T positions.

    mask_ST      (S, T) bool    real tokens
    position_ST  (S, T) int64   real tokens before each, those in the cache included; 0 in leading padding
    start        column of the first token in the whole, padded sequence: how many columns the cache holds
    ids_ST       (S, T) int64   token ids, None where the model was given embeddings
    """

    mask_ST: Tensor
    position_ST: Tensor
    start: int = 0
    ids_ST: Tensor | None = None

    @classmethod
    def of(cls, mask_ST: Tensor, ids_ST: Tensor | None = None) -> Window:
        """The window of whole sequences, from their mask of real tokens."""
        mask_ST = mask_ST.bool()
        return cls(mask_ST, positions(mask_ST), 0, ids_ST)

    @property
    def shape(self) -> tuple[int, int]:
        return (int(self.mask_ST.shape[0]), int(self.mask_ST.shape[1]))

    def to(self, device: torch.device) -> Window:
        """The same on another device."""
        ids_ST = None if self.ids_ST is None else self.ids_ST.to(device)
        return replace(self, mask_ST=self.mask_ST.to(device), position_ST=self.position_ST.to(device), ids_ST=ids_ST)


def check_where(where: Any) -> Where:
    """`at` of an edit in its one form. Raises CosaeError for anything `chosen` does not know."""
    if isinstance(where, slice) or (isinstance(where, str) and where in ("all", "last")):
        return where
    if isinstance(where, Tensor) and where.dtype == torch.bool and where.ndim == 2:
        return where
    if isinstance(where, int) and not isinstance(where, bool):
        where = (where,)
    if isinstance(where, Iterable) and not isinstance(where, str | Tensor):
        listed = tuple(where)
        if listed and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in listed):
            return listed
    raise CosaeError(
        "at must be 'all', 'last', positions counted in real tokens from 0 (numbers or a slice), or an (S, T) boolean "
        f"tensor. Got {where if not isinstance(where, Tensor) else tuple(where.shape)!r} instead."
    )


def chosen(where: Where, window: Window) -> Tensor:
    """(S, T) bool: the real tokens meant.

    "all"; "last": the last real token of each sequence of this pass; a slice or numbers: positions counted in real
    tokens from 0, those in the cache included; an (S, T) boolean tensor over the columns of the whole, padded
    sequence: columns beyond it (later tokens of `generate`) are not meant. Raises CosaeError for a tensor of another
    number of sequences.
    """
    position_ST, mask_ST = window.position_ST, window.mask_ST
    if isinstance(where, Tensor):
        return columns(where, window, "at") & mask_ST
    if where == "all":
        return mask_ST
    if where == "last":
        column_ST = torch.where(mask_ST, torch.arange(window.shape[1], device=mask_ST.device), -1)
        return mask_ST & (column_ST == column_ST.amax(1, keepdim=True))
    if isinstance(where, slice):
        if any(end is not None and end < 0 for end in (where.start, where.stop)) or where.step not in (None, 1):
            raise CosaeError(f"a slice of positions counts forwards from 0, slice(3, None) for one. Got {where!r}.")
        after_ST = position_ST >= (where.start or 0)
        return mask_ST & after_ST & (position_ST < where.stop if where.stop is not None else after_ST)
    return mask_ST & torch.isin(position_ST, torch.tensor(where, device=position_ST.device))


def columns(mask: Tensor, window: Window, name: str) -> Tensor:
    """(S, T) bool: the columns of a whole (S, columns) mask that this pass holds; False beyond its end."""
    n_sequences, n_tokens = window.shape
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[0] != n_sequences:
        raise CosaeError(
            f"{name} as a tensor must be boolean of shape ({n_sequences} sequences, tokens). "
            f"Got {mask.dtype} of shape {tuple(mask.shape)} instead."
        )
    part = mask[:, window.start : window.start + n_tokens].to(window.mask_ST.device)
    missing = n_tokens - part.shape[1]
    return torch.cat([part, part.new_zeros(n_sequences, missing)], dim=1) if missing else part


def resolve_policy(policy: Policy | None, metadata: dict[str, Any]) -> Policy:
    """The policy with the filter from the SAE's metadata filled in; None: that filter, "all" where there is none.

    Raises CosaeError for an unknown word, and for "filter" and "sinks_out" where the SAE carries no filter.
    """
    if policy is None:
        return own_filter(metadata) or "all"
    if not isinstance(policy, str) or policy == "all":
        return policy
    if policy not in ("filter", "sinks_out"):
        raise CosaeError(
            "tokens must be 'all', 'filter', 'sinks_out', a Filter, an (S, T) boolean tensor or a function of "
            f"Activations. Got {policy!r} instead."
        )
    fitted = own_filter(metadata)
    if fitted is None:
        raise CosaeError(
            f"tokens={policy!r} needs the filter the SAE was trained with, which this one does not carry: pass a "
            "cosae.activations.filter.Filter, or tokens='all'."
        )
    if policy == "filter":
        return fitted
    factor, median = fitted.policy.factor, fitted.median_norm
    if not median > 0:
        raise CosaeError(
            "tokens='sinks_out' needs the median norm of the SAE's training, which it does not carry: give no tokens, "
            "for the filter of its training, or pass a cosae.activations.filter.Filter."
        )
    return lambda activations: ~sink_mask(activations, median, factor)


def own_filter(metadata: dict[str, Any]) -> Filter | None:
    """The filter an SAE was trained with, with the threshold that training used; None where it does not say."""
    return from_plain(Filter, metadata["filter"], "the SAE's filter") if "filter" in metadata else None


def covered(policy: Policy, x_ND: Tensor, window: Window, special_ids: tuple[int, ...]) -> Tensor:
    """(N,) bool, N = S·T: the tokens an SAE stands in for. Padding and all-zero rows never are.

    "all"; a Filter: those it keeps; a tensor: `columns`; a function: its answer for the tokens as `Activations`
    (norms, positions, ids and special ids known, documents not). x_ND: (N, D) at least fp32.
    """
    real_N = window.mask_ST.reshape(-1) & (x_ND != 0).any(-1)
    if isinstance(policy, Tensor):
        return columns(policy, window, "tokens").reshape(-1) & real_N
    if isinstance(policy, str):
        return real_N
    kept_N = (policy.keep if isinstance(policy, Filter) else policy)(_as_activations(x_ND, window, special_ids))
    if not isinstance(kept_N, Tensor) or kept_N.dtype != torch.bool or kept_N.shape != real_N.shape:
        raise CosaeError(f"tokens as a function must return a boolean tensor of shape ({len(real_N)},), one per token.")
    return kept_N.to(real_N.device) & real_N


def _as_activations(x_ND: Tensor, window: Window, special_ids: tuple[int, ...]) -> Activations:
    x_ND = x_ND.detach()
    bare = Activations.bare(torch.where(window.mask_ST.reshape(-1, 1), x_ND, 0.0))
    position_N = window.position_ST.reshape(-1).to(torch.int32)
    if window.ids_ST is None:
        return replace(bare, position_N=position_N)
    ids_N = window.ids_ST.reshape(-1)
    special_N = torch.isin(ids_N, torch.tensor(special_ids, dtype=ids_N.dtype, device=ids_N.device))
    return replace(bare, position_N=position_N, token_N=ids_N.to(torch.int32), special_N=special_N)
