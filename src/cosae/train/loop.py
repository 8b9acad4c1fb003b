"""Many SAEs in lockstep on one stream: every arm sees the same batches in the same order, paired by construction.

Enters a stream of activations and fresh arms; leaves trained SAEs. Only `train_step` changes an SAE. A checkpoint after
any step continues to the bit. Ctrl-C and SIGTERM end the step in progress, save, and raise `Interrupted`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from cosae.activations.digest import chain, fingerprint
from cosae.errors import CosaeError, check_choice, check_least, check_most
from cosae.io.signals import Interrupted, Stop, StopAsked, stop_on_signals
from cosae.train.arm import check_seed
from cosae.train.log import Logger
from cosae.train.ranks import ONE, Ranks
from cosae.train.side_by_side import SideBySide
from cosae.train.step import ArmState, Batch, NonFiniteError, OptimizerConfig, lr_scale, train_step
from cosae.types import Activations

__all__ = ["MOVING", "Interrupted", "Stream", "TrainingConfig", "exponent_moving", "train"]

T = TypeVar("T")
MOST_STEPS, MOST_TOKENS = 10**10, 2**40
"""More is a slip of the pen: years of a fast machine, terabytes of activations."""
MOVING = 0.01
"""A mean exponent that changed by more than this over the last tenth of the steps at full rate is still moving."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how fast, and when to write. Raises CosaeError on a value that is not allowed."""

    steps: int = 2000
    extended_from: tuple[int, ...] = ()
    """Steps at which the run had ended before it was extended (`cosae resume --extend-to`), ascending. The learning
    rate has a schedule of its own from each of them on."""
    batch_tokens: int = 1024
    buffer_tokens: int = 131072
    """Tokens of the shuffle buffer."""
    store_dtype: str = "float32"
    """Precision of the shuffle buffer: float32 or bfloat16."""
    seed: int = 0
    """Of the data order, and of every arm that names none."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    dead_after_tokens: int = 200_000
    """Tokens without firing after which a feature counts as dead (paper: 10 million)."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0 writes one only on interruption."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "dead_after_tokens", "log_every"):
            check_least(name, getattr(self, name), 1)
        check_most("steps", self.steps, MOST_STEPS)
        marks = (0, *self.extended_from, self.steps)
        if any(b <= a for a, b in itertools.pairwise(marks)):
            what = f"extended_from must hold ascending steps between 0 and steps = {self.steps}"
            raise CosaeError(f"{what}. Got {list(self.extended_from)} instead.")
        for name in ("batch_tokens", "buffer_tokens"):
            check_most(name, getattr(self, name), MOST_TOKENS)
        check_seed(self.seed)
        check_least("checkpoint_every", self.checkpoint_every, 0)
        check_choice("store_dtype", self.store_dtype, ("float32", "bfloat16"))

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """(first step, end) of each schedule of the learning rate: one, and one for each extension."""
        return tuple(itertools.pairwise((0, *self.extended_from, self.steps)))

    def lr_scale(self, step: int) -> float:
        """Factor on the learning rate at 0-based `step`, by the schedule of the part that it lies in."""
        begin, end = next((begin, end) for begin, end in self.parts if step < end)
        return lr_scale(step - begin, end - begin, self.optimizer)


class Stream(Protocol):
    """What the loop needs of a stream."""

    def next_batch(self) -> Activations: ...


def train(
    states: Sequence[ArmState],
    stream: Stream,
    config: TrainingConfig,
    *,
    start: int = 0,
    seconds: float = 0.0,
    loggers: Sequence[Logger] = (),
    save: Callable[[int, float], None] | None = None,
    on_step: Callable[[], None] | None = None,
    log: Callable[[str], None] | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    stop: Stop | None = None,
    ranks: Ranks = ONE,
) -> float:
    """Run steps start … config.steps − 1 for every arm; returns the seconds spent, earlier ones included.

    save(step, seconds) is called every `checkpoint_every` steps and on interruption; on_event(event) with whatever the
    stream's or an arm's monitor noticed: {"step", "kind", "arm" (None: the stream), numbers, "text"}. stop: who
    listens for Ctrl-C and SIGTERM; None listens here. An arm whose loss turns non-finite stops with a reason in
    `ArmState.stopped`; the others go on. ranks: who trains the rest of each batch, of the SAEs and of the arms; a
    batch of the stream is the whole one, and all stop and save after the same step. Raises Interrupted after saving,
    CosaeError when no arm is left, and what the stream raises, after saving.
    """
    with stop_on_signals() if stop is None else nullcontext(stop) as stop, SideBySide(states) as side_by_side:
        notify = on_event or (lambda event: None)
        monitor, sink_norm = getattr(stream, "monitor", None), getattr(stream, "sink_norm", None)
        begun = time.perf_counter() - seconds
        saved = start
        pending: list[dict[str, Any]] = []
        for step in range(start, config.steps):
            try:
                batch = stream.next_batch()
            except (CosaeError, StopAsked) as end:  # a source that broke, or was stopped, takes no steps with it
                if save is not None and saved != step:
                    save(step, time.perf_counter() - begun)
                if isinstance(end, StopAsked):
                    raise Interrupted(step) from None
                raise
            done = step + 1
            for event in monitor.take_events() if monitor is not None else ():
                notify({"step": done, "arm": None, **event})
            scale = config.lr_scale(step)
            logged = done % config.log_every == 0 or done in (1, *config.extended_from, config.steps)
            sink_B = None if sink_norm is None else batch.norm_N >= sink_norm
            rows, print_ = Batch.of(batch.x_ND, sink_B, batch.y_ND), fingerprint(batch)
            running = [state for state in states if state.stopped is None]
            for state in running:
                state.digest = chain(state.digest, print_)
            advance = partial(_advance, batch=batch, rows=rows, step=step, scale=scale, config=config)
            numbers = {}
            for state, measured in zip(running, side_by_side.run(advance, running), strict=True):
                pending += [{"step": done, "arm": state.arm.name, **event} for event in _events(state, measured, log)]
                if logged and measured is not None:
                    numbers[state.arm.name] = _record(state, measured, scale, step, config)
            due = config.checkpoint_every and done % config.checkpoint_every == 0 and done < config.steps
            if ranks.n == 1 or logged or due:
                for event in _once(ranks.gather(pending)):
                    notify(event)
                pending = []
            if not ranks.any(not all(state.stopped for state in states)):
                reasons = _once(ranks.gather([f"{s.arm.name}: {s.stopped}" for s in states]))
                raise CosaeError("every arm stopped: " + "; ".join(reasons))
            if on_step is not None:
                on_step()
            if logged:
                elapsed = time.perf_counter() - begun
                arms = {name: arm for some in ranks.gather(numbers) for name, arm in some.items()}
                record = {"step": done, "tokens": done * config.batch_tokens, "seconds": elapsed, "arms": arms}
                for logger in loggers:
                    logger.log(record)
            asked = ranks.any(stop.asked)
            if save is not None and (due or (asked and saved != done)):
                save(done, time.perf_counter() - begun)
                saved = done
            if asked:
                raise Interrupted(done)
    return time.perf_counter() - begun


