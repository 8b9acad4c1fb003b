"""One call of a model's body → the `Window` of its tokens.

Versions and families of transformers say in different ways where the tokens of a call stand: `position_ids`,
`cache_position`, a cache under one of several names, the width of the attention mask. All that are given are read, and
they must agree; nothing is taken for position 0 because it could not be read.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from cosae.errors import CosaeError
from cosae.models.hooks import positions
from cosae.models.intervene.window import Window
from cosae.models.parts import text_config

CACHE_NAMES = ("past_key_values", "past_key_value", "cache", "cache_params", "layer_past", "past", "state", "mems")
"""Arguments that hold what earlier calls left. Any other argument that can tell its `get_seq_length` counts too."""


def read_window(body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Window:
    """The window of a model's body called with these arguments.

    Without an attention mask every token is real. Of a mask already made four-dimensional (static caches), each
    token's own column counts: padding is masked even for itself. Raises CosaeError where the call gives neither ids
    nor embeddings, or a mask of another shape, or where its tokens' places cannot be read or contradict one another.
    """
    given = _arguments(body, args, kwargs)
    ids_ST = given.get("input_ids")
    tokens = ids_ST if ids_ST is not None else given.get("inputs_embeds")
    if tokens is None:
        raise CosaeError("a spliced model must be called with input_ids or inputs_embeds. Got neither.")
    shape, device = (int(tokens.shape[0]), int(tokens.shape[1])), tokens.device
    mask, told_ST = _mask(given.get("attention_mask")), _told(given.get("position_ids"), shape, device)
    start, is_counted = _start(body, given, mask, told_ST, shape)
    if mask is None:
        real_ST = torch.ones(shape, dtype=torch.bool, device=device)
        counted_ST: Tensor | None = start + positions(real_ST)
    elif mask.ndim == 4:
        real_ST = _own_column(mask, shape, start).to(device)
        counted_ST = positions(real_ST) if start == 0 else _attended(body, mask, shape, start)
        counted_ST = None if counted_ST is None else counted_ST.to(device)
    else:
        mask = mask.bool().to(device)
        end = start + shape[1]
        real_ST, counted_ST = mask[:, start:end], positions(mask)[:, start:end]
    return Window(real_ST, _agreed(told_ST, counted_ST, real_ST, start, is_counted), start, ids_ST)


def _arguments(body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """By name, everything but None that the call gives, whatever the body calls its **kwargs."""
    signature = inspect.signature(body.forward)
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return {name: value for name, value in given.items() if value is not None}


def _mask(given: Any) -> Tensor | None:
    mask: Tensor | None = given
    if isinstance(given, dict):  # one mask a kind of layer
        shown = [one for one in (given.get("full_attention"), *given.values()) if one is not None]
        mask = next(iter(shown), None)
    if mask is not None and not isinstance(mask, Tensor):
        raise CosaeError(
            f"attention_mask must be a tensor, to see what is padding. Got {type(mask).__name__} instead: load the "
            "model with attn_implementation 'sdpa' or 'eager'."
        )
    return mask


def _told(position_ids: Any, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """(S, T) position_ids; None without them, and where they count in more than one dimension (images in text)."""
    if not isinstance(position_ids, Tensor):
        return None
    if position_ids.ndim == 3:
        if not bool((position_ids == position_ids[:1]).all()):
            return None
        position_ids = position_ids[0]
    told: Tensor = position_ids.to(device, torch.int64)
    try:
        return told.expand(shape)
    except RuntimeError:
        raise CosaeError(
            f"position_ids must be (sequences, tokens), here {shape}. Got {tuple(told.shape)} instead."
        ) from None


def _start(
    body: nn.Module, given: dict[str, Any], mask: Tensor | None, told_ST: Tensor | None, shape: tuple[int, int]
) -> tuple[int, bool]:
    """How many columns earlier calls left in the cache, and whether the call holds a cache or says so of itself."""
    said: dict[str, int] = {}
    column = given.get("cache_position")
    if isinstance(column, Tensor) and column.numel():
        said["cache_position"] = int(column.reshape(-1)[0])
    unread = []
    for name, value in given.items():
        length = _length(value)
        if length is None and name in CACHE_NAMES and not isinstance(value, bool):
            unread.append(name)
        elif length is not None and not _is_cut(body, length, said.get("cache_position", 0)):
            said[name] = length
    has_cache = bool(said)
    if mask is not None and mask.ndim != 4:
        expected = next(iter(said.values()), 0) + shape[1]
        if mask.ndim != 2 or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
            raise CosaeError(
                f"attention_mask must be (sequences, tokens), tokens in the cache included: here ({shape[0]}, "
                f"{expected}). Got {tuple(mask.shape)} instead."
            )
        beyond = next(iter(said.values()), int(mask.shape[1])) + shape[1]
        width = beyond if beyond < mask.shape[1] and not mask[:, beyond:].any() else int(mask.shape[1])  # static caches
        said["attention_mask"] = width - shape[1]
    if len(set(said.values())) > 1:
        listed = ", ".join(f"{name} {n}" for name, n in said.items())
        raise CosaeError(
            f"the call contradicts itself about how many tokens came before it ({listed}): make them agree."
        )
    if said or not unread:
        start = next(iter(said.values()), 0)
        return start, has_cache or start > 0
    if told_ST is not None and bool((told_ST == told_ST[:1, :1] + torch.arange(shape[1], device=told_ST.device)).all()):
        return int(told_ST[0, 0]), True
    raise CosaeError(
        f"the call continues from {unread[0]} ({type(given[unread[0]]).__name__}), which does not tell how many tokens "
        "it holds: generate with use_cache=False, or pass attention_mask over all tokens, cached ones included."
    )


def _length(value: Any) -> int | None:
    """How many columns a cache holds; None for what is none, or does not know (recurrent states)."""
    if not hasattr(value, "get_seq_length"):
        return None
    try:
        return int(value.get_seq_length())  # static caches count in a tensor of their own: read now
    except (ValueError, IndexError, AttributeError, NotImplementedError):
        return None


def _is_cut(body: nn.Module, length: int, column: int) -> bool:
    """Whether a cache tells the length of its sliding window only, as those of older transformers do."""
    return any(window <= length < column for window in _spans(body))


def _spans(body: nn.Module) -> list[int]:
    """How far back layers of the model look, where they do not look at everything."""
    config = text_config(body)
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return [span for span in found if span]


def _own_column(mask: Tensor, shape: tuple[int, int], start: int) -> Tensor:
    """(S, T) bool: whether each token may attend to itself, from a (S, 1, T, columns) mask."""
    n_tokens, n_columns = shape[1], mask.shape[-1]
    row_T = torch.arange(n_tokens, device=mask.device)
    first = start if start + n_tokens <= n_columns else n_columns - n_tokens  # a sliding cache keeps the last ones
    return _allowed(mask[:, 0, row_T, first + row_T]).expand(shape)


def _attended(body: nn.Module, mask: Tensor, shape: tuple[int, int], start: int) -> Tensor | None:
    """(S, T) how many tokens each attends to before itself; None where the mask leaves out distant ones."""
    if mask.shape[-1] < start + shape[1] or _spans(body):
        return None
    return (_allowed(mask[:, 0]).sum(-1) - 1).clamp(min=0).expand(shape)


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def _agreed(told_ST: Tensor | None, counted_ST: Tensor | None, real_ST: Tensor, start: int, is_counted: bool) -> Tensor:
    """(S, T) positions, from position_ids and from the count of real tokens, where either may be unknown.

    A call without a cache may give any position_ids: documents in one row, each from 0. Those that number the padded
    columns say nothing else than the mask.
    """
    if told_ST is None:
        if counted_ST is None:
            raise CosaeError(
                "where the tokens of this call stand cannot be read: its mask is a sliding one and it has no "
                "position_ids; pass them, or a mask of shape (sequences, tokens)."
            )
        return counted_ST
    column_ST = start + torch.arange(real_ST.shape[1], device=real_ST.device).expand(real_ST.shape)
    if counted_ST is None:
        wrong_ST = real_ST & ((told_ST > column_ST) | (told_ST < 0))
    elif any(bool((told_ST == same_ST)[real_ST].all()) for same_ST in (counted_ST, column_ST)):
        return counted_ST
    else:
        wrong_ST = real_ST & (told_ST != counted_ST) & is_counted
    if bool(wrong_ST.any()):
        row, token = (int(i) for i in wrong_ST.nonzero()[0])
        before = int((column_ST if counted_ST is None else counted_ST)[row, token])
        raise CosaeError(
            f"the call contradicts itself: position_ids puts token {token} of sequence {row} at position "
            f"{int(told_ST[row, token])}, but {before} come before it, with {start} in the cache."
        )
    return told_ST.masked_fill(~real_ST, 0)
