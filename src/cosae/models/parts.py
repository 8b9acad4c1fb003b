"""Which blocks a network has, what they read, and which of its modules is called to run them.

A network has one stack of blocks or several: `text`, `vision`, `audio`, or, where it is an encoder-decoder, `encoder`
and `decoder`. A stack is run through the innermost module around it that takes what the stack reads: a language
model's body, a CLIP model's vision tower, Whisper's encoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from cosae.errors import CosaeError

INPUTS = {"input_ids": "text", "pixel_values": "images", "input_features": "audio", "input_values": "audio"}
"""Arguments of transformers' models → what is in them."""
COUNTS: tuple[str, ...] = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "depth",
    "encoder_layers",
    "decoder_layers",
)
COUNTS += ("num_encoder_layers", "num_decoder_layers")
OFFSET = ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet", "xmod", "data2vec-text", "ibert")
"""Models whose first position is number pad_token_id + 1."""
WORDS = {"vision": "vision", "visual": "vision", "image": "vision", "audio": "audio", "speech": "audio"}


@dataclass(frozen=True)
class Part:
    """One stack of blocks.

    name      text, vision, audio, encoder or decoder: what short names of its sites begin with where it is not main
    path      of the list of blocks
    n_blocks  how many run, one after another: more than the list holds where some run again (ALBERT)
    is_main   whether a short name without a beginning means it
    """

    name: str
    path: str
    n_blocks: int
    is_main: bool = False

    @property
    def start(self) -> str:
        """What its sites' short names begin with."""
        return "" if self.is_main else f"{self.name}."


def find_parts(model: nn.Module) -> list[Part]:
    """The stacks of blocks, those of a language model first; none where no list has as many entries as a configuration
    says that there are layers."""
    counts = set(_counts(getattr(model, "config", None)))
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found = {path: len(module) for path, module in lists.items() if len(module) in counts and "conv" not in path}
    for path, module in lists.items():
        if path.endswith("albert_layer_groups"):
            found[path] = int(getattr(getattr(model, "config", None), "num_hidden_layers", len(module)))
    outer = {p: n for p, n in found.items() if not any(p.startswith(f"{other}.") for other in found)}
    deep = [path for path in outer if any(True for _ in lists[path][0].children())]
    by_name: dict[str, Part] = {}
    for path in sorted(deep or [*outer], key=lambda path: path.count(".")):
        by_name.setdefault(name := _name(model, path), Part(name, path, outer[path]))
    parts = sorted(by_name.values(), key=lambda part: part.name != "text")
    if parts and (len(parts) == 1 or (parts[0].name == "text" and not hasattr(model, "get_text_features"))):
        parts[0] = Part(parts[0].name, parts[0].path, parts[0].n_blocks, is_main=True)
    return parts


def main_part(model: nn.Module) -> Part:
    """The stack that a short name without a beginning means. Raises CosaeError where there is none."""
    parts = find_parts(model)
    if not parts:
        raise CosaeError(
            f"{type(model).__name__} has no list of blocks that its configuration tells of; name a site by its module "
            "path."
        )
    if not parts[0].is_main:
        ways = " or ".join(f"{part.name}.resid_post.N (N = 0 to {part.n_blocks - 1})" for part in parts)
        raise CosaeError(f"{type(model).__name__} has several stacks of blocks: say which, as in {ways}.")
    return parts[0]


def caller_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The innermost module that holds the one at `path` and is called with something to read, and what that is: text,
    images or audio; the body, and text, where no argument's name tells."""
    for _, module in _runners(model, path):
        for name in _parameters(module):
            if name in INPUTS:
                return module, INPUTS[name]
    return body_of(model), "text"


def runner_of(model: nn.Module, paths: Iterable[str], names: Iterable[str]) -> tuple[nn.Module, tuple[str, ...]]:
    """The module that is called to run those at `paths`, and the names of the arguments that it must be given: `names`,
    and decoder_input_ids for the second half of an encoder-decoder.

    Raises CosaeError where the modules do not run together on these arguments.
    """
    paths, wanted = list(paths), list(names)
    for path in paths:
        if (reads := caller_of(model, path)[1]) != (given := INPUTS.get(wanted[0], wanted[0])):
            raise CosaeError(
                f"{path} of {type(model).__name__} reads {reads}. Got {given} instead: choose a site of the part that "
                "reads them, or give what this one reads."
            )
    if any(is_decoder(model, path) for path in paths):
        wanted.append("decoder_input_ids")
    for place, module in _runners(model, paths[0]):
        if all(_holds(place, path) for path in paths) and set(wanted) <= set(_parameters(module)):
            return module, tuple(wanted)
    if wanted == ["input_ids"]:
        return body_of(model), ("input_ids",)  # wrapped: it may take anything
    which = " and ".join(dict.fromkeys(paths))
    raise CosaeError(
        f"{type(model).__name__} has no part that holds {which} and takes {' and '.join(wanted)} alone; capture the "
        "sites of one part at a time, from what that part reads."
    )


def is_decoder(model: nn.Module, path: str) -> bool:
    """Whether a module is of the half of an encoder-decoder that reads what the other half makes."""
    pair = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return pair and "decoder" in path.split(".") and any(part.name == "encoder" for part in find_parts(model))


def body_of(model: nn.Module) -> Any:
    """The model without its language-modelling head."""
    return getattr(model, "base_model", model)


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's language part; None where the model has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def vocabulary_of(model: nn.Module) -> int:
    """How many token ids the part of a model that reads text knows. Raises CosaeError where there is none."""
    for _, module in _text_runners(model):
        with suppress(AttributeError, NotImplementedError):
            return int(module.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    raise CosaeError(f"{type(model).__name__} reads no tokens: give it images or audio.")


def context_of(model: nn.Module) -> int | None:
    """How many tokens the part of a model that reads text takes at most; None where nothing says."""
    for _, module in _text_runners(model):
        config: Any = getattr(module, "config", None)
        limit = getattr(config, "max_position_embeddings", None)
        if isinstance(limit, int) and limit > 0:
            offset = getattr(config, "pad_token_id", None) if config.model_type in OFFSET else None
            return limit - 1 - offset if offset is not None else limit
    return None


def _text_runners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those that take input_ids, the innermost of the stack of blocks that comes first."""
    parts = find_parts(model)
    places = [*_runners(model, parts[0].path)] if parts else [("", body_of(model))]
    for place, module in places:
        if "input_ids" in _parameters(module) or not place:
            yield place, module


def _name(model: nn.Module, path: str) -> str:
    words = path.split(".")
    for word in words:
        for known, name in WORDS.items():
            if known in word:
                return name
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return next((half for half in ("encoder", "decoder") if half in words), "text")
    return "text"


def _counts(config: Any) -> Iterator[int]:
    if config is None:
        return
    yield from (value for name in COUNTS if isinstance(value := getattr(config, name, None), int))
    for value in vars(config).values():
        if hasattr(value, "model_type"):
            yield from _counts(value)


def _runners(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The module at `path` and those around it, the innermost first, of those that hold a stack of blocks."""
    stacks = [part.path for part in find_parts(model)]
    names = path.split(".") if path else []
    for n in range(len(names), -1, -1):
        place = ".".join(names[:n])
        if not place or not stacks or any(_holds(place, stack) for stack in stacks):
            yield place, model.get_submodule(place)


def _holds(place: str, path: str) -> bool:
    return not place or path == place or path.startswith(f"{place}.")


def _parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)
