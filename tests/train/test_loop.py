"""The loop: identical batches for every arm, nothing but the step changes an SAE, stops and interruptions."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cosae.activations.digest import chain
from cosae.activations.stream import ActivationStream
from cosae.activations.synthetic import SyntheticSource, World
from cosae.errors import CosaeError
from cosae.train.arm import ARMS, Arm
from cosae.train.loop import Interrupted, TrainingConfig, exponent_moving, train
from cosae.train.step import ArmState, OptimizerConfig
from cosae.types import Activations

CONFIG = TrainingConfig(
    steps=12,
    batch_tokens=64,
    buffer_tokens=512,
    dead_after_tokens=300,
    log_every=5,
    checkpoint_every=0,
    optimizer=OptimizerConfig(lr=1e-2, warmup_steps=3),
)
WORLD = World(d_in=16, n_features=32, l0=3, norm="log_normal")


def opened() -> ActivationStream:
    return ActivationStream(SyntheticSource(WORLD, 256), batch_tokens=64, buffer_tokens=512, seed=0)


def started(stream: ActivationStream, arms: Sequence[Arm]) -> list[ArmState]:
    whole = [arm.with_defaults(d_sae=48, k=4, seed=0, lr=1e-2, kernel="auto") for arm in arms]
    return [ArmState.start(arm, arm.build(16, stream.sample_ND), 16.0, CONFIG.optimizer) for arm in whole]


def weights(state: ArmState) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.tensors().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value.nan_to_num(nan=1234.5), b[name].nan_to_num(nan=1234.5)), name


def trained(arms: Sequence[Arm], config: TrainingConfig = CONFIG, **options: Any) -> list[ArmState]:
    stream = opened()
    states = started(stream, arms)
    train(states, stream, config, **options)
    return states


SIX = [
    ARMS["standard"],
    ARMS["standard_layer_norm"],
    ARMS["cosine_base_delta"],
    Arm.of("jump", "cosine", selector="jumprelu", input_noise=2.0),
    Arm.of("gated", "inner", selector="gated", seed=3),
    Arm.of("signed", "cosine_per_feature", selector="abs_topk", k=6, d_sae=40),
]


def test_every_arm_saw_the_batches_the_stream_handed_out() -> None:
    stream = opened()
    states = started(stream, SIX)
    train(states, stream, CONFIG)
    assert {state.digest.hex() for state in states} == {stream.digest}
    assert stream.n_tokens == 12 * 64
    again, expected = opened(), bytes(32)
    for _ in range(12):
        expected = chain(expected, again.next_batch())
    assert states[0].digest == expected
    assert states[0].digest != bytes(32)


@pytest.mark.parametrize("arm", SIX, ids=lambda arm: arm.name)
def test_company_changes_nothing(arm: Arm) -> None:
    (alone,) = trained([arm])
    for company in (SIX, list(reversed(SIX))):
        beside = next(state for state in trained(company) if state.arm.name == arm.name)
        assert_same(weights(alone), weights(beside))
        assert {**alone.numbers(), "seconds": 0} == {**beside.numbers(), "seconds": 0}
        if arm.name != "standard":
            break  # both orders for one arm are enough


class Kept:
    """A logger that remembers."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def log(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def close(self) -> None: ...


def test_logging_leaves_weights_bit_identical() -> None:
    quiet = trained(SIX)
    kept = Kept()
    loud = trained(SIX, replace(CONFIG, log_every=1), loggers=[kept, kept], on_step=lambda: None, log=lambda _: None)
    assert len(kept.records) == 24
    for a, b in zip(quiet, loud, strict=True):
        assert_same(weights(a), weights(b))


def test_saving_leaves_weights_bit_identical_and_comes_when_due() -> None:
    plain = trained(SIX[:2])
    seen: list[int] = []
    saved = trained(SIX[:2], replace(CONFIG, checkpoint_every=4), save=lambda step, _: seen.append(step))
    assert seen == [4, 8]  # the last step's is the caller's, after the loop
    for a, b in zip(plain, saved, strict=True):
        assert_same(weights(a), weights(b))


