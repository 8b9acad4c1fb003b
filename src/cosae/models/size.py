"""How large a model is, from its configuration alone: no weight is read."""

from __future__ import annotations

import inspect
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosae.models.hooks import hook_site
from cosae.models.load import MODEL_DTYPES, classes_of, read_configuration
from cosae.models.parts import caller_of
from cosae.models.sites import resolve_site
from cosae.types import Site


@dataclass(frozen=True)
class ModelSize:
    """weight_bytes of all parameters in the wanted precision; pass_bytes of one token in one forward pass, attention
    aside; attention_bytes of one pair of positions, 0 where attention never makes the matrix; d_in at the site."""

    weight_bytes: int
    pass_bytes: int
    attention_bytes: int
    d_in: int


def model_size(
    name: str, site: str, dtype: str = "float32", revision: str | None = None, attention: str | None = None
) -> ModelSize:
    """Sizes of the model at `name` and of its activations at `site`.

    A pass keeps about six vectors of the model's width and three of its MLP's per token; eager attention makes two
    (heads, T, T) matrices. Raises CosaeError where `load_model` does for the configuration, and for an unknown site.
    """
    transformers, _, _, config = read_configuration(name, dtype, revision)
    auto, _ = classes_of(transformers, config, name)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = auto.from_config(config)
    model.eval()
    itemsize = MODEL_DTYPES[dtype].itemsize
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    found, *others = resolve_site(model, site).places
    own = _config_around(model, found.module_path)
    width = int(getattr(own, "hidden_size", 0) or model.get_input_embeddings().weight.shape[1])
    inner = int(getattr(own, "intermediate_size", 0) or getattr(own, "n_inner", 0) or 4 * width)
    heads = int(getattr(own, "num_attention_heads", 0) or 1)
    return ModelSize(
        weight_bytes=n_parameters * itemsize,
        pass_bytes=itemsize * (6 * width + 3 * inner),
        attention_bytes=heads * (itemsize + 4) if attention == "eager" else 0,
        d_in=_width(model, found, width) + sum(_width(model, one, width) for one in others),
    )


def _config_around(model: Any, path: str) -> Any:
    """The configuration of the innermost part that holds a module."""
    names = path.split(".")
    around = [model.get_submodule(".".join(names[:n])) for n in range(len(names) - 1, 0, -1)]
    return next((module.config for module in around if hasattr(module, "config")), model.config)


def _width(model: Any, site: Site, width: int) -> int:
    """D at a site: the width of its part, but for modules that are known by their path only, which are asked."""
    if site.name != site.module_path and not site.name.endswith(":input"):
        return width
    shapes: list[int] = []

    def note(value: Any) -> Any:
        shapes.extend([value.shape[2:].numel()] if isinstance(value, Tensor) and value.ndim > 2 else ())
        return value

    handle = hook_site(model, site, note)
    runner, reads = caller_of(model, site.module_path)
    # some models look at values, which a sketch has none of
    with suppress(RuntimeError, NotImplementedError, TypeError), torch.no_grad(), torch.device("meta"):
        runner(**_small_input(runner, reads))
    handle.remove()
    return shapes[0] if shapes else width


def _small_input(runner: Any, reads: str) -> dict[str, Tensor]:
    """The least that a part can be called with."""
    config, known = runner.config, inspect.signature(runner.forward).parameters
    if reads == "images":
        sides = getattr(config, "image_size", 32)
        height, width = sides if isinstance(sides, list | tuple) else (sides, sides)
        return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), height, width)}
    if "input_features" in known:
        frames = 2 * getattr(config, "max_source_positions", 1500)
        return {"input_features": torch.zeros(1, getattr(config, "num_mel_bins", 80), frames)}
    if "input_values" in known:
        return {"input_values": torch.zeros(1, 16000)}
    return {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}
