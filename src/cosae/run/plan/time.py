"""How long a run will take, from a short sample of it: a chunk of its data, and a few steps of each arm."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from cosae.activations.stream import ActivationStream
from cosae.recipe import Recipe
from cosae.run.capture.request import Capture
from cosae.run.dataset.base import Dataset
from cosae.run.dataset.model import batch_size, open_model
from cosae.train.step import ArmState, train_step

WARM_STEPS, TIMED_STEPS = 2, 3


@dataclass(frozen=True)
class TimePlan:
    """Seconds by part, for a whole run, and the tokens a second they come from."""

    parts: dict[str, float]
    tokens_per_second: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def train_time(recipe: Recipe, data: Dataset) -> TimePlan:
    """Time of training: reading the stream's tokens, and the steps of every arm. recipe: resolved.

    Measuring after training is counted by the tokens it reads only. The sample's first steps are warm-up: compiled
    loops compile. Nothing of the sample is kept; a run made afterwards is the same as without it.
    """
    training, evaluation = recipe.training, recipe.evaluation
    state = torch.get_rng_state()
    began = time.perf_counter()
    rows = len(next(data.source.chunks(0)))
    rate = rows / (time.perf_counter() - began)
    batch = training.batch_tokens
    small = ActivationStream(
        data.source,
        batch_tokens=batch,
        buffer_tokens=2 * batch,
        seed=training.seed,
        filter=replace(recipe.filter, window_tokens=min(recipe.filter.window_tokens, max(2 * batch, 1024))),
        perturbation=recipe.training_perturbation,
        device=recipe.device,
    )
    batches = [small.next_batch().x_ND for _ in range(WARM_STEPS + TIMED_STEPS)]
    read = training.steps * batch + recipe.filter.window_tokens + training.buffer_tokens
    parts, rates = {"reading the stream": read / rate}, {"stream": rate}
    for arm in recipe.arms:
        sae = arm.build(data.d_in, small.sample_ND, recipe.device)
        one = ArmState.start(arm, sae, max(small.norm_summary.total_variance, 1e-12), training.optimizer)
        taken = [_timed(one, x_BD, i, training.dead_after_tokens) for i, x_BD in enumerate(batches)][WARM_STEPS:]
        seconds = sorted(taken)[len(taken) // 2]
        parts[f"steps of {arm.name}"], rates[arm.name] = training.steps * seconds, batch / seconds
    measured = evaluation.held_out_tokens + evaluation.calibration_tokens
    parts["reading what is measured on"] = (measured + evaluation.probe_tokens * data.has_concepts) / rate
    torch.set_rng_state(state)
    return TimePlan(parts, rates)


def _timed(state: ArmState, x_BD: torch.Tensor, step: int, dead_after_tokens: int) -> float:
    if x_BD.is_cuda:
        torch.cuda.synchronize(x_BD.device)
    began = time.perf_counter()
    train_step(state, x_BD, step, 1.0, dead_after_tokens)
    if x_BD.is_cuda:
        torch.cuda.synchronize(x_BD.device)
    return time.perf_counter() - began


def capture_time(request: Capture, log: Callable[[str], None] = lambda _: None) -> TimePlan:
    """Time of a capture: one chunk of sequences through the model, scaled to all tokens. Writes nothing."""
    from cosae.models.capture import capture
    from cosae.models.sites import resolve_site
    from cosae.run.capture.text import CaptureText

    log("loading the model for a short sample")
    model, tokenizer = open_model(request.data, request.device)
    sites = [resolve_site(model, name) for name in request.sites]
    text = CaptureText(request.data, tokenizer, request.seed, 0)
    part = next(text.parts("train", request.tokens))
    at_once = batch_size(request.data, model, sites, "float32")
    capture(model, part.sequences[:at_once], sites, at_once)
    began = time.perf_counter()
    found = capture(model, part.sequences, sites, at_once)
    rows = found[sites[0].name]
    part.labels(rows)
    rate = len(rows) / (time.perf_counter() - began)
    text.corpus.close()
    return TimePlan({"capturing": (request.tokens + request.n_held_out) / rate}, {"capture": rate})