def test_records_hold_what_is_documented() -> None:
    kept = Kept()
    trained(SIX, loggers=[kept])
    assert [record["step"] for record in kept.records] == [1, 5, 10, 12]
    assert [record["tokens"] for record in kept.records] == [64, 320, 640, 768]
    times = [record["seconds"] for record in kept.records]
    assert times == sorted(times)
    for record in kept.records:
        assert set(record) == {"step", "tokens", "seconds", "arms"}
        assert list(record["arms"]) == [arm.name for arm in SIX]
        for name, numbers in record["arms"].items():
            assert {
                "loss",
                "loss_reconstruction",
                "grad_norm",
                "l0",
                "dead_frac",
                "fve",
                "lr",
                "a",
                "a_quantiles",
                "b",
            } <= set(numbers)
            assert ("sparsity_weight" in numbers) == (name in ("jump", "gated"))
            assert (numbers["a"] is None) == (name in ("standard", "standard_layer_norm", "gated"))
            assert (numbers["a_quantiles"] is None) == (name not in ("cosine_base_delta", "signed"))
    first, last = (kept.records[i]["arms"]["cosine_base_delta"] for i in (0, -1))
    assert first["a"] != last["a"]  # it learns, and the log shows it
    assert last["a_quantiles"] == sorted(last["a_quantiles"])
    assert first["lr"] == pytest.approx(1e-2 / 3)
    assert [r["arms"]["standard"]["lr"] for r in kept.records][-1] == pytest.approx(1e-2 * 1 / 2.4)


def test_loss_falls_and_fve_rises() -> None:
    kept = Kept()
    trained(SIX, replace(CONFIG, steps=60, log_every=1), loggers=[kept])
    for name in (arm.name for arm in SIX):
        path = [record["arms"][name] for record in kept.records]
        assert sum(p["fve"] for p in path[-10:]) > sum(p["fve"] for p in path[:10]) + 0.5, name


def test_seeds() -> None:
    one, same, other = trained([Arm.of("a"), Arm.of("b"), Arm.of("c", seed=1)])
    assert_same(weights(one), weights(same))
    assert not torch.equal(one.sae.W_dec, other.sae.W_dec)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_reweighting_runs_and_matters(power: float) -> None:
    plain = Arm.of("plain")
    heavy, light = trained([plain, replace(plain, name="light", loss=replace(plain.loss, reweight=power))])
    assert light.stopped is None
    assert not torch.equal(heavy.sae.W_dec, light.sae.W_dec)


def test_input_noise_matters_and_is_only_in_training() -> None:
    clean, noisy = trained([Arm.of("clean"), Arm.of("noisy", input_noise=2.0)])
    assert not torch.equal(clean.sae.W_dec, noisy.sae.W_dec)
    assert clean.digest == noisy.digest  # what was handed over was the same


# --------------------------------------------------------------------------------- an arm that stops


class Spoiled:
    """The stream, with one row of batch `at` (0-based) beyond what fp32 can square."""

    def __init__(self, stream: ActivationStream, at: int) -> None:
        self.stream, self.at, self.count = stream, at, itertools.count()

    def next_batch(self) -> Activations:
        batch = self.stream.next_batch()
        if next(self.count) == self.at:
            batch.x_ND[5] *= 1e25
        return batch


WILD = Arm.of("wild", lr=1e25)


def test_a_wild_arm_stops_alone_with_its_last_good_weights() -> None:
    said: list[str] = []
    kept = Kept()
    stream = opened()
    states = started(stream, [ARMS["cosine"], WILD])
    train(states, stream, replace(CONFIG, log_every=1), loggers=[kept], log=said.append)
    good, wild = states
    assert good.stopped is None
    assert wild.stopped is not None
    step = len([r for r in kept.records if "wild" in r["arms"]])
    assert 0 < step < 12
    assert f"at step {step}" in wild.stopped
    assert f"batch {step} of the stream" in wild.stopped
    assert said == [f"wild stopped: {wild.stopped}"]
    assert [list(r["arms"]) for r in kept.records[step:]] == [["cosine"]] * (12 - step)
    # its weights are those after the steps before: as a run of as many steps of the same schedule leaves them
    stream = opened()
    (short,) = started(stream, [WILD])
    with pytest.raises(Interrupted):
        train([short], stream, CONFIG, on_step=_interrupt_after(step))
    assert_same(weights(wild), weights(short))
    assert all(bool(torch.isfinite(p).all()) for p in wild.sae.parameters())
    (alone,) = trained([ARMS["cosine"]])
    assert_same(weights(good), weights(alone))


