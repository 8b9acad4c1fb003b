"""What an SAE is made of and what it starts from, and what activations it takes."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cosae.errors import CosaeError, check_choice, short
from cosae.sae.frame import FRAMES
from cosae.sae.score import SCORES, Family
from cosae.sae.selector import SELECTORS
from cosae.sae.target import TARGET_FRAMES
from cosae.types import at_least_fp32

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What activations may come in. Eight-bit floats have no arithmetic of their own."""
MAX_LENGTH = 1.8e19
"""Root of the largest float32."""
CENTRES = ("geometric_median", "mean", "zero")
B_INITS = ("auto", "sqrt_d", "norm")


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is made of; an SAE has all sizes, a recipe may leave d_in, d_sae and k open (None).

    Raises CosaeError on a value that is not allowed.
    """

    d_in: int | None = None
    """Width of the activations; None: that of the data."""
    d_sae: int | None = None
    """Number of features; None takes the run's width."""
    score: str = "inner"
    """One of cosae.sae.score.SCORES."""
    selector: str = "batch_topk"
    """One of cosae.sae.selector.SELECTORS."""
    k: int | None = None
    """Mean active features per token (per token exactly for topk and abs_topk); None takes the run's."""
    frame: str = "raw"
    """What is scored and reconstructed: raw, unit or layer_norm."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka prefixes, ascending feature counts; d_sae is added at the end. Empty: one reconstruction."""
    norm_restoring: bool = False
    """Give the reconstruction of z the length of z."""
    n_groups: int = 4
    """Blocks of features that share a and b (or δ), where the owner is the group."""
    bias: bool = True
    """Whether scores have a bias β."""
    bandwidth: float = 0.5
    """JumpReLU: width of the gradient window around θ, relative to θ."""
    a_window: float = 0.0
    """BatchTopK: width of a gradient window around the smallest kept score, relative to it, through which a learns what
    it lets fire too (cosae.sae.selector); 0: a learns from the values of kept entries alone."""
    a_owner: str | None = None
    """Who owns a and b, for cosine_two_exponents: shared, group, feature, or fixed (then b is shared); None: shared."""
    value_exponent_owner: str | None = None
    """Who owns the value exponent, for cosine_two_exponents: shared, group, feature or fixed; None: shared."""
    d_out: int | None = None
    """Width of another site that is reconstructed from this one (a transcoder); None: the SAE reconstructs its input,
    or that of the data's target."""
    target_frame: str = "raw"
    """Of a transcoder: raw, or input, which puts back what the frame took out of the input (cosae.sae.target)."""
    skip: bool = False
    """Of a transcoder: whether a linear map of the input is added to the reconstruction."""
    sites: tuple[int, ...] = ()
    """Widths of the sites that x joins, each with a frame of its own (a crosscoder); empty: one site, or the data's."""
    balanced: bool = False
    """Of a crosscoder in the raw frame: whether each site is divided by its root mean square, a constant."""

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae", "k", "n_groups", "d_out"):
            value = getattr(self, name)
            if (value is None and name != "n_groups") or (type(value) is int and value >= 1):
                continue
            raise CosaeError(f"{name} must be a whole number of at least 1. Got {short(value)} instead.")
        check_choice("score", self.score, SCORES)
        check_choice("selector", self.selector, SELECTORS)
        check_choice("frame", self.frame, FRAMES)
        check_choice("target_frame", self.target_frame, TARGET_FRAMES)
        width = math.inf if self.d_sae is None else self.d_sae
        if (self.k or 1) > width:
            raise CosaeError(f"k must be at most d_sae = {self.d_sae}. To keep {self.k} features, raise d_sae.")
        if self.selector == "gated" and not self.bias:
            raise CosaeError("the gated selector needs the score's bias for its gates: leave bias=True.")
        family = self.family
        if "group" in (family.exponent_owner, family.value_owner) and self.n_groups > width:
            raise CosaeError(f"n_groups must be at most d_sae = {self.d_sae}. Got {self.n_groups} instead.")
        prefixes = tuple(int(p) for p in self.prefixes)
        if prefixes:
            if list(prefixes) != sorted(set(prefixes)) or prefixes[0] < 1 or prefixes[-1] > width:
                limits = f"between 1 and d_sae = {self.d_sae}"
                raise CosaeError(f"prefixes must be ascending feature counts {limits}. Got {list(prefixes)} instead.")
            prefixes = prefixes if self.d_sae in (None, prefixes[-1]) else (*prefixes, int(width))
        object.__setattr__(self, "prefixes", prefixes)
        sites = tuple(int(width) for width in self.sites)
        object.__setattr__(self, "sites", sites)
        if sites and (min(sites) < 1 or len(sites) < 2 or self.d_in not in (None, sum(sites)) or self.d_out):
            what = f"two or more widths that sum to d_in = {self.d_in}, and no target"
            raise CosaeError(f"the sites of a crosscoder must be {what}. Got {list(sites)} instead.")
        if not 0.0 < self.bandwidth < 2.0:
            raise CosaeError(f"bandwidth must lie between 0 and 2. Got {short(self.bandwidth)} instead.")

        self._check_window(family)

    def _check_window(self, family: Family) -> None:
        if not 0.0 <= self.a_window < 2.0:
            raise CosaeError(f"a_window must lie between 0 (none) and 2. Got {short(self.a_window)} instead.")
        if self.a_window and self.selector != "batch_topk":
            raise CosaeError(
                f"a_window needs the selector batch_topk, whose scores meet one threshold that moves with them. Got "
                f"{self.selector}: leave a_window at 0."
            )
        if self.a_window and family.exponent_owner == "fixed":
            raise CosaeError(f"a_window is for an exponent that learns. That of {self.score} is fixed: leave it at 0.")

    @property
    def family(self) -> Family:
        """The score's member of its family, with the owners chosen here."""
        return SCORES[self.score].owned(self.a_owner, self.value_exponent_owner)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(d_in, d_sae, k). Raises CosaeError where one is open."""
        if self.d_in is None or self.d_sae is None or self.k is None:
            raise CosaeError(f"an SAE needs d_in, d_sae and k. Got {self.d_in}, {self.d_sae} and {self.k}.")
        return self.d_in, self.d_sae, self.k

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields; those that few SAEs have only where they were chosen."""
        values = {**asdict(self), "prefixes": list(self.prefixes), "sites": list(self.sites)}
        rare = ("a_owner", "value_exponent_owner", "a_window", "d_out", "target_frame", "skip", "sites", "balanced")
        for name in rare:
            if getattr(self, name) == SAEConfig.__dataclass_fields__[name].default:
                del values[name]
        return values

    def with_widths(self, d_in: int, d_out: int | None, sites: tuple[int, ...] = ()) -> SAEConfig:
        """The same for data of these widths. Raises CosaeError for what only a transcoder has, without a target."""
        if d_out is None and (self.skip or self.target_frame != "raw"):
            what = "a linear skip" if self.skip else "a frame of the target"
            raise CosaeError(f"{what} is for a transcoder: name what it reconstructs with --target, or drop it.")
        sites = self.sites or sites
        if self.balanced and (not sites or self.frame != "raw"):
            raise CosaeError("balanced is for a crosscoder in the raw frame: name several sites, A+B, or drop it.")
        return replace(self, d_in=d_in, d_out=d_out, sites=sites)


