"""Adam with unit rows: parameters with gradients enter, stepped parameters leave.

Order of one step (paper §3): from each gradient row of the unit-row parameters take its component along the row →
clip the global L2 norm over all parameters (of this very step, after that projection) → Adam → renormalise the unit
rows. `cosae.train.adam` holds the arithmetic of one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from cosae.errors import CosaeError, check_choice, check_positive
from cosae.kernels import ALONE, Peers, StepCache
from cosae.kernels.moments import STATE_DTYPES, Moment, Task, key_of
from cosae.train import adam

MOST_LR = 1e30
"""Of a run, of an arm and of its multiples: beyond it the first step leaves float32."""


class UnitRowAdam:
    """Adam over named parameters, some of which have rows of unit length.

    parameters      by name; fp32 (float64 works), stepped in place
    unit_rows       names of (F, D) parameters whose rows stay on the unit sphere
    lr              learning rate of multiplier 1
    lr_multipliers  by name; 1 where absent
    betas, eps      Adam's, no weight decay
    clip            largest global gradient norm, or None for none
    state_dtype     what the moments of matrices are kept in: float32, bfloat16 or int8 (cosae.kernels.moments)
    seed            of the stochastic rounding of compressed moments
    kernel          which path steps (cosae.kernels.choose)
    split           names of parameters with a row or a number for each feature, of which peers have other ones
    screened        the parameter that the next step screens by: a step with a cache leaves its rows' norms there
                    (on a GPU its unit rows)

    Raises CosaeError for a name that is not a parameter, an unit-row parameter that is not a matrix, or a value out
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
        state_dtype: str = "float32",
        seed: int = 0,
        kernel: str = "auto",
        screened: str | None = None,
        split: Collection[str] = (),
    ) -> None:
        self.parameters = dict(parameters)
        self.unit_rows = frozenset(unit_rows)
        self.lr, self.lr_multipliers = lr, dict(lr_multipliers or {})
        self.betas, self.eps, self.clip = betas, eps, clip
        self.state_dtype, self.seed, self.kernel, self.screened = state_dtype, seed, kernel, screened
        self.split = frozenset(split)
        self._check()
        self._count = dict.fromkeys(self.parameters, 0)
        self._mean = {name: Moment.zero(p, state_dtype, signed=True) for name, p in self.parameters.items()}
        self._square = {name: Moment.zero(p, state_dtype, signed=False) for name, p in self.parameters.items()}

    def _check(self) -> None:
        known = ", ".join(self.parameters)
        for name in (*self.unit_rows, *self.lr_multipliers):
            if name not in self.parameters:
                raise CosaeError(f"unit_rows and lr_multipliers must name parameters ({known}). Got {name!r} instead.")
        for name in self.unit_rows:
            if self.parameters[name].dim() != 2:
                raise CosaeError(f"unit_rows must be matrices, rows first. Got {name!r}, which is none.")
        check_positive("lr", self.lr, zero=True)
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise CosaeError(f"betas must lie in [0, 1). Got {self.betas} instead.")
        if self.clip is not None and not self.clip > 0:
            raise CosaeError(f"clip must be > 0, or None for no clip. Got {self.clip} instead.")
        check_choice("state_dtype", self.state_dtype, STATE_DTYPES)

    @torch.no_grad()
    def step(self, lr_scale: float = 1.0, cache: StepCache | None = None, peers: Peers = ALONE) -> float:
        """One step at lr · lr_scale; returns the global gradient norm after projection and before the clip.

        cache: that of the training step, which may hold what the gradients' loops measured. peers: who has the other
        features of the parameters in `split`; their gradients count in the norm. A parameter without
        gradient is left alone, its moments too. Raises FloatingPointError, before anything has changed, where a
        gradient is not finite; the message names the parameter.
        """
        grads = self.gradients
        paths = {name: adam.path_of(self.kernel, grad, self.parameters[name]) for name, grad in grads.items()}
        along: dict[str, Tensor | None] = {}
        squares: list[Tensor] = []
        for name, grad in grads.items():
            weight, unit = self.parameters[name].detach(), name in self.unit_rows
            along[name], square = paths[name].measure(grad, weight, unit, cache)
            squares.append(square)
        split = [name in self.split for name in grads]
        numbers = peers.squares(torch.stack(squares), split).tolist() if squares else []
        for name, value in zip(grads, numbers, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"the gradient of {name} is not finite")
        norm = math.sqrt(sum(numbers))
        clip = 1.0 if self.clip is None else min(1.0, self.clip / (norm + 1e-6))
        for name, grad in grads.items():
            paths[name].step(self._task(name, grad, along[name], clip, self.lr * lr_scale, cache))
        return norm

    def _task(
        self, name: str, grad: Tensor, along_R: Tensor | None, clip: float, lr: float, cache: StepCache | None
    ) -> Task:
        """What one parameter's step needs; counts it."""
        self._count[name] += 1
        count = self._count[name]
        return Task(
            grad=grad,
            weight=self.parameters[name].detach(),
            mean=self._mean[name],
            square=self._square[name],
            along_R=along_R,
            rate=lr * self.lr_multipliers.get(name, 1.0) / (1.0 - self.betas[0] ** count),
            root_bias2=math.sqrt(1.0 - self.betas[1] ** count),
            clip=clip,
            betas=self.betas,
            eps=self.eps,
            keys=(key_of(self.seed, f"mean.{name}", count), key_of(self.seed, f"square.{name}", count)),
            cache=cache if name == self.screened else None,
        )

    @property
    def gradients(self) -> dict[str, Tensor]:
        """By name, of the parameters that have one."""
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors by "<what>.<parameter>": `count` () int64, `mean` and `square` shaped like the parameter.

        int8 moments come with `mean_scale` and `square_scale`, (rows, blocks) fp32.
        """
        counts = {f"count.{name}": torch.tensor(count) for name, count in self._count.items()}
        return counts | {key: value.clone() for key, value in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        """The moments' own tensors by the names of `state_dict`."""
        return {
            f"{what}{part}.{name}": value
            for what, moments in (("mean", self._mean), ("square", self._square))
            for name, moment in moments.items()
            for part, value in moment.tensors().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises CosaeError where the state belongs to other parameters or is kept in another precision; nothing has
        changed then.
        """
        own = self._tensors()
        if odd := sorted((set(own) | {f"count.{name}" for name in self.parameters}) ^ set(state)):
            raise CosaeError(f"the optimiser's state must hold exactly its own parameters. {odd[0]!r} is in only one.")
        for key, value in own.items():
            if state[key].shape != value.shape:
                came = tuple(state[key].shape)
                raise CosaeError(f"state {key!r} must have shape {tuple(value.shape)}. Got {came} instead.")
            if state[key].dtype != value.dtype:
                asked = f"{value.dtype}, as state_dtype {self.state_dtype} asks"
                raise CosaeError(f"state {key!r} must be {asked}. Got {state[key].dtype}: keep the run's state_dtype.")
        for name in self.parameters:
            self._count[name] = int(state[f"count.{name}"])
        for key, value in own.items():
            value.copy_(state[key])
