"""Norm perturbations put on purpose onto real activations, so that what a score does with norm can be seen.

    log_normal:  x ← x · exp(σ g),  g one standard normal per token, independent of content
    sinks:       x ← factor · x                       direction `own`
                 x ← factor · median|x| · u           direction `massive`, one fixed random unit vector u
                 for a share of the tokens, or for every token at one chosen position

Nothing is remembered between calls: what token j of chunk i of a split gets is a function of
(seed, split, i, j) alone, so a restarted stream repeats itself and a held-out set never shares draws with
training. Draws are made on the CPU, so every device sees the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from cosae.errors import CosaeError, check_choice, check_least, check_range
from cosae.io import values
from cosae.io.generators import keyed_generator
from cosae.types import Activations

NuisanceKind = Literal["none", "log_normal", "sinks"]
Direction = Literal["own", "massive"]

# what each kind reads; a setting the kind would ignore is refused rather than swallowed
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "log_normal": ("sigma", "seed"),
    "sinks": ("frac", "factor", "position", "direction", "seed"),
}


@dataclass(frozen=True)
class Perturbation:
    """A norm perturbation and its seed.

    kind       none, log_normal or sinks
    sigma      log_normal: standard deviation of log norm, nats
    frac       sinks: share of tokens, drawn independently; not read when `position` is given
    factor     sinks: multiple of the token's own norm (`own`) or of the chunk's median norm (`massive`)
    position   sinks: every token at this position of its sequence, instead of a random share
    direction  sinks: `own` keeps the token's direction, `massive` gives all of them one random direction
    seed       of every draw

    Raises CosaeError for values outside these meanings.
    """

    kind: NuisanceKind = "none"
    sigma: float = 1.0
    frac: float = 0.006
    factor: float = 160.0
    position: int | None = None
    direction: Direction = "own"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("perturbation", self.kind, SETTINGS)
        check_choice("perturbation direction", self.direction, get_args(Direction))
        check_range("perturbation sigma", self.sigma, "[0, inf)")
        check_range("perturbation frac", self.frac, "[0, 1]")
        check_range("perturbation factor", self.factor, "(0, inf)")
        check_least("perturbation position", self.position, 0)

    @classmethod
    def parse(cls, text: str) -> Perturbation:
        """From the command line: `none`, `log_normal:sigma=1.0`, `sinks:frac=0.006,factor=160,direction=massive`.

        Raises CosaeError for anything else, and for settings the kind does not read.
        """
        return values.parse(cls, text, "perturbation", "kind", SETTINGS)

    def __str__(self) -> str:
        """The text `parse` reads back to the same perturbation."""
        settings = ((name, getattr(self, name)) for name in SETTINGS[self.kind])
        shown = ",".join(f"{name}={value}" for name, value in settings if value is not None)
        return f"{self.kind}:{shown}" if shown else self.kind


def apply(
    activations: Activations,
    perturbation: Perturbation,
    chunk_index: int = 0,
    split: Literal["train", "held_out"] = "train",
) -> Activations:
    """The activations with the perturbation on them; the very same object when the perturbation is `none`.

    x_ND comes back in float32 and norm_N recomputed in float32; everything else is shared with the input.
    Raises CosaeError when a position is asked for and the activations have none.
    """
    if perturbation.kind == "none":
        return activations
    generator = keyed_generator(perturbation.seed, "nuisance", split, chunk_index)  # 0.1's word is part of the seed
    x_ND = activations.x_ND.float()
    if perturbation.kind == "log_normal":
        gain_N = torch.exp(perturbation.sigma * torch.randn(len(activations), generator=generator))
        x_ND = x_ND * gain_N.to(x_ND.device)[:, None]
    else:
        x_ND = _plant_sinks(x_ND, _chosen(activations, perturbation, generator), activations.norm_N, perturbation)
    return replace(activations, x_ND=x_ND, norm_N=x_ND.norm(dim=-1))


def _chosen(activations: Activations, perturbation: Perturbation, generator: torch.Generator) -> Tensor:
    """(N,) bool: the tokens that become sinks."""
    if perturbation.position is None:
        return (torch.rand(len(activations), generator=generator) < perturbation.frac).to(activations.x_ND.device)
    if len(activations) and int(activations.position_N.max()) < 0:
        raise CosaeError(
            f"a perturbation at position {perturbation.position} needs activations that know their positions, and "
            "these do not; use frac instead."
        )
    return activations.position_N == perturbation.position


def _plant_sinks(x_ND: Tensor, chosen_N: Tensor, norm_N: Tensor, perturbation: Perturbation) -> Tensor:
    if perturbation.direction == "own":
        gain_N = torch.where(chosen_N, perturbation.factor, 1.0)
        return x_ND * gain_N[:, None]
    direction_D = torch.randn(x_ND.shape[1], generator=keyed_generator(perturbation.seed, "massive direction"))
    direction_D = (direction_D / direction_D.norm()).to(x_ND.device)
    massive_D = perturbation.factor * norm_N.float().median() * direction_D if len(norm_N) else direction_D
    return torch.where(chosen_N[:, None], massive_D, x_ND)
