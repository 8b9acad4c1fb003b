"""How large a model is, from its configuration alone: no weight is read."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosae.models.hooks import body_of, hook_site
from cosae.models.load import MODEL_DTYPES, read_configuration
from cosae.models.sites import resolve_site


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
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.eval()
    itemsize = MODEL_DTYPES[dtype].itemsize
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    width = int(getattr(config, "hidden_size", 0) or model.get_input_embeddings().weight.shape[1])
    inner = int(getattr(config, "intermediate_size", 0) or getattr(config, "n_inner", 0) or 4 * width)
    heads = int(getattr(config, "num_attention_heads", 0) or 1)
    return ModelSize(
        weight_bytes=n_parameters * itemsize,
        pass_bytes=itemsize * (6 * width + 3 * inner),
        attention_bytes=heads * (itemsize + 4) if attention == "eager" else 0,
        d_in=_width(model, site, width),
    )


def _width(model: Any, site: str, width: int) -> int:
    """D at a site: the model's own width, but for modules inside a block, which are asked."""
    found = resolve_site(model, site)
    if found.name != found.module_path:
        return width
    shapes: list[int] = []

    def note(value: Any) -> Any:
        shapes.extend(value.shape[-1:] if isinstance(value, Tensor) else ())
        return value

    handle = hook_site(model, found, note)
    # some models look at values, which a sketch has none of
    with suppress(RuntimeError, NotImplementedError), torch.no_grad(), torch.device("meta"):
        body_of(model)(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False)
    handle.remove()
    return shapes[0] if shapes else width