def _interrupt_after(step: int) -> Any:
    count = itertools.count(1)

    def on_step() -> None:
        if next(count) == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


def test_when_every_arm_stopped_the_run_ends() -> None:
    stream = opened()
    states = started(stream, [ARMS["standard"], ARMS["cosine"]])
    with pytest.raises(CosaeError, match=r"every arm stopped.*standard.*cosine"):
        train(states, Spoiled(stream, 3), CONFIG)
    assert all("batch 3" in str(state.stopped) for state in states)


# --------------------------------------------------------------------------------- interruption and going on


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_goes_on_to_the_same_end(signum: int) -> None:
    whole = trained(SIX)
    stream = opened()
    states = started(stream, SIX)
    box: dict[str, Any] = {}

    def save(step: int, seconds: float) -> None:
        box.update(step=step, stream=stream.state(), arms=[(weights(s), s.numbers()) for s in states])

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    count = itertools.count(1)
    with pytest.raises(Interrupted, match="interrupted after step 7") as caught:
        train(
            states,
            stream,
            CONFIG,
            save=save,
            on_step=lambda: os.kill(os.getpid(), signum) if next(count) == 7 else None,
        )
    assert caught.value.step == box["step"] == 7
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers

    stream = opened()
    states = started(stream, SIX)
    stream.restore(box["stream"])
    for state, (tensors, numbers) in zip(states, box["arms"], strict=True):
        state.restore(tensors, numbers)
    kept = Kept()
    train(states, stream, CONFIG, start=7, loggers=[kept])
    assert [record["step"] for record in kept.records] == [10, 12]
    for a, b in zip(whole, states, strict=True):
        assert_same(weights(a), weights(b))
        assert a.digest == b.digest


def test_an_interruption_where_a_checkpoint_was_due_saves_once() -> None:
    seen: list[int] = []
    stream = opened()
    with pytest.raises(Interrupted):
        train(
            started(stream, SIX[:1]),
            stream,
            replace(CONFIG, checkpoint_every=4),
            save=lambda step, _: seen.append(step),
            on_step=_interrupt_after(4),
        )
    assert seen == [4]


def test_a_second_interrupt_is_at_once() -> None:
    stream = opened()

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        train(started(stream, SIX[:1]), stream, CONFIG, on_step=twice)
    assert not isinstance(caught.value, Interrupted)


def test_a_thread_trains_without_touching_signals() -> None:
    found: list[list[ArmState]] = []
    worker = threading.Thread(target=lambda: found.append(trained(SIX[:1])))
    worker.start()
    worker.join()
    assert_same(weights(found[0][0]), weights(trained(SIX[:1])[0]))


# --------------------------------------------------------------------------------- small pieces


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"dead_after_tokens": 0}, "dead_after_tokens must be at least 1"),
        ({"checkpoint_every": -1}, "checkpoint_every must be at least 0"),
        ({"store_dtype": "float16"}, "store_dtype must be one of float32, bfloat16"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 2**64}, "seed must be a whole number"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(CosaeError, match=says):
        TrainingConfig(**change)


def test_exponent_moving_over_the_last_tenth_at_full_rate() -> None:
    """100 steps, decay from step 80: steps 72 … 80 count."""
    config = replace(CONFIG, steps=100, optimizer=OptimizerConfig(decay_frac=0.2))
    path = [(step, step / 1000) for step in range(1, 101)]
    assert exponent_moving(path, config) == pytest.approx(0.008)
    still = [(step, min(step, 70) / 1000) for step in range(1, 101)]
    assert exponent_moving(still, config) == 0.0
    after = [(step, max(step, 80) / 1000) for step in range(1, 101)]  # what it does in the decay is no matter
    assert exponent_moving(after, config) == 0.0
    assert exponent_moving([(75, 0.1)], config) is None
    assert exponent_moving([], config) is None
    assert exponent_moving([(75, 0.1), (80, float("nan"))], config) is None
