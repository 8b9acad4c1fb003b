"""Where the places of an image or a sound lie: class token and registers, patches by row and column, frames by time.

How many places there are at a site is seen, not computed: a model is run on one example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cosae.errors import CosaeError
from cosae.models.hooks import arguments_of, eager, hook_site
from cosae.models.parts import runner_of
from cosae.types import Sequences, Site


@dataclass(frozen=True)
class Layout:
    """n_special places, the first ones, are of no part of it; then come patches (rows, columns) or frames, each of so
    many seconds."""

    kind: str
    n_places: int
    n_special: int = 0
    grid: tuple[int, int] | None = None
    seconds: float | None = None

    def place(self, index: int) -> str:
        """Where place `index` is, in words."""
        if index < self.n_special:
            return "class token" if index == 0 else f"register {index}"
        if self.grid is not None:
            row, column = divmod(index - self.n_special, self.grid[1])
            return f"row {row}, column {column}"
        return f"{index * self.seconds:.2f} s" if self.seconds is not None else f"place {index}"

    def sequences(
        self, inputs: Mapping[str, Tensor], names: Sequence[str], first: int, n_real: Sequence[int] = ()
    ) -> Sequences:
        """The places of some media as `Sequences`, one a row. n_real: places of each that are of it, not of padding."""
        n, n_places = len(names), self.n_places
        index_T = torch.arange(n_places, dtype=torch.int32)
        mask_ST = index_T < torch.tensor([*n_real] or [n_places] * n)[:, None]
        doc_ST = torch.arange(first, first + n, dtype=torch.int32)[:, None].expand(n, n_places)
        return Sequences(
            ids_ST=torch.full((n, n_places), -1),
            doc_ST=doc_ST.masked_fill(~mask_ST, -1),
            index_ST=index_T.expand(n, n_places).masked_fill(~mask_ST, -1),
            mask_ST=mask_ST,
            special_ST=(index_T < self.n_special).expand(n, n_places),
            doc_names=tuple(names),
            first_doc=first,
            inputs=dict(inputs),
        )


class _Seen(BaseException):
    """Ends a forward pass."""


def layout_of(model: nn.Module, site: Site, inputs: Mapping[str, Tensor], seconds: float | None = None) -> Layout:
    """The layout at a site, from one example of what the model is given (and how many seconds that are).

    Raises CosaeError for a site that gives no vectors (sequences, places, width).
    """
    shape: list[tuple[int, ...]] = []

    def note(value: Any) -> Any:
        shape.append(tuple(value.shape) if isinstance(value, Tensor) else ())
        raise _Seen

    runner, names = runner_of(model, [site.module_path], tuple(inputs))
    one = Layout("", 1).sequences({name: value[:1] for name, value in inputs.items()}, ("",), 0)
    with eager, torch.no_grad(), suppress(_Seen):
        handle = hook_site(model, site, note)
        try:
            runner(**arguments_of(runner, one, names))
        finally:
            handle.remove()
    if not shape or len(shape[0]) < 3 or shape[0][0] != 1:
        got = f"a tensor of shape {shape[0]}" if shape and shape[0] else "none"
        raise CosaeError(f"Site '{site.name}' must give vectors (images or sounds, places, width). Got {got} instead.")
    n_places = shape[0][1]
    if seconds is not None:
        return Layout("audio", n_places, seconds=seconds / n_places)
    grid = _grid(runner, inputs["pixel_values"])
    n_patches = 0 if grid is None else grid[0] * grid[1]
    if grid is None or n_patches > n_places:
        return Layout("images", n_places)
    return Layout("images", n_places, n_places - n_patches, grid)


def _grid(runner: nn.Module, pixel_values: Tensor) -> tuple[int, int] | None:
    size: Any = getattr(getattr(runner, "config", None), "patch_size", None)
    if size is None:
        return None
    high, wide = size if isinstance(size, list | tuple) else (size, size)
    return int(pixel_values.shape[-2]) // int(high), int(pixel_values.shape[-1]) // int(wide)
