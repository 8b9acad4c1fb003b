"""What an SAE is and where it comes from, in a few words: its configuration, and what its file says of its training."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any

from cosae.activations.filter import Filter
from cosae.errors import CosaeError
from cosae.io.values import from_plain
from cosae.sae.config import SAEConfig
from cosae.shown import counted

ALWAYS = ("d_in", "d_sae", "score", "selector", "k", "frame")


def summary(cfg: SAEConfig, metadata: Mapping[str, Any], calibrated: bool) -> dict[str, object]:
    """Name → value. Metadata may be a stranger's: what is not of the expected kind is passed over."""
    changed = {f.name: getattr(cfg, f.name) for f in fields(cfg) if getattr(cfg, f.name) != f.default}
    own = {name: getattr(cfg, name) for name in ALWAYS}
    site = next((metadata[key] for key in ("site", "hook_name", "hf_hook_name") if _is(metadata.get(key), str)), None)
    return {
        **own,
        **{name: value for name, value in changed.items() if name not in own},
        "calibrated": None if calibrated else False,
        "model": _value(metadata, "model", str),
        "site": site,
        "trained_on": _trained_on(metadata),
        "l0": _value(metadata, "l0_calibrated", float),
        "fve": _value(metadata, "fve", float),
        "sinks": _sinks(metadata.get("filter")),
        "format": _value(metadata, "format", str),
    }


def _trained_on(metadata: Mapping[str, Any]) -> str | None:
    """How many tokens of what."""
    recipe = metadata.get("recipe")
    data = recipe.get("data") if isinstance(recipe, Mapping) else None
    data = data if isinstance(data, Mapping) else {}
    source = metadata.get("source")
    kind = source.get("source") if isinstance(source, Mapping) else None
    origin: object
    if kind == "tensor":
        origin = "a tensor"
    elif data.get("world") is not None:
        origin = "a synthetic world"
    else:
        named = (data.get("store"), data.get("activations"), data.get("corpus"), metadata.get("dataset"))
        origin = next((value for value in named if value), None)
    if isinstance(origin, list | tuple):
        origin = ", ".join(map(str, origin))
    tokens = _value(metadata, "tokens", int)
    if not isinstance(origin, str):
        return None if tokens is None else counted(tokens, "token")
    return origin if tokens is None else f"{counted(tokens, 'token')} of {origin}"


def _sinks(fitted: object) -> str | None:
    """What the filter of the training left out."""
    with suppress(CosaeError):
        left_out = from_plain(Filter, fitted, "filter").policy.left_out
        return "kept" if left_out == "nothing" else f"left out: {left_out}"
    return None


def _value(metadata: Mapping[str, Any], name: str, kind: type) -> Any:
    return metadata[name] if _is(metadata.get(name), kind) else None


def _is(value: object, kind: type) -> bool:
    """Whether a value is of a kind; whole numbers are floats, truth values are no numbers."""
    allowed = (int, float) if kind is float else kind
    return isinstance(value, allowed) and not isinstance(value, bool)
