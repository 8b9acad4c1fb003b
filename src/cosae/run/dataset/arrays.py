"""Vectors from a file or from memory."""

from __future__ import annotations

import itertools
import math
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosae.activations.array_files import open_array
from cosae.activations.arrays import ArraySource, TensorSource
from cosae.activations.monitor import finite_rows
from cosae.activations.sample import Sample, SinkRule
from cosae.errors import CosaeError
from cosae.recipe import DataConfig
from cosae.run.dataset.base import Dataset, DataUse, Sizes, Split, split_held_out
from cosae.run.plan.resources import Item
from cosae.types import Activations

CHUNK = 65_536


def as_matrix(data: Any) -> Tensor:
    """A tensor, a NumPy array, whatever NumPy takes for one, or a list of such: as one tensor (N, d) or (N, T, d), not
    copied.

    Raises CosaeError, with what to do, for more than three dimensions, and for parts of different shapes.
    """
    if isinstance(data, list | tuple):
        parts = [as_matrix(part) for part in data]
        if not parts or any(part.ndim < 2 or part.shape[1:] != parts[0].shape[1:] for part in parts):
            shapes = ", ".join(str(tuple(part.shape)) for part in parts) or "an empty list"
            raise CosaeError(f"a list of activations must hold arrays (N, d) of one width d. Got {shapes} instead.")
        return torch.cat(parts)
    if not isinstance(data, Tensor):
        data = _from_numpy(np.asarray(data))
    found: Tensor = data
    if found.ndim > 3:
        shape = tuple(found.shape)
        raise CosaeError(
            f"activations must have the shape (N, d) or (N, T, d). Got {shape}: pass x.flatten(1, -2), of which the "
            "places are those in between, row by row."
        )
    return found


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of arrays that may not be written to: nothing is
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (TypeError, ValueError):
        raise CosaeError(
            f"activations must be floats in an array (N, d). Got {array.dtype} {array.shape} instead."
        ) from None


class ArrayDataset(Dataset):
    """Rows of a file, or of a tensor (N, D). With held_out_frac 0, where nothing is trained, any row is measured."""

    def __init__(
        self, config: DataConfig, use: DataUse, tensor: Tensor | None = None, target: Tensor | None = None
    ) -> None:
        super().__init__(config, use)
        self._tensor, self._target = tensor, target
        frac = config.held_out_frac
        if not (0 < frac < 1 or (frac == 0 and not use.train_tokens)):
            least = "between 0 and 1, neither of them" if use.train_tokens else "at least 0 and below 1"
            why = "thresholds are calibrated on rows kept out of training"
            raise CosaeError(f"held_out_frac must lie {least}: {why}. Got {frac} instead.")

    @cached_property
    def source(self) -> ArraySource | TensorSource:  # type: ignore[override]
        options: dict[str, Any] = {
            "seed": self.use.seed,
            "held_out_frac": self.config.held_out_frac,
            "allow_non_finite": self.config.non_finite == "drop",
            "positions": self.config.positions,
        }
        if self._tensor is not None:
            return TensorSource(self._tensor, target=self._target, **options)
        assert self.config.activations is not None
        return ArraySource(self.config.activations, self.config.activations_key, target=self.config.target, **options)

    def sizes(self) -> Sizes:
        path = self.config.activations
        if path is None:
            return Sizes(self.source.d_in, (), CHUNK, d_out=self.d_out)
        array, _, _ = open_array(Path(path), self.config.activations_key)
        d_in = int(array.shape[-1])
        n_rows = math.prod(array.shape[:-1])
        held = 0 if path.endswith(".npy") else n_rows * d_in * int(array[:1].itemsize)
        files = [Item("the file of activations", held)]
        d_out = None
        if self.config.target is not None:
            target, _, _ = open_array(Path(self.config.target), None)
            d_out = int(target.shape[1])
            n_bytes = 0 if self.config.target.endswith(".npy") else int(target.shape[0]) * d_out * 4
            files.append(Item("the file of targets", n_bytes))
        return Sizes(d_in, tuple(files), min(CHUNK, n_rows), d_out=d_out)

    def sample(self, split: Split, n_tokens: int, rule: SinkRule | None = None) -> Sample:
        if split != "train" and self.config.held_out_frac > 0:
            held_out = self.source.held_out()
            activations = held_out[split_held_out(len(held_out), split, self.use)]
        else:
            activations = self._first(n_tokens)
        finite = finite_rows(activations)
        return Sample.of(self._perturbed(finite, split), rule, n_dropped=len(activations) - len(finite))

    def _first(self, n_tokens: int) -> Activations:
        parts: list[Activations] = []
        for chunk in itertools.islice(self.source.chunks(), self.source.chunks_per_epoch):
            parts.append(chunk)
            if sum(map(len, parts)) >= n_tokens:
                break
        return Activations.cat(parts)[:n_tokens]
