"""One optimisation step of one SAE. Enters a batch; leaves changed parameters, ages and numbers. No I/O.

Order (paper §3): forward → loss → who fired, ages → aux-k on the dead → backward → projection of decoder gradients,
clip, Adam, unit decoder rows (cosae.train.optimizer) → sparsity controller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cosae.errors import CosaeError, check_choice, check_least, check_most, check_positive
from cosae.kernels import ALONE, Peers, StepCache
from cosae.kernels.deterministic import total
from cosae.kernels.moments import STATE_DTYPES
from cosae.kernels.select.search import carried
from cosae.sae import loss as losses
from cosae.sae.frame import live_rows
from cosae.sae.model import SAE, TrainOutput
from cosae.sae.parts import joined, part_of, per_feature
from cosae.sae.selector import PENALISED_SELECTORS
from cosae.train.arm import Arm, input_noise
from cosae.train.monitor import LossMonitor
from cosae.train.optimizer import MOST_LR, UnitRowAdam

CONTROLLER_START = 20
SHIFT_GAIN = 0.10
SHIFT_CLIP = 1.0
SHIFT_MEMORY = 0.9
WEIGHT_GAIN = 1.0
WEIGHT_CLIP = 0.05
WEIGHT_RANGE = (1e-6, 1e2)
PLAIN_NUMBERS = ("weight", "hint", "typical_gate", "seconds", "stopped")
"""What a checkpoint keeps of an arm's state just as it is."""


class NonFiniteError(CosaeError):
    """The loss or a gradient became NaN or infinite; parameters are as they were before the step."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam and its schedule. Raises CosaeError on a value that is not allowed."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float | None = 1.0
    """Largest global L2 norm of the gradient; None does not clip."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0 to lr."""
    decay_frac: float = 0.2
    """Last share of the steps over which it falls to 0 linearly."""
    state_dtype: str = "float32"
    """What Adam's moments of the matrices are kept in: float32, bfloat16 or int8 (cosae.kernels.moments)."""

    def __post_init__(self) -> None:
        check_positive("lr", self.lr)
        check_most("lr", self.lr, MOST_LR)
        check_positive("eps", self.eps)
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and 0 <= self.decay_frac <= 1):
            raise CosaeError("betas must lie in [0, 1) and decay_frac between 0 and 1.")
        if self.clip is not None and not self.clip > 0:
            raise CosaeError(f"clip must be above 0, or null for none. Got {self.clip!r} instead.")
        check_least("warmup_steps", self.warmup_steps, 0)
        check_choice("state_dtype", self.state_dtype, STATE_DTYPES)


def lr_scale(step: int, steps: int, config: OptimizerConfig) -> float:
    """Factor on the learning rate at 0-based `step` of `steps`: linear up, flat, linear down to 0 (paper §3)."""
    up = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    start = steps * (1 - config.decay_frac)
    down = 1.0 if step < start else max(0.0, (steps - step) / max(steps - start, 1e-9))
    return min(up, down)


