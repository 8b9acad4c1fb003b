"""`cosae.fit`: train SAEs from Python, on a tensor or array, a file, or whatever a recipe names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike
from torch import Tensor

from cosae.errors import CosaeError
from cosae.io.legacy import upgrade_path
from cosae.io.progress import is_watched
from cosae.presets import preset
from cosae.recipe import Recipe
from cosae.run.dataset.arrays import as_matrix
from cosae.run.execute import Logs, execute
from cosae.run.finished import Finished
from cosae.train.arm import Arm, parse_arm


def fit(
    data: Recipe | Tensor | ArrayLike | Sequence[Tensor] | Path | None = None,
    arms: Iterable[str | Arm] | None = None,
    *,
    target: Tensor | ArrayLike | Sequence[Tensor] | None = None,
    out: str | Path | None = None,
    progress: bool | None = None,
    evaluate: bool | None = None,
    tensorboard: bool = False,
    wandb: str | None = None,
    **changes: Any,
) -> Finished:
    """Train SAEs in lockstep on one stream of activations; returns them calibrated, with what was measured.

    data     a Recipe; activations: a float tensor or NumPy array (N, d) or (N, T, d), a list of such, or a path to a
             .safetensors, .npy or .parquet file of them; the name of a preset; None for the embedded model's recipe
    target   of transcoders: what they make of each row of a tensor or array, (N, d_out); the site or file of a recipe's
             target is data__target
    arms     names or Arm objects ("cosine", "standard,k=64"); default: the recipe's
    out      folder for the run; None keeps everything in memory
    progress whether to show a progress bar, or lines where standard error is no terminal; default: yes on a terminal
             and in a notebook
    evaluate whether to measure on held-out activations; default: yes where `out` is given
    changes  recipe fields: d_sae=, k=, or by dotted path with "__" for dots: training__steps=500. Short names for the
             common ones: steps, batch_tokens, lr, seed

    >>> run = cosae.fit(x, ["standard", "cosine"], d_sae=1024, k=16, steps=500)
    >>> codes = run.saes["cosine"].encode(x)

    Raises CosaeError for anything that is not allowed, before anything is written.
    """
    tensor = None if data is None or isinstance(data, Recipe | str | Path) else _activations(data)
    target_ND = None if target is None else _activations(target)
    recipe = _recipe(data if tensor is None else tensor)
    if arms is not None:
        chosen: list[Any] = list(arms) if isinstance(arms, Iterable) and not isinstance(arms, str) else [arms]
        if not all(isinstance(arm, str | Arm) for arm in chosen):
            raise CosaeError(f"arms must be names or Arm objects. Got {arms!r} instead.")
        recipe = replace(recipe, arms=tuple(arm if isinstance(arm, Arm) else parse_arm(arm) for arm in chosen))
    given = {_SHORT.get(key, key.replace("__", ".")): value for key, value in changes.items()}
    recipe = recipe.changed(given)
    recipe.check_applies(upgrade_path(path) for path in given if not upgrade_path(path).startswith("data."))
    if recipe.data.origin != "store":  # which compares what is asked with what it was captured with
        named = [upgrade_path(path).split(".")[1] for path in given if path.startswith("data.")]
        recipe.data.check_applies(named, "activations" if tensor is not None and not recipe.data.activations else None)
    if tensor is not None:
        recipe = _fitted_to(recipe, tensor, given)
    place = None if out is None else Path(out)
    measured = place is not None if evaluate is None else evaluate
    logs = Logs(is_watched() if progress is None else progress, tensorboard, wandb)
    return execute(recipe, place, logs=logs, tensor=tensor, target=target_ND, measured=measured)


_SHORT = {name: f"training.{name}" for name in ("steps", "batch_tokens", "seed", "checkpoint_every")}
_SHORT["lr"] = "training.optimizer.lr"


def _activations(data: Any) -> Tensor:
    if not isinstance(data, Tensor | list | tuple) and not hasattr(data, "__array__"):
        allowed = "a Recipe, a float tensor or array (N, d), a path to a file or store, or a preset's name"
        raise CosaeError(f"fit takes {allowed}. Got {type(data).__name__} instead.")
    return as_matrix(data)


def _recipe(data: Any) -> Recipe:
    if isinstance(data, Recipe):
        return data
    if isinstance(data, Tensor):
        return Recipe(name="tensor")
    if data is None:
        return preset("embedded")
    path = Path(data)
    if path.is_dir():
        return Recipe(name=path.name).changed({"data.store": str(data)})
    if isinstance(data, str) and not path.suffix:
        return preset(data)
    return Recipe(name=path.stem).changed({"data.activations": str(data)})


def _fitted_to(recipe: Recipe, tensor: Tensor, given: Collection[str]) -> Recipe:
    """Window, buffer and batch no larger than a small tensor allows, unless they were asked for."""
    if tensor.ndim < 2:
        return recipe
    n_rows = tensor.numel() // max(1, tensor.shape[-1])
    n = max(2, int(n_rows * (1 - recipe.data.held_out_frac)))
    batch, buffer = recipe.training.batch_tokens, recipe.training.buffer_tokens
    if "training.batch_tokens" not in given:
        batch = min(batch, max(1, n // 2))
    if "training.buffer_tokens" not in given:
        buffer = min(buffer, max(2 * batch, n))
    found = {"training.batch_tokens": batch, "training.buffer_tokens": buffer}
    if "filter.window_tokens" not in given:
        found["filter.window_tokens"] = min(recipe.filter.window_tokens, n)
    return recipe.changed(found)
