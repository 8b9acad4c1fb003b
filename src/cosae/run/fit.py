"""`cosae.fit`: train SAEs from Python, on a tensor, a file, or whatever a recipe names."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cosae.errors import CosaeError
from cosae.presets import preset
from cosae.recipe import Recipe
from cosae.run.execute import Finished, Logs, execute
from cosae.train.arm import Arm, parse_arm


def fit(
    data: Recipe | Tensor | str | Path | None = None,
    arms: Iterable[str | Arm] | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = False,
    evaluate: bool | None = None,
    tensorboard: bool = False,
    wandb: str | None = None,
    **changes: Any,
) -> Finished:
    """Train SAEs in lockstep on one stream of activations; returns them calibrated, with what was measured.

    data     a Recipe; a float tensor (N, d) of activations; a path to a .safetensors, .npy or .parquet file of them;
             the name of a preset; None for the embedded model's recipe
    arms     names or Arm objects ("cosine", "standard,k=64"); default: the recipe's
    out      folder for the run; None keeps everything in memory
    evaluate whether to measure on held-out activations; default: yes where `out` is given
    changes  recipe fields: d_sae=, k=, or by dotted path with "__" for dots: training__steps=500. Short names for the
             common ones: steps, batch_tokens, lr, seed

    >>> run = cosae.fit(x, ["standard", "cosine"], d_sae=1024, k=16, steps=500)
    >>> codes = run.saes["cosine"].encode(x)

    Raises CosaeError for anything that is not allowed, before anything is written.
    """
    tensor = data if isinstance(data, Tensor) else None
    recipe = _recipe(data)
    if arms is not None:
        chosen: list[Any] = list(arms) if isinstance(arms, Iterable) and not isinstance(arms, str) else [arms]
        if not all(isinstance(arm, str | Arm) for arm in chosen):
            raise CosaeError(f"arms must be names or Arm objects. Got {arms!r} instead.")
        recipe = replace(recipe, arms=tuple(arm if isinstance(arm, Arm) else parse_arm(arm) for arm in chosen))
    given = {_SHORT.get(key, key.replace("__", ".")): value for key, value in changes.items()}
    recipe = recipe.changed(given)
    if tensor is not None:
        recipe = _fitted_to(recipe, tensor, given)
    place = None if out is None else Path(out)
    measured = place is not None if evaluate is None else evaluate
    return execute(recipe, place, logs=Logs(progress, tensorboard, wandb), tensor=tensor, measured=measured)


_SHORT = {name: f"training.{name}" for name in ("steps", "batch_tokens", "seed", "checkpoint_every")}
_SHORT["lr"] = "training.optimizer.lr"


def _recipe(data: Recipe | Tensor | str | Path | None) -> Recipe:
    if isinstance(data, Recipe):
        return data
    if isinstance(data, Tensor):
        return Recipe(name="tensor")
    if data is None:
        return preset("embedded")
    if not isinstance(data, str | Path):
        allowed = "a Recipe, a float tensor (N, d), a path to a file or store of activations, or a preset's name"
        raise CosaeError(f"fit takes {allowed}. Got {type(data).__name__} instead.")
    path = Path(data)
    if path.is_dir():
        return Recipe(name=path.name).changed({"data.store": str(data)})
    if isinstance(data, str) and not path.suffix:
        return preset(data)
    return Recipe(name=path.stem).changed({"data.activations": str(data)})


def _fitted_to(recipe: Recipe, tensor: Tensor, given: Collection[str]) -> Recipe:
    """Window, buffer and batch no larger than a small tensor allows, unless they were asked for."""
    if tensor.ndim != 2:
        return recipe
    n = max(2, int(len(tensor) * (1 - recipe.data.held_out_frac)))
    batch, buffer = recipe.training.batch_tokens, recipe.training.buffer_tokens
    if "training.batch_tokens" not in given:
        batch = min(batch, max(1, n // 2))
    if "training.buffer_tokens" not in given:
        buffer = min(buffer, max(2 * batch, n))
    found = {"training.batch_tokens": batch, "training.buffer_tokens": buffer}
    if "filter.window_tokens" not in given:
        found["filter.window_tokens"] = min(recipe.filter.window_tokens, n)
    return recipe.changed(found)
