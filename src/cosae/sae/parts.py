"""An SAE of some of the features of another: what one of several processes trains of a wide dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from cosae.errors import CosaeError
from cosae.sae.model import SAE

OWNED = ("exponent", "log_gain", "value_exponent", "threshold")
"""Parameters and buffers that are one number for all features, or one for each of them, or (not these) for a group."""


def per_feature(sae: SAE) -> list[str]:
    """Names, in `state_dict`, of what has a row or a number for each feature."""
    state = sae.state_dict()
    leaves = {name: name.rpartition(".")[2] for name in state}
    return [
        name
        for name, leaf in leaves.items()
        if leaf.endswith(("_F", "_FD")) or (leaf in OWNED and state[name].shape == (sae.d_sae,))
    ]


def check_divides(sae: SAE, n: int) -> None:
    """Raises CosaeError where this SAE cannot be cut into n parts."""
    d_sae, groups = sae.d_sae, sae.cfg.n_groups
    if n > 1 and (sae.target is not None or sae.sites is not None):
        raise CosaeError(f"feature={n} is not for transcoders and crosscoders: share their batches, with data=N.")
    if d_sae % n:
        raise CosaeError(f"feature={n} must divide the width of every arm. Got d_sae {d_sae}: take a multiple of {n}.")
    if d_sae // n < sae.k:
        raise CosaeError(f"each of feature={n} parts must have k = {sae.k} features or more. Got {d_sae // n}.")
    if "group" in (sae.score.family.exponent_owner, sae.score.family.value_owner) and d_sae // n <= groups:
        raise CosaeError(f"each of feature={n} parts must have more features than there are groups ({groups}).")


def cut_(sae: SAE, place: int, n: int) -> SAE:
    """Make this SAE, in place, the `place`-th of n parts of itself, of as many features each."""
    check_divides(sae, n)
    width = sae.d_sae // n
    first = place * width
    for name in [*per_feature(sae), "score.group_F"]:
        owner, _, leaf = name.rpartition(".")
        module = sae.get_submodule(owner)
        value = getattr(module, leaf)
        part = value.detach()[first : first + width].clone()
        setattr(module, leaf, nn.Parameter(part) if isinstance(value, nn.Parameter) else part)
    sae.decoder.prefixes = tuple(min(max(p - first, 0), width) for p in sae.decoder.prefixes)
    sae.cfg = replace(sae.cfg, d_sae=width, prefixes=())
    return sae


def joined(parts: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
    """One mapping from those of all parts, in their order: what `names` end is put together, the rest is alike."""
    if len(parts) == 1:
        return dict(parts[0])
    return {key: torch.cat([p[key] for p in parts]) if _cut(key, x, names) else x for key, x in parts[0].items()}


def part_of(whole: Mapping[str, Tensor], names: Sequence[str], place: int, n: int) -> dict[str, Tensor]:
    """The `place`-th of n parts of such a mapping."""
    return {key: x.chunk(n)[place].clone() if n > 1 and _cut(key, x, names) else x for key, x in whole.items()}


def _cut(key: str, value: Tensor, names: Sequence[str]) -> bool:
    return key.endswith(tuple(names)) and value.dim() > 0