@dataclass(frozen=True)
class InitConfig:
    """What a fresh SAE starts from (cosae.sae.initialise). Raises CosaeError on a value that is not allowed."""

    a_init: float = 0.0
    """Start of every learned exponent a, and the value of a fixed one of cosine_two_exponents."""
    b_init: str | float = "auto"
    """Start of b: auto, sqrt_d, norm, or a number."""
    centre: str = "geometric_median"
    """Start of the centre, fitted to a sample: geometric_median, mean or zero."""
    value_exponent_init: float = 1.0
    """Start of the value exponent δ of cosine_two_exponents, or its value where it is fixed."""

    def __post_init__(self) -> None:
        if isinstance(self.b_init, str):
            with suppress(ValueError):
                object.__setattr__(self, "b_init", float(self.b_init))
        number = isinstance(self.b_init, int | float) and not isinstance(self.b_init, bool)
        if not (math.isfinite(self.b_init) if number else self.b_init in B_INITS):  # type: ignore[arg-type]
            raise CosaeError(f"b_init must be a finite number or one of {', '.join(B_INITS)}. Got {self.b_init!r}.")
        for name in ("a_init", "value_exponent_init"):
            if not math.isfinite(value := getattr(self, name)):
                raise CosaeError(f"{name} must be a finite number. Got {value!r} instead.")
        check_choice("centre", self.centre, CENTRES)


def check_activations(x: Tensor, d_in: int, name: str = "x") -> Tensor:
    """x (..., d_in), any float dtype, as (N, d_in).

    Raises CosaeError for a wrong width, a non-float tensor, NaN or Inf (with the first one's position), and a row whose
    length squared is more than float32 holds.
    """
    if not isinstance(x, Tensor) or x.dtype not in DTYPES or x.ndim < 1 or x.shape[-1] != d_in:
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise CosaeError(
            f"{name} must be a float16, bfloat16, float32 or float64 tensor of shape (..., {d_in}). Got {got}."
        )
    flat = x.reshape(-1, d_in)
    if not float(torch.linalg.vector_norm(flat.detach(), dtype=at_least_fp32(flat[:0]).dtype)) <= MAX_LENGTH:
        bad = (~torch.isfinite(flat)).nonzero()
        if len(bad):
            row, column = (int(i) for i in bad[0])
            at = [int(i) for i in torch.unravel_index(torch.tensor(row), x.shape[:-1])] if x.ndim > 1 else []
            raise CosaeError(
                f"{name} must be finite. Got {float(flat[row, column])} at position {[*at, column]} "
                f"({len(bad)} non-finite values in all): drop or fix those rows."
            )
        length_N = torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float64)
        if len(long := (length_N > MAX_LENGTH).nonzero()):
            row = int(long[0])
            raise CosaeError(
                f"the length of a row of {name} must be at most {MAX_LENGTH:.2g}, or its square overflows. Got "
                f"{float(length_N[row]):.3g} at row {row} ({len(long)} such rows in all): drop or scale those rows."
            )
    return flat
