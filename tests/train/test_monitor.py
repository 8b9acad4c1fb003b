"""Events of an arm: spikes and jumps are told once, a steady loss never; generators come back as they were."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from cosae.io.generators import generator_state, restore_generators
from cosae.train.monitor import WARM, LossMonitor


def looked(losses: list[float], dead: list[float] | None = None) -> list[tuple[int, dict[str, Any]]]:
    monitor = LossMonitor()
    found = []
    for step, loss in enumerate(losses):
        if step == len(losses) // 2:  # through a checkpoint
            monitor = LossMonitor(**asdict(monitor))
        measured = {"loss_reconstruction": torch.tensor(loss), "dead_frac": dead[step] if dead else 0.0}
        found += [(step, event) for event in monitor.look(measured)]
    return found


def noisy(n: int, spread: float = 0.05) -> list[float]:
    return (0.3 * torch.exp(spread * torch.randn(n, generator=torch.Generator().manual_seed(0)))).tolist()


def test_a_spike_is_told_when_it_begins_with_its_numbers() -> None:
    losses = noisy(300)
    losses[200:205] = [1.2] * 5
    losses[250] = 0.9
    (first, event), (second, _) = looked(losses)
    assert (first, second) == (200, 250)
    assert event["kind"] == "loss_spike"
    assert event["loss"] == pytest.approx(1.2)
    assert event["usual"] == pytest.approx(0.3, rel=0.1)
    assert "loss spike: reconstruction loss 1.2, " in event["text"]


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.3])
def test_a_steady_or_falling_loss_is_silent(spread: float) -> None:
    losses = [loss * (1 + 20 * 0.98**i) for i, loss in enumerate(noisy(3000, spread))]
    assert looked(losses) == []
    assert looked([1.0] * (WARM - 1) + [5.0]) == []


def test_a_jump_of_the_dead_share_is_told_and_a_slow_rise_is_not() -> None:
    rising = [i / 3000 for i in range(600)]
    assert looked([0.3] * 600, rising) == []
    (only,) = looked([0.3] * 600, [0.1 if i < 300 else 0.3 for i in range(600)])
    assert only[0] == 300
    assert only[1]["text"] == "dead features jumped from 10.0 to 30.0 %"


def test_generators_come_back_as_they_were() -> None:
    random.gauss(0, 1)
    np.random.standard_normal()  # noqa: NPY002  half of a pair is left
    state = generator_state()

    def drawn() -> list[float]:
        numbers = [random.random(), random.gauss(0, 1), random.gauss(0, 1)]
        numbers += np.random.standard_normal(3).tolist()  # noqa: NPY002
        return numbers + torch.rand(3).tolist()

    first = drawn()
    assert drawn() != first
    restore_generators(state)
    assert drawn() == first
