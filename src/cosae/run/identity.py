"""Whether an SAE reads what its own file says it was trained on: the model and the site, as far as both are known."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from cosae.errors import CosaeError, CosaeWarning
from cosae.models.sites import resolve_site
from cosae.run.dataset.base import Dataset
from cosae.types import Site

SITE_NAMES = ("site", "hook_name", "hf_hook_name")


def read_elsewhere(metadata: Mapping[str, Any], model_name: str | None, site: Site | None, model: Any = None) -> str:
    """What the file says against where the SAE is read, in one sentence; empty where they agree, or nothing is known.

    Short names and module paths of one place are equal; models are by the last part of their names.
    """
    trained = metadata.get("model")
    recipe = metadata.get("recipe")
    data = recipe.get("data") if isinstance(recipe, Mapping) else None
    if model_name is not None and isinstance(data, Mapping) and data.get("world") is not None:
        return f"it was trained on a synthetic world, not on {model_name}"
    names = [name for key in SITE_NAMES if isinstance(name := metadata.get(key), str) and name]
    block = metadata.get("layer")
    other_model = isinstance(trained, str) and model_name is not None and _last(trained) != _last(model_name)
    other_site = site is not None and bool(names) and not any(_same(site, name, model) for name in names)
    if site is not None and not names and isinstance(block, int) and block != site.block:
        other_site, names = True, [f"block {block}"]
    if not (other_model or other_site):
        return ""
    was = " of ".join([*names[:1], *([trained] if isinstance(trained, str) else [])])
    here = " of ".join(part for part in (None if site is None else site.name, model_name) if part)
    return f"it was trained at {was}, by its file, and is read here at {here}"


def warn_elsewhere(name: str, metadata: Mapping[str, Any], dataset: Dataset) -> str:
    """`read_elsewhere` of a dataset, and a CosaeWarning that says it."""
    model = None
    with suppress(CosaeError):  # a store runs none
        model = dataset.model
    said = read_elsewhere(metadata, dataset.model_name, dataset.site, model)
    if said:
        warnings.warn(CosaeWarning(f"{name}: {said}"), stacklevel=2)
    return said


def _last(name: str) -> str:
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].casefold()


def _same(site: Site, name: str, model: Any) -> bool:
    if site.is_named(name):
        return True
    with suppress(CosaeError):
        return model is not None and site.is_named(resolve_site(model, name).name)
    return False