def _advance(
    state: ArmState, batch: Activations, rows: Batch, step: int, scale: float, config: TrainingConfig
) -> dict[str, Any] | None:
    """One step of one arm, timed; None where it had to stop."""
    begun = time.perf_counter()
    try:
        return train_step(state, rows, step, scale, config.dead_after_tokens)
    except NonFiniteError as error:
        documents = sorted({int(d) for d in batch.doc_N.tolist()})[:3]
        where = f"batch {step} of the stream, documents {documents}…"
        state.stopped = f"{error} ({where}); its weights are those before that step"
        return None
    finally:
        state.seconds += time.perf_counter() - begun


def _once(lists: Sequence[list[T]]) -> list[T]:
    """What the lists hold, in their order, each once: ranks of the same arms say the same."""
    found: list[T] = []
    for one in itertools.chain.from_iterable(lists):
        if one not in found:
            found.append(one)
    return found


def _events(
    state: ArmState, measured: dict[str, Any] | None, log: Callable[[str], None] | None
) -> list[dict[str, Any]]:
    """What there is to say of an arm's step: that it stopped, which is logged too, or what its monitor noticed."""
    if measured is not None:
        return state.monitor.look(measured)
    if log is not None:
        log(f"{state.arm.name} stopped: {state.stopped}")
    return [{"kind": "stopped", "text": f"stopped: {state.stopped}"}]


@torch.no_grad()
def _record(
    state: ArmState, measured: dict[str, Any], scale: float, step: int, config: TrainingConfig
) -> dict[str, Any]:
    """Plain numbers of one arm for the log. Reads, changes no training state."""
    numbers: dict[str, Any] = {key: float(value) for key, value in measured.items()}
    numbers |= {"lr": state.optimizer.lr * scale, "a": state.exponent, "a_quantiles": None}
    whole = state.peers.whole
    a = whole(state.sae.scale_a.detach().float()).flatten()
    if numbers["a"] is not None and a.numel() > 1:
        marks = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], device=a.device)
        numbers["a_quantiles"] = torch.quantile(a[:1_000_000], marks).tolist()
    if state.sae.value_exponent is not None:
        numbers["value_exponent"] = float(whole(state.sae.value_exponent.detach()).mean())
    numbers["b"] = float(whole(state.sae.scale_b.detach()).mean())
    if state.arm.k_start is not None:
        numbers["k"] = state.arm.k_at(step) or state.sae.k
    if state.sae.cfg.selector in ("jumprelu", "gated"):
        numbers["sparsity_weight"] = state.weight
    return numbers


def exponent_moving(path: Sequence[tuple[int, float]], config: TrainingConfig) -> float | None:
    """Change of the mean exponent over the last tenth of the steps at full learning rate; None where unknown.

    path: (step, mean a) as logged; unknown too where a line is missing. Beyond ±MOVING the run ended before a found its
    place: a value still moving is no finding, since Adam moves a scalar by at most about lr per step.
    """
    begin = config.parts[-1][0]
    end = begin + (config.steps - begin) * (1 - config.optimizer.decay_frac)
    first = begin + 0.9 * (end - begin)
    late = [(step, a) for step, a in path if first <= step <= end]
    marks = [first, *(step for step, _ in late), end]
    if len(late) < 2 or max(b - a for a, b in itertools.pairwise(marks)) > config.log_every:
        return None
    return late[-1][1] - late[0][1] if all(math.isfinite(a) for _, a in late) else None