@dataclass
class ArmState:
    """Everything about one arm that a step changes.

    age_F   (F,) int64 tokens since each feature last fired
    hint    smallest kept score of the last batch, for a faster search
    weight  λ of the sparsity term;  shift_mean, typical_gate  what its controller remembers
    stopped why this arm stopped, None while it runs
    digest  chained over the batches this arm was handed: equal digests mean the same batches in the same order
    cache   what the parts of a step tell each other and the next step; no result depends on it, no checkpoint holds it
    monitor what tells spikes and jumps from what was usual (cosae.train.monitor)
    peers   who has the rest of batch and dictionary; the SAE and all (F,) are of this process' features then
    """

    arm: Arm
    sae: SAE
    optimizer: UnitRowAdam
    variance: float
    age_F: Tensor
    weight: float
    hint: float | None = None
    shift_mean: float = math.nan
    typical_gate: float = 1.0
    seconds: float = 0.0
    stopped: str | None = None
    digest: bytes = bytes(32)
    cache: StepCache = field(default_factory=StepCache)
    monitor: LossMonitor = field(default_factory=LossMonitor)
    peers: Peers = ALONE

    @classmethod
    def start(cls, arm: Arm, sae: SAE, variance: float, config: OptimizerConfig, peers: Peers = ALONE) -> ArmState:
        """A fresh state. `variance` is what squared errors are divided by (cosae.sae.loss)."""
        parameters = dict(sae.named_parameters())
        optimizer = UnitRowAdam(
            parameters,
            unit_rows=("decoder.rows_FD",),
            lr=config.lr if arm.lr is None else arm.lr,
            lr_multipliers={name: by for name, by in arm.lr_multipliers().items() if name in parameters},
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            clip=config.clip,
            state_dtype=config.state_dtype,
            seed=arm.seed or 0,
            kernel=sae.kernel,
            screened="score.rows_FD",
            split=per_feature(sae),
        )
        age_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.device)
        return cls(arm, sae, optimizer, variance, age_F, arm.sparsity_weight, peers=peers)

    @property
    def exponent(self) -> float | None:
        """Mean exponent a where it is learned and has an effect (in the unit frame r = 1: none), else None."""
        idle = self.sae.score.family.exponent_owner == "fixed" or self.sae.cfg.frame == "unit"
        return None if idle else float(self.peers.whole(self.sae.scale_a.detach()).mean())

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint, tensors by name (no copies): of this process' features."""
        state = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        state |= {f"optimizer.{name}": value for name, value in self.optimizer.state_dict().items()}
        return {**state, "age_F": self.age_F}

    def numbers(self) -> dict[str, Any]:
        """State for a checkpoint, plain numbers."""
        shift_mean = None if math.isnan(self.shift_mean) else self.shift_mean
        special = {"shift_mean": shift_mean, "digest": self.digest.hex(), "monitor": asdict(self.monitor)}
        return {name: getattr(self, name) for name in PLAIN_NUMBERS} | special

    def own_part(self, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `restore` takes, from `tensors` of all features in their order, however many parts these were cut in."""
        if len(parts) == self.peers.feature_ranks:
            return parts[self.peers.feature_rank]
        names = [*per_feature(self.sae), "age_F"]
        return part_of(joined(parts, names), names, self.peers.feature_rank, self.peers.feature_ranks)

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Put back what `tensors` and `numbers` gave, to the bit."""
        self.sae.load_state_dict({k.removeprefix("sae."): v for k, v in tensors.items() if k.startswith("sae.")})
        optimizer = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
        self.optimizer.load_state_dict(optimizer)
        self.age_F = tensors["age_F"].to(self.age_F.device)
        for name in PLAIN_NUMBERS:
            setattr(self, name, numbers[name])
        self.shift_mean = math.nan if numbers["shift_mean"] is None else numbers["shift_mean"]
        self.digest = bytes.fromhex(numbers["digest"])
        self.monitor = LossMonitor(**numbers.get("monitor", {}))


@dataclass(frozen=True)
class Batch:
    """x (B, d_in) fp32 and what every arm asks of it: arms in lockstep work it out once.

    live_B (B,) bool: rows that are not all zero;  spread () |x − batch mean|² over live rows.
    calm_B, calm_spread  the same without attention sinks; None where it is not asked which rows are
    y_BD   (B, d_out) targets, in whose units the spreads then are; None where x itself is reconstructed
    """

    x_BD: Tensor
    live_B: Tensor
    spread: Tensor
    calm_B: Tensor | None = None
    calm_spread: Tensor | None = None
    y_BD: Tensor | None = None

    def part(self, rows: slice) -> Batch:
        """Some of its rows; the spreads stay those of the whole batch."""
        if len(range(*rows.indices(len(self.x_BD)))) == len(self.x_BD):
            return self
        calm_B = None if self.calm_B is None else self.calm_B[rows]
        y_BD = None if self.y_BD is None else self.y_BD[rows]
        return replace(self, x_BD=self.x_BD[rows], live_B=self.live_B[rows], calm_B=calm_B, y_BD=y_BD)

    @classmethod
    def of(cls, x_BD: Tensor, sink_B: Tensor | None = None, y_BD: Tensor | None = None) -> Batch:
        """These rows with what every arm asks of them."""
        live_B = live_rows(x_BD)
        if y_BD is not None:
            return cls._of_targets(x_BD, live_B, sink_B, y_BD)
        mean_D = x_BD.sum(0) / live_B.sum().clamp_min(1)
        # masked rows are zero and would count |mean|² each
        masked = (~live_B).sum() * mean_D.square().sum()
        distance_B = torch.linalg.vector_norm(x_BD - mean_D, dim=-1)
        spread = total(distance_B.square()) - masked
        if sink_B is None:
            return cls(x_BD, live_B, spread)
        calm_ND = x_BD[calm_B := live_B & ~sink_B]
        return cls(x_BD, live_B, spread, calm_B, total((calm_ND - calm_ND.mean(0)).square()))

    @classmethod
    def _of_targets(cls, x_BD: Tensor, live_B: Tensor, sink_B: Tensor | None, y_BD: Tensor) -> Batch:
        def spread(kept_B: Tensor) -> Tensor:
            kept_ND = y_BD[kept_B]
            return total((kept_ND - kept_ND.sum(0) / max(len(kept_ND), 1)).square())

        calm_B = None if sink_B is None else live_B & ~sink_B
        return cls(x_BD, live_B, spread(live_B), calm_B, None if calm_B is None else spread(calm_B), y_BD)


def train_step(
    state: ArmState, x_BD: Tensor | Batch, step: int, scale: float, dead_after_tokens: int
) -> dict[str, Tensor | float]:
    """Change `state` by one step on x (B, d_in) fp32, or its `Batch`; `scale` multiplies the learning rate.

    Returns loss, its terms and what `measure` reads, as 0-d tensors or numbers. Raises NonFiniteError, with nothing
    changed, where the loss or a gradient is not finite. No gradient outlives the step; its matrices are kept in the
    cache's workspace as memory for the next one's: arms in lockstep share one and need one arm's.

    With peers, x is the whole batch, of which this process takes its rows, and the numbers are those of all of them.
    """
    sae, arm, peers = state.sae, state.arm, state.peers
    batch = x_BD if isinstance(x_BD, Batch) else Batch.of(x_BD)
    if arm.input_noise != 1.0:
        sink_B = None if batch.calm_B is None else batch.live_B & ~batch.calm_B
        batch = Batch.of(input_noise(batch.x_BD, arm.input_noise, arm.seed or 0, step), sink_B, batch.y_BD)
    batch = batch.part(peers.rows(len(batch.x_BD)))
    k = arm.k_at(step)
    output = sae.train_forward(batch.x_BD, state.hint, batch.live_B, state.cache, peers, batch.y_BD, k)
    fired_F, n_fired = _fired(sae, output)
    n_live = output.n_live
    age_F = torch.where(fired_F, 0, state.age_F + n_live)
    dead_F = age_F >= dead_after_tokens
    n_fired, has_dead = peers.counts(n_fired, int(dead_F.any()))
    terms = losses.terms_of(
        sae,
        output,
        arm.loss,
        variance=state.variance,
        dead_F=dead_F if has_dead else None,
        sparsity_weight=state.weight,
        sparse_gradients=True,
    )
    loss = torch.stack(list(terms.values())).sum()
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(f"the loss became {float(loss.detach())} at step {step}")
    state.optimizer.zero_grad()
    torch.autograd.backward(loss)
    if not peers.alone:
        state.cache.measured = []  # of this process' share of the gradients
        peers.reduce_gradients(state.optimizer.parameters, state.optimizer.split)
    try:
        grad_norm = state.optimizer.step(scale, state.cache, peers)
    except FloatingPointError:
        raise NonFiniteError(f"a gradient became non-finite at step {step}") from None
    finally:
        state.cache.end_step([p.grad for p in state.optimizer.parameters.values() if p.grad is not None])
        state.optimizer.zero_grad()
    state.age_F = age_F
    state.hint = carried(state.hint, output.selection.hint)
    l0 = n_fired / max(int(n_live), 1)
    if sae.cfg.selector == "gated":
        open_E = output.selection.score_E.detach()
        if n_open := peers.counts(len(open_E))[0]:
            state.typical_gate = float(peers.both(total(open_E)) / n_open)
    _control(state, l0, step)
    return {
        "loss": loss.detach(),
        **{f"loss_{name}": value.detach() for name, value in terms.items()},
        "grad_norm": grad_norm,
        "l0": l0,
        "dead_frac": peers.features(dead_F.float().mean()) / peers.feature_ranks if has_dead else 0.0,
        **_batch_fve(output, batch),
    }


def _fired(sae: SAE, output: TrainOutput) -> tuple[Tensor, int]:
    """((F,) bool, number of firings): liveness by value ≠ 0, so that signed codes count."""
    feature_E, on_E = output.selection.entries.feature_E, output.selection.value_E.detach() != 0
    n_fired = int(on_E.sum())
    fired_E = feature_E if n_fired == len(feature_E) else feature_E[on_E]
    fired_F = torch.zeros(sae.d_sae, dtype=torch.bool, device=fired_E.device).index_fill_(0, fired_E, True)
    return fired_F if output.peers.alone else output.peers.tokens(fired_F.int()) > 0, n_fired


@torch.no_grad()
def _batch_fve(output: TrainOutput, batch: Batch) -> dict[str, Tensor]:
    """1 − |x − x̂|² / |x − batch mean|² in raw units, masked rows left out: a training-time glance, not the metric.

    Where it is known which rows are sinks, without them too.
    """
    error_B = losses.squared_error(output, output.error[-1], output.recon[-1], "raw")
    tokens = output.peers.tokens
    missed = tokens(total(error_B[batch.live_B]))
    found = {"fve": 1 - missed / batch.spread.clamp_min(losses.DENOMINATOR_MIN)}
    if batch.calm_B is not None and batch.calm_spread is not None:
        calm = tokens(total(error_B[batch.calm_B])) / batch.calm_spread.clamp_min(losses.DENOMINATOR_MIN)
        found["fve_sinks_out"] = 1 - calm if int(tokens(batch.calm_B.sum())) else calm.new_tensor(math.nan)
    return found


@torch.no_grad()
def _control(state: ArmState, l0: float, step: int) -> None:
    """Keep L0 at k for the selectors that choose by their own thresholds: two loops, the outer slow.

    inner: all thresholds move together by SHIFT_GAIN · ln(L0 / k): ln θ of jumprelu, the gate biases of gated (in units
           of the mean open π). L0 answers at once, so this loop is of first order and does not swing.
    outer: Δ ln λ = WEIGHT_GAIN · mean shift: while the inner loop has to raise thresholds λ is too small, so it
           settles where the penalty alone would hold L0.

    The paper's controller moves λ alone (§2): λ acts on L0 through two integrations, θ's and its own, and swings or
    lags, and at Adam's lr its θ cannot follow the scores' growth at all (§9 #9).
    """
    if state.sae.cfg.selector not in PENALISED_SELECTORS:
        return
    error = math.log(max(l0, 1e-3) / state.sae.k)
    shift = SHIFT_GAIN * min(max(error, -SHIFT_CLIP), SHIFT_CLIP)
    if state.sae.cfg.selector == "jumprelu":
        state.sae.selector.log_threshold_F.add_(shift)
    elif state.sae.score.bias_F is not None:
        state.sae.score.bias_F.sub_(shift * state.typical_gate)
    previous = shift if math.isnan(state.shift_mean) else state.shift_mean
    state.shift_mean = SHIFT_MEMORY * previous + (1 - SHIFT_MEMORY) * shift
    if step >= CONTROLLER_START:
        move = min(max(WEIGHT_GAIN * state.shift_mean, -WEIGHT_CLIP), WEIGHT_CLIP)
        state.weight = min(max(state.weight * math.exp(move), WEIGHT_RANGE[0]), WEIGHT_RANGE[1])
