"""One contestant of a run: an SAE, how its loss is made, and how its parameters move."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.io.generators import keyed_generator
from cosae.sae.file import load
from cosae.sae.loss import LossConfig
from cosae.sae.model import SAE, SAEConfig
from cosae.sae.swap import swap_score

NAME_LENGTH = 80
NAME_PATTERN = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._=+-]{{0,{NAME_LENGTH - 1}}}")


@dataclass(frozen=True)
class Arm:
    """An SAE to train. Fields left at None are taken from the run (width, k, seed) when it starts."""

    name: str = "standard"
    """Name in tables, files and figures; unique within a run."""
    score: str = "inner"
    selector: str = "batch_topk"
    frame: str = "raw"
    d_sae: int | None = None
    """Number of features; None takes the run's width."""
    k: int | None = None
    """Mean active features per token; None takes the run's."""
    seed: int | None = None
    """Seed of the initial weights; None takes the run's."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka prefixes (feature counts)."""
    norm_restoring: bool = False
    n_groups: int = 4
    bias: bool = True
    bandwidth: float = 0.5
    a_init: float = 0.0
    """Start of every learned exponent a."""
    a_lr: float = 1.0
    """Learning rate of a, as a multiple of the run's."""
    b_init: str = "auto"
    """Start of b: auto, sqrt_d, norm, or a number (cosae.sae.initialise)."""
    b_lr: float = 1.0
    """Learning rate of b, as a multiple of the run's."""
    threshold_lr: float = 1.0
    """Learning rate of JumpReLU's ln θ, as a multiple of the run's; their common level is the controller's."""
    centre: str = "geometric_median"
    lr: float | None = None
    """Learning rate; None takes the run's."""
    sparsity_weight: float = 0.1
    """First λ of jumprelu and gated; the controller moves it."""
    start: str | None = None
    """Folder of a saved SAE to go on from, its score swapped to this arm's (cosae.sae.swap); None starts fresh."""
    input_noise: float = 1.0
    """Norm noise in training: each token is multiplied by U(1/input_noise, input_noise); 1 is none (paper §5.4)."""
    kernel: str = "auto"
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.name):
            raise CosaeError(
                f"an arm's name must be letters, digits, dots, '_', '-', '+' or '=' (at most 80). Got {self.name!r}."
            )
        for name in ("a_lr", "b_lr", "threshold_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise CosaeError(f"{name} must be a multiple of the learning rate, at least 0. Got {value!r} instead.")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise CosaeError(f"lr must be a positive number. Got {self.lr!r} instead.")
        if not (math.isfinite(self.sparsity_weight) and self.sparsity_weight >= 0):
            raise CosaeError(f"sparsity_weight must be a number of at least 0. Got {self.sparsity_weight!r} instead.")
        if self.seed is not None:
            check_seed(self.seed)
        if not (math.isfinite(self.input_noise) and self.input_noise >= 1.0):
            raise CosaeError(f"input_noise must be at least 1 (none). Got {self.input_noise!r} instead.")

    def with_defaults(self, *, d_sae: int, k: int, seed: int, lr: float, kernel: str) -> Arm:
        """This arm with what it left open taken from the run."""
        return replace(
            self,
            d_sae=d_sae if self.d_sae is None else self.d_sae,
            k=k if self.k is None else self.k,
            seed=seed if self.seed is None else self.seed,
            lr=lr if self.lr is None else self.lr,
            kernel=kernel if self.kernel == "auto" else self.kernel,
        )

    def check(self, d_sae: int | None, k: int) -> None:
        """Raises CosaeError for fields that no SAE can have, whatever its data; d_sae and k are the run's."""
        width = self.d_sae if self.d_sae is not None else d_sae
        SAEConfig(
            d_in=1,
            d_sae=sys.maxsize if width is None else width,  # unknown until the data is: then any k may fit
            score=self.score,
            selector=self.selector,
            k=k if self.k is None else self.k,
            frame=self.frame,
            prefixes=self.prefixes,
            n_groups=self.n_groups,
            bias=self.bias,
            bandwidth=self.bandwidth,
        )

    def build(self, d_in: int, sample_ND: Tensor | None, device: str = "cpu") -> SAE:
        """The SAE this arm begins with: fresh, initialised on a sample (n, d_in), or a saved one.

        Raises CosaeError on a bad value, or a saved SAE that is not of this arm's make.
        """
        assert self.d_sae is not None
        assert self.k is not None
        assert self.seed is not None
        if self.start is not None:
            return self._continued(Path(self.start), d_in, sample_ND).to(device)
        return SAE.build(
            d_in=d_in,
            d_sae=self.d_sae,
            score=self.score,
            selector=self.selector,
            k=self.k,
            seed=self.seed,
            frame=self.frame,
            prefixes=self.prefixes,
            norm_restoring=self.norm_restoring,
            n_groups=self.n_groups,
            bias=self.bias,
            bandwidth=self.bandwidth,
            a_init=self.a_init,
            b_init=_number_or_name(self.b_init),
            centre=self.centre,
            sample=sample_ND,
            kernel=self.kernel,
            device=device,
        )

    def _continued(self, folder: Path, d_in: int, sample_ND: Tensor | None) -> SAE:
        """The saved SAE under this arm's score; all else must be as this arm asks."""
        saved = load(folder, kernel=self.kernel)
        asked = {"d_in": d_in, "d_sae": self.d_sae, "k": self.k, "selector": self.selector, "frame": self.frame}
        asked |= {"norm_restoring": self.norm_restoring, "bias": self.bias}
        for name, value in asked.items():
            if getattr(saved.cfg, name) != value:
                raise CosaeError(
                    f"the arm {self.name} asks for {name} {value}, and the SAE in {folder} that it starts from has "
                    f"{getattr(saved.cfg, name)}: make them agree."
                )
        saved.metadata = {}
        if saved.cfg.score != self.score:
            saved = swap_score(saved, self.score, sample=sample_ND, refit=sample_ND is not None, a_init=self.a_init)
        return saved

    def lr_multipliers(self) -> dict[str, float]:
        """Learning-rate multiple by parameter name."""
        a = dict.fromkeys(("score.exponent", "score.exponent_base", "score.exponent_delta_F"), self.a_lr)
        return {**a, "score.log_gain": self.b_lr, "selector.log_threshold_F": self.threshold_lr}


def check_seed(seed: int) -> None:
    """Raises CosaeError for a seed that some generator would not take."""
    if not 0 <= seed < 2**63:
        raise CosaeError(f"seed must be a whole number from 0 to 2**63 - 1. Got {seed!r} instead.")


def _number_or_name(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


ARMS: dict[str, Arm] = {
    "standard": Arm("standard", "inner"),
    "standard_unit_frame": Arm("standard_unit_frame", "inner", frame="unit"),
    "standard_layer_norm": Arm("standard_layer_norm", "inner", frame="layer_norm"),
    "unit_rows": Arm("unit_rows", "inner_unit"),
    "cosine_fixed": Arm("cosine_fixed", "cosine_fixed"),
    "cosine": Arm("cosine", "cosine"),
    "cosine_per_feature": Arm("cosine_per_feature", "cosine_per_feature"),
    "cosine_base_delta": Arm("cosine_base_delta", "cosine_base_delta"),
    "cosine_grouped": Arm("cosine_grouped", "cosine_grouped"),
}
"""Arms by name, for `--arms`. `cosine` is the paper's global form."""


def parse_arm(text: str) -> Arm:
    """ "NAME" or "NAME,field=value,…" → Arm: e.g. "cosine", "cosine,k=64,seed=1", "standard,selector=topk".

    The first part is one of ARMS; `name=` gives another name, otherwise changed fields are added to it. `loss.`
    fields are reached as "loss.reweight=1"; prefixes as "prefixes=256+1024". Raises CosaeError.
    """
    base, *parts = [part.strip() for part in text.split(",")]
    if base not in ARMS:
        raise CosaeError(f"an arm must start with one of {', '.join(ARMS)}. Got {base!r} instead.")
    arm, loss = ARMS[base], LossConfig()
    changes: dict[str, Any] = {}
    given: set[str] = set()
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise CosaeError(f"what follows an arm's name must read field=value. Got {part!r} in {text!r} instead.")
        if key in given:
            raise CosaeError(f"{key} was given twice in {text!r}: give it once.")
        given.add(key)
        if key.startswith("loss."):
            loss = replace(loss, **{key[5:]: _typed(LossConfig, key[5:], value)})
        else:
            changes[key] = _typed(Arm, key, value)
    if parts and "name" not in changes:
        changes["name"] = re.sub(r"[^A-Za-z0-9._=+-]+", "-", "-".join([base, *parts]))  # start= is a path
        if len(changes["name"]) > NAME_LENGTH:
            raise CosaeError(f"an arm with this many changes needs a name of its own: add name=… to {text!r}.")
    return replace(arm, loss=loss, **changes)


def _typed(owner: type[Any], key: str, value: str) -> Any:
    """The text as the type of that field."""
    kinds = {f.name: str(f.type) for f in fields(owner) if f.name != "loss"}
    if key not in kinds:
        raise CosaeError(f"an arm has no field {key!r}. It has {', '.join(kinds)}, and loss.* for the loss.")
    kind = kinds[key]
    try:
        if kind.startswith("tuple"):
            return tuple(int(p) for p in value.split("+") if p)
        if kind.startswith("int"):
            return int(value)
        if kind.startswith("float"):
            return float(value)
    except ValueError:
        what = "whole numbers joined by +" if kind.startswith("tuple") else "a whole number"
        if not kind.startswith("float"):
            raise CosaeError(f"{key} must be {what}. Got {value!r} instead.") from None
        raise CosaeError(f"{key} must be a number. Got {value!r} instead.") from None
    if kind == "bool":
        if value.lower() not in ("true", "false"):
            raise CosaeError(f"{key} must be true or false. Got {value!r} instead.")
        return value.lower() == "true"
    return value


def check_arms(arms: Sequence[Arm]) -> None:
    """Raises CosaeError where there are none, or two share a name."""
    if not arms:
        raise CosaeError(f"a run needs at least one arm: name some of {', '.join(ARMS)}.")
    names = [arm.name for arm in arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CosaeError(f"arms must have different names. {', '.join(twice)} came more than once: add name=….")


def input_noise(x_BD: Tensor, amount: float, seed: int, step: int) -> Tensor:
    """x with each row times U(1/amount, amount), a function of (seed, step) alone (paper §5.4: amount 2)."""
    if amount == 1.0:
        return x_BD
    generator = keyed_generator(seed, "input noise", step)
    factor_B = torch.rand(len(x_BD), generator=generator) * (amount - 1 / amount) + 1 / amount
    return x_BD * factor_B.to(x_BD)[:, None]
