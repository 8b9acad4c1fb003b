"""Adam with unit rows: parameters with gradients enter, stepped parameters leave.

Order of one step (paper §3): from each gradient row of the unit-row parameters take its component along the row →
clip the global L2 norm over all parameters (the norm after that projection) → Adam → renormalise the unit rows.

`_Plain` is the definition, in PyTorch. `_Compiled` does projection, clip, Adam and renormalisation in one sweep over
each matrix (after one reading sweep for the norm, which a global clip needs), where numba is installed; it agrees
with the definition to rounding, and with itself to the bit for any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cosae.kernels import native
from cosae.types import CosaeError

ROW_LENGTH_MIN = 1e-8
"""Smallest row length divided by when rows are renormalised (paper §3)."""


@dataclass(frozen=True)
class _Step:
    """Numbers of one step for one parameter: lr / (1 − β1^t), √(1 − β2^t), and the factor of the clip."""

    rate: float
    root_bias2: float
    clip: float


class _Plain:
    """The definition: each parameter in PyTorch."""

    @staticmethod
    def measure(grad: Tensor, weight: Tensor, unit: bool) -> tuple[Tensor | None, float]:
        """Component of each gradient row along its row (R,), and the squared norm of what is left, in float64."""
        if not unit:
            return None, float(torch.linalg.vector_norm(grad, dtype=torch.float64).square())
        along_R = (grad * weight).sum(-1) / weight.square().sum(-1).clamp_min(ROW_LENGTH_MIN**2)
        rest = grad - along_R[:, None] * weight
        return along_R, float(torch.linalg.vector_norm(rest, dtype=torch.float64).square())

    @staticmethod
    def step(
        grad: Tensor, weight: Tensor, mean: Tensor, square: Tensor, along_R: Tensor | None, now: _Step,
        betas: tuple[float, float], eps: float,
    ) -> None:  # fmt: skip
        rest = grad if along_R is None else grad - along_R[:, None] * weight
        rest = rest * now.clip
        mean.lerp_(rest, 1.0 - betas[0])
        square.mul_(betas[1]).addcmul_(rest, rest, value=1.0 - betas[1])
        weight.addcdiv_(mean, square.sqrt().div_(now.root_bias2).add_(eps), value=-now.rate)
        if along_R is not None:
            weight.div_(torch.linalg.vector_norm(weight, dim=-1, keepdim=True).clamp_min(ROW_LENGTH_MIN))


class _Compiled:
    """The same for fp32 matrices on the CPU, by compiled loops."""

    @staticmethod
    def measure(grad: Tensor, weight: Tensor, unit: bool) -> tuple[Tensor | None, float]:
        along_R = torch.empty(len(grad))
        square_R = torch.empty(len(grad), dtype=torch.float64)
        arrays = (grad.numpy(), weight.numpy(), unit, along_R.numpy(), square_R.numpy())
        native.run_parts(native.adam_loops().measure_rows, native.parts_for(grad.numel()), *arrays)
        return along_R, float(square_R.numpy().sum())

    @staticmethod
    def step(
        grad: Tensor, weight: Tensor, mean: Tensor, square: Tensor, along_R: Tensor | None, now: _Step,
        betas: tuple[float, float], eps: float, unit: bool,
    ) -> None:  # fmt: skip
        assert along_R is not None
        arrays = [t.numpy() for t in (grad, weight, mean, square, along_R)]
        numbers = [np.float32(x) for x in (now.clip, *betas, now.rate, now.root_bias2, eps)]
        loop = native.adam_loops().step_rows
        native.run_parts(loop, native.parts_for(4 * grad.numel()), *arrays, unit, *numbers)


def _served(grad: Tensor, weight: Tensor) -> bool:
    """Whether the compiled loops serve this parameter."""
    return (
        native.serves()
        and weight.dim() == 2
        and weight.is_contiguous()
        and grad.is_contiguous()
        and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (grad, weight))
    )


class UnitRowAdam:
    """Adam over named parameters, some of which have rows of unit length.

    parameters      by name; fp32 (float64 works), stepped in place
    unit_rows       names of (F, D) parameters whose rows stay on the unit sphere
    lr              learning rate of multiplier 1
    lr_multipliers  by name; 1 where absent
    betas, eps      Adam's, no weight decay
    clip            largest global gradient norm, or None for none

    Raises CosaeError for a name that is not a parameter, an unit-row parameter that is not a matrix, or a number out
    of range.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        unit_rows: tuple[str, ...] = (),
        lr: float = 5e-5,
        lr_multipliers: Mapping[str, float] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip: float | None = 1.0,
    ) -> None:
        self.parameters = dict(parameters)
        self.unit_rows = frozenset(unit_rows)
        self.lr, self.lr_multipliers = lr, dict(lr_multipliers or {})
        self.betas, self.eps, self.clip = betas, eps, clip
        self._check()
        self._count = dict.fromkeys(self.parameters, 0)
        self._mean = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters.items()}
        self._square = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters.items()}

    def _check(self) -> None:
        known = ", ".join(self.parameters)
        for name in (*self.unit_rows, *self.lr_multipliers):
            if name not in self.parameters:
                raise CosaeError(f"unit_rows and lr_multipliers must name parameters ({known}). Got {name!r} instead.")
        for name in self.unit_rows:
            if self.parameters[name].dim() != 2:
                shape = tuple(self.parameters[name].shape)
                raise CosaeError(f"unit_rows must be matrices, rows first. Got {name!r} of shape {shape} instead.")
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise CosaeError(f"lr must be a number ≥ 0. Got {self.lr} instead.")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise CosaeError(f"betas must lie in [0, 1). Got {self.betas} instead.")
        if self.clip is not None and not self.clip > 0:
            raise CosaeError(f"clip must be > 0, or None for no clip. Got {self.clip} instead.")

    @torch.no_grad()
    def step(self, lr_scale: float = 1.0) -> float:
        """One step at lr · lr_scale; returns the global gradient norm after projection and before the clip.

        A parameter without gradient is left alone, its moments too. Raises FloatingPointError, before anything has
        changed, where a gradient is not finite; the message names the parameter.
        """
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        along: dict[str, Tensor | None] = {}
        total = 0.0
        for name, grad in grads.items():
            weight = self.parameters[name].detach()
            measure = _Compiled.measure if _served(grad, weight) else _Plain.measure
            along[name], square = measure(grad, weight, name in self.unit_rows)
            if not math.isfinite(square):
                raise FloatingPointError(f"the gradient of {name} is not finite")
            total += square
        norm = math.sqrt(total)
        clip = 1.0 if self.clip is None else min(1.0, self.clip / (norm + 1e-6))
        for name, grad in grads.items():
            self._step_one(name, grad, along[name], clip, self.lr * lr_scale)
        return norm

    def _step_one(self, name: str, grad: Tensor, along_R: Tensor | None, clip: float, lr: float) -> None:
        self._count[name] += 1
        rate = lr * self.lr_multipliers.get(name, 1.0) / (1.0 - self.betas[0] ** self._count[name])
        now = _Step(rate, math.sqrt(1.0 - self.betas[1] ** self._count[name]), clip)
        weight = self.parameters[name].detach()
        state = (grad, weight, self._mean[name], self._square[name], along_R, now, self.betas, self.eps)
        if _served(grad, weight):
            _Compiled.step(*state, unit=name in self.unit_rows)
            torch.autograd.graph.increment_version(weight)
        else:
            _Plain.step(*state)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors by "<what>.<parameter>": `count` () int64, `mean` and `square` shaped like the parameter."""
        state: dict[str, Tensor] = {}
        for name in self.parameters:
            state[f"count.{name}"] = torch.tensor(self._count[name])
            state[f"mean.{name}"] = self._mean[name].clone()
            state[f"square.{name}"] = self._square[name].clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises CosaeError where the state belongs to other parameters; nothing has changed then.
        """
        own = self.state_dict()
        if set(own) != set(state):
            odd = sorted(set(own) ^ set(state))[0]
            raise CosaeError(f"the optimiser's state must hold exactly its own parameters. {odd!r} is in only one.")
        for key, value in own.items():
            if state[key].shape != value.shape:
                came = tuple(state[key].shape)
                raise CosaeError(f"state {key!r} must have shape {tuple(value.shape)}. Got {came} instead.")
        for name in self.parameters:
            self._count[name] = int(state[f"count.{name}"])
            self._mean[name].copy_(state[f"mean.{name}"])
            self._square[name].copy_(state[f"square.{name}"])
