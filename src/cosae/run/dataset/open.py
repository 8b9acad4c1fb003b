"""What a recipe's data name, opened: the one place that tells a world, a store, a file and a model apart."""

from __future__ import annotations

from torch import Tensor

from cosae.errors import CosaeError
from cosae.recipe import DataConfig, Recipe
from cosae.run.dataset.arrays import ArrayDataset
from cosae.run.dataset.base import Dataset, DataUse
from cosae.run.dataset.media_model import MediaDataset
from cosae.run.dataset.model import ModelDataset
from cosae.run.dataset.store import StoreDataset
from cosae.run.dataset.world import WorldDataset


def open_dataset(
    data: DataConfig, use: DataUse | None = None, tensor: Tensor | None = None, target: Tensor | None = None
) -> Dataset:
    """The data that a configuration names, or `tensor` (N, D) instead, with its `target` (N, d_out) where there is one.

    Raises CosaeError for what cannot be read.
    """
    use = use or DataUse()
    given = {"a tensor": tensor, "a store": data.store, "a file": data.activations, "a synthetic world": data.world}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise CosaeError(f"a run takes activations from {' or '.join(named)}, not from both: drop one.")
    if tensor is not None:
        return ArrayDataset(data, use, tensor, target)
    if target is not None:
        raise CosaeError("a target in memory needs its activations in memory: pass both as tensors or arrays.")
    if data.store is not None:
        return StoreDataset(data, use)
    if data.world is not None:
        return WorldDataset(data, use)
    if data.activations is not None:
        return ArrayDataset(data, use)
    return MediaDataset(data, use) if data.inputs in ("images", "audio") else ModelDataset(data, use)


def dataset_of(
    recipe: Recipe, tensor: Tensor | None = None, keep_tokens: int = 0, target: Tensor | None = None
) -> Dataset:
    """The data of a run."""
    return open_dataset(recipe.data, DataUse.of(recipe, keep_tokens), tensor, target)
