"""Which places of a sequence become rows, by a word or a slice.

    all                        every one
    cls                        the first, a class token (BERT, ViT)
    tokens, patches, frames    those that are not special: no BOS, no class token, no registers
    last                       the last
    mean                       one row a sequence, the mean of all its places: what sentence encoders give
    3, -1, 1:, :16, -4:        places, counted from 0 as in a Python list

Padding has no place: places are counted in real tokens.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.types import Sequences

WORDS = ("all", "cls", "tokens", "patches", "frames", "last", "mean")
_SLICE = re.compile(r"(-?\d+)?(:)?(-?\d+)?")


def check_positions(positions: str) -> None:
    """Raises CosaeError for what is neither a word nor a slice."""
    found = _SLICE.fullmatch(positions)
    if positions in WORDS or (found and (found[1] or found[2]) and (found[2] or not found[3])):
        return
    raise CosaeError(
        f"positions must be one of {', '.join(WORDS)}, or a place or slice such as 0, -1, 1: or :16. Got "
        f"{positions!r} instead."
    )


def choose_positions(sequences: Sequences, positions: str) -> Sequences:
    """The same sequences with the places chosen that become rows. Raises CosaeError where there is none of them."""
    check_positions(positions)
    if positions == "all":
        return sequences
    if positions == "mean":
        return replace(sequences, pooled=True)
    mask_ST = sequences.mask_ST
    place_ST = mask_ST.long().cumsum(1) - 1
    keep_ST = _chosen(positions, place_ST, mask_ST.sum(1, keepdim=True), sequences.special_ST) & mask_ST
    if len(sequences) and not bool(keep_ST.any()):
        advice = "; the first place here is no class token" if positions == "cls" else ""
        raise CosaeError(f"positions {positions!r} leaves no place of these sequences{advice}: choose others.")
    return replace(sequences, keep_ST=keep_ST)


def _chosen(positions: str, place_ST: Tensor, count_S1: Tensor, special_ST: Tensor) -> Tensor:
    if positions == "cls":
        return (place_ST == 0) & special_ST
    if positions in ("tokens", "patches", "frames"):
        return ~special_ST
    if positions == "last":
        return place_ST == count_S1 - 1
    found = _SLICE.fullmatch(positions)
    assert found is not None
    first = torch.as_tensor(int(found[1] or 0))
    first_S1 = torch.where(first < 0, first + count_S1, first)
    if not found[2]:
        return place_ST == first_S1
    if found[3] is None:
        return place_ST >= first_S1
    end = torch.as_tensor(int(found[3]))
    return (place_ST >= first_S1) & (place_ST < torch.where(end < 0, end + count_S1, end))
