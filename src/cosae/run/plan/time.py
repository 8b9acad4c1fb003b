"""How long a run will take, from a short sample of it: a chunk of its data, and a few steps of each arm."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch

from cosae.activations.stream import SAMPLE_ROWS, ActivationStream, Source
from cosae.errors import CosaeError
from cosae.evaluate.context import TextProbes
from cosae.evaluate.encoded import encode_all
from cosae.evaluate.probing.encode_texts import draw_texts
from cosae.interop.read import read_sae
from cosae.io.progress import SILENT, Progress
from cosae.recipe import Recipe
from cosae.run.capture.request import Capture
from cosae.run.dataset.base import Dataset
from cosae.run.dataset.model import batch_size, open_model
from cosae.run.measure import evaluation_context, measure, text_probes
from cosae.sae.calibrate import FVE_TOKENS, calibrate, measure_fve
from cosae.sae.model import SAE
from cosae.train.side_by_side import SideBySide
from cosae.train.step import ArmState, Batch, train_step
from cosae.types import Activations

WARM_STEPS, TIMED_STEPS = 2, 3
READING = ("first window", "filling buffer", "reading the stream", "reading held-out activations")
"""Parts of a run that are over as fast as activations come."""
MEASURED_TOKENS = 4096
"""Tokens on which the sample calibrates and measures."""
TIMED_TEXTS = 8
"""Of each labelled set."""


@dataclass(frozen=True)
class TimePlan:
    """Seconds by part, for a whole run, and the tokens a second they come from."""

    parts: dict[str, float]
    tokens_per_second: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def from_store(self) -> TimePlan:
        """The same with activations that lie in a store, whose reading takes next to no time."""
        return TimePlan({part: 0.0 if part in READING else s for part, s in self.parts.items()}, self.tokens_per_second)


def train_time(recipe: Recipe, data: Dataset) -> TimePlan:
    """Time of a run's phases: loading, reading the stream, the steps of every arm, and measuring.

    The sample's first steps are warm-up: compiled loops compile. Nothing of the sample is kept; a run made afterwards
    is the same as without it.
    """
    clock, state = time.perf_counter, torch.get_rng_state()
    began = clock()
    source = data.source
    parts = {"loading model and text": clock() - began}
    recipe = recipe.resolved(data.d_in, data.d_out, data.site_widths)
    training = recipe.training
    made = _Timed(source)
    batch, window = training.batch_tokens, recipe.filter.window_tokens
    small = ActivationStream(
        cast(Any, made),
        batch_tokens=batch,
        buffer_tokens=2 * batch,
        seed=training.seed,
        filter=replace(recipe.filter, window_tokens=min(window, max(2 * batch, 1024))),
        perturbation=recipe.training_perturbation,
        device=recipe.device,
        store_dtype=getattr(torch, training.store_dtype),
        non_finite=recipe.data.non_finite,
        progress=data.progress,
    )
    with closing(small), data.progress.phase("timing steps and measurements"):
        batches = [small.next_batch() for _ in range(WARM_STEPS + TIMED_STEPS)]
        rate = made.rows / made.seconds
        parts["first window"] = window / rate
        starting = min(window, SAMPLE_ROWS) / len(small.sample_ND)  # an SAE is initialised on so many times more rows
        parts["initialising"] = 0.0
        # what the window read is not read again
        parts["filling buffer"] = max(training.buffer_tokens - window, 0) / rate
        parts["reading the stream"] = training.steps * batch / rate
        rates, states = {"stream": rate}, []
        for arm in recipe.arms:
            began = clock()
            sae = arm.build(
                data.d_in,
                small.sample_ND,
                recipe.device,
                data.d_out,
                small.target_sample_ND,
                data.site_widths,
                read=read_sae,
            )
            parts["initialising"] += starting * (clock() - began)
            variance = max(small.norm_summary.total_variance, 1e-12)
            states.append(ArmState.start(arm, sae, variance, training.optimizer))
        for name, seconds in _step_seconds(states, batches, training.dead_after_tokens).items():
            parts[f"steps of {name}"], rates[name] = training.steps * seconds, batch / seconds
        saes = {state.arm.name: state.sae for state in states}
        parts |= _after_training(recipe, data, saes, small, rate)
    torch.set_rng_state(state)
    return TimePlan(parts, rates)


class _Timed:
    """A source, and how many rows it made in how many seconds."""

    def __init__(self, source: Source) -> None:
        self._source, self.rows, self.seconds = source, 0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        chunks = self._source.chunks(start)
        while True:
            began = time.perf_counter()
            if (chunk := next(chunks, None)) is None:
                return
            self.seconds, self.rows = self.seconds + time.perf_counter() - began, self.rows + len(chunk)
            yield chunk


def _after_training(
    recipe: Recipe, data: Dataset, saes: dict[str, SAE], small: ActivationStream, rate: float
) -> dict[str, float]:
    """Time of what follows the last step, by what it takes for a few tokens."""
    evaluation, clock = recipe.evaluation, time.perf_counter
    measured = evaluation.held_out_tokens + evaluation.calibration_tokens
    parts = {"reading held-out activations": (measured + evaluation.probe_tokens * data.has_concepts) / rate}
    x_ND, targets = small.sample_ND[:MEASURED_TOKENS], small.target_sample_ND
    y_ND = None if targets is None else targets[:MEASURED_TOKENS]
    for part, tokens, work in (
        ("calibrating thresholds", evaluation.calibration_tokens, calibrate),
        ("measuring", min(evaluation.calibration_tokens, FVE_TOKENS), partial(measure_fve, y_ND=y_ND)),
    ):
        began = clock()
        for sae in saes.values():
            work(sae, x_ND)
        parts[part] = tokens / len(x_ND) * (clock() - began)
    sample = data.sample("train", min(MEASURED_TOKENS, evaluation.held_out_tokens))
    few = replace(evaluation, held_out_tokens=len(sample), probe_tokens=len(sample), calibration_tokens=len(x_ND))
    changed = replace(recipe, evaluation=few)
    context = evaluation_context(saes, changed, data, small.filter)
    context.put(sample)
    context.put(sample, "train")
    began = clock()
    with suppress(CosaeError):  # so few tokens may lack what a measurement needs: what comes before it counts
        measure(context, changed, small.filter)
    parts["measuring"] += evaluation.held_out_tokens / len(sample) * (clock() - began)
    if evaluation.texts:
        parts["encoding labelled texts"] = _text_seconds(text_probes(recipe, data), data, saes)
    return parts


def _text_seconds(texts: TextProbes, data: Dataset, saes: dict[str, SAE]) -> float:
    """Time to encode the texts of all questions, by a few of each set."""
    seconds = 0.0
    for one, drawn in zip(texts.sets, draw_texts(texts), strict=True):
        listed = [one.texts[row] for row in drawn.row_S[:: max(1, len(drawn.row_S) // TIMED_TEXTS)]]
        if not seconds:
            for _ in data.read_texts(listed[:1], texts.context):  # the model is loaded
                pass
        began = time.perf_counter()
        for _, activations in data.read_texts(listed, texts.context):
            for sae in saes.values():
                encode_all(sae, activations)
        seconds += len(drawn.row_S) / len(listed) * (time.perf_counter() - began)
    return seconds


def _step_seconds(
    states: Sequence[ArmState], batches: Sequence[Activations], dead_after_tokens: int
) -> dict[str, float]:
    """What a step of all arms takes, as the loop takes it, by arm: each its share."""
    rounds, own = [], {state.arm.name: 0.0 for state in states}

    def timed(state: ArmState, batch: Batch, step: int) -> None:
        began = time.perf_counter()
        train_step(state, batch, step, 1.0, dead_after_tokens)
        if batch.x_BD.is_cuda:
            torch.cuda.synchronize(batch.x_BD.device)
        own[state.arm.name] += time.perf_counter() - began

    with SideBySide(states) as side_by_side:
        for step, one in enumerate(batches):
            if step == WARM_STEPS:
                own = dict.fromkeys(own, 0.0)
            began = time.perf_counter()
            side_by_side.run(partial(timed, batch=Batch.of(one.x_ND, y_BD=one.y_ND), step=step), states)
            rounds.append(time.perf_counter() - began)
    taken = statistics.median(rounds[WARM_STEPS:])
    return {name: taken * seconds / sum(own.values()) for name, seconds in own.items()}


def capture_time(request: Capture, progress: Progress = SILENT) -> TimePlan:
    """Time of a capture: one chunk of sequences through the model, scaled to all tokens. Writes nothing."""
    from cosae.models.capture import capture
    from cosae.models.sites import resolve_site
    from cosae.run.capture.media import open_corpus

    with progress.phase("loading model"):
        opened = open_model(request.data, request.device)
    model = opened[0]
    sites = [resolve_site(model, name) for name in request.sites]
    text = open_corpus(request.data, opened, request.sites[0], request.seed, 0)
    with closing(text):
        part = next(text.parts("train", request.tokens))
        at_once = batch_size(request.data, model, sites, "float32")
        capture(model, part.sequences[:at_once], sites, at_once)
        with progress.phase("timing a chunk", part.n_rows):
            began = time.perf_counter()
            found = capture(model, part.sequences, sites, at_once, on_rows=progress.rows)
            rows = found[sites[0].name]
            part.labels(rows)
        rate = len(rows) / (time.perf_counter() - began)
    return TimePlan({"capturing": (request.tokens + request.n_held_out) / rate}, {"capture": rate})
