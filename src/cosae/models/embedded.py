"""The embedded model: a small Qwen3 with its tokenizer, trained on the embedded corpus, in the package.

studies/embedded_model made it. Documents start with BOS; the context is 256 tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosae.errors import CosaeError
from cosae.models.load import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

_FOLDER = Path(__file__).parents[1] / "embedded"
VISION = "embedded-vision"
"""The name of the small vision transformer in the package (studies/embedded_vision)."""
_VISION_FOLDER = Path(__file__).parents[1] / "embedded_vision"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "provenance.json")


def model_path() -> Path:
    """The folder of the embedded model, as `save_pretrained` writes one: plain transformers load it.

    Raises CosaeError where the package was installed without it.
    """
    missing = [name for name in _FILES if not (_FOLDER / name).is_file()]
    if missing:
        raise CosaeError(
            f"The embedded model must come with the package. Got {_FOLDER} without {', '.join(missing)}: "
            "install cosae again, or make the model with studies/embedded_model/train.py."
        )
    return _FOLDER


def embedded_path(name: str) -> Path | None:
    """The folder of a model that is part of the package; None for other names."""
    return model_path() if name == "embedded" else vision_path() if name == VISION else None


def vision_path() -> Path:
    """The folder of the embedded vision model, as `save_pretrained` writes one. Raises CosaeError without it."""
    if not (_VISION_FOLDER / "model.safetensors").is_file():
        raise CosaeError(
            f"The embedded vision model must come with the package. Got {_VISION_FOLDER} without it: install cosae "
            "again, or make the model with studies/embedded_vision/train.py."
        )
    return _VISION_FOLDER


def load(dtype: str = "float32", device: str = "cpu") -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """The embedded model in eval mode, without gradients, and its fast tokenizer.

    dtype is "float32", "bfloat16" (as shipped) or "float16". Raises CosaeError without transformers.
    """
    model, tokenizer = load_model(model_path(), dtype=dtype, device=device)
    return model, tokenizer  # type: ignore[return-value]  # load_model promises any causal model


def metadata() -> Mapping[str, Any]:
    """provenance.json, read once; a copy of its own for every caller.

    Among its keys: bits_per_byte and baselines_bits_per_byte (on the held-out files, bits per UTF-8 byte),
    norms (per block: median, cv, max_over_median, first_over_median), settings, steps, tokens_seen,
    n_parameters, python and corpus (digests of the text it was trained and measured on, held-out names).
    """
    return deepcopy(_read_metadata())


@cache
def _read_metadata() -> dict[str, Any]:
    return dict(json.loads((model_path() / "provenance.json").read_text("utf-8")))
