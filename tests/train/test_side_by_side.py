"""Arms that step at the same time: the same arms to the bit, really at the same time, and none left running."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch

from cosae.kernels import Workspace
from cosae.train.arm import Arm
from cosae.train.loop import TrainingConfig
from cosae.train.side_by_side import SideBySide, n_at_once
from cosae.train.step import ArmState
from tests.support.threads import with_threads
from tests.train.test_loop import CONFIG, assert_same, opened, started, trained, weights

DEAD_SOON: TrainingConfig = replace(CONFIG, dead_after_tokens=1)  # the dead are reconstructed from, by dense products
THREE = [
    Arm.of("inner", "inner", k=2),
    Arm.of("gated", "cosine", k=4, selector="gated", frame="unit"),
    Arm.of("jumprelu", "cosine_per_feature", k=4, selector="jumprelu"),
]


@pytest.fixture
def five() -> list[ArmState]:
    return started(opened(), [replace(THREE[0], name=f"arm{i}") for i in range(5)])


def test_arms_are_the_same_to_the_bit_alone_in_turn_and_side_by_side() -> None:
    beside = with_threads(2, lambda: trained(THREE, DEAD_SOON))
    in_turn = with_threads(1, lambda: trained(THREE, DEAD_SOON))
    alone = [with_threads(2, lambda arm=arm: trained([arm], DEAD_SOON)[0]) for arm in THREE]  # type: ignore[misc]
    for one, other, single in zip(beside, in_turn, alone, strict=True):
        assert_same(weights(one), weights(other))
        assert_same(weights(one), weights(single))
        assert one.numbers() | {"seconds": 0} == other.numbers() | {"seconds": 0}


def test_two_step_at_once_on_their_share_of_the_threads_and_the_odd_one_on_all(five: list[ArmState]) -> None:
    both, threads, spaces = threading.Barrier(2, timeout=20), {}, {}

    def step(state: ArmState) -> str:
        name = state.arm.name
        threads[name], spaces[name] = torch.get_num_threads(), state.cache.workspace
        if name != "arm4":
            both.wait()  # nobody leaves before another has come
        return name

    def run() -> list[str]:
        with SideBySide(five) as side_by_side:
            assert side_by_side.n == 2
            return side_by_side.run(step, five)

    assert with_threads(4, run) == [f"arm{i}" for i in range(5)]
    assert [threads[f"arm{i}"] for i in range(5)] == [2, 2, 2, 2, 4]
    assert len({id(space) for space in spaces.values()}) == 2
    assert all(isinstance(space, Workspace) for space in spaces.values())


def test_a_fault_is_raised_when_no_step_runs_any_more(five: list[ArmState]) -> None:
    ended: list[str] = []

    def step(state: ArmState) -> None:
        if state.arm.name == "arm0":
            raise ZeroDivisionError
        time.sleep(0.02)
        ended.append(state.arm.name)

    def run() -> None:
        with SideBySide(five) as side_by_side, pytest.raises(ZeroDivisionError):
            side_by_side.run(step, five)
        assert sorted(ended) == ["arm1", "arm2", "arm3"]  # arm4, which was left over, was not begun

    before = threading.active_count()
    with_threads(2, run)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("n_arms", "device", "kernels", "threads", "wanted"),
    [
        (3, "cpu", ["auto"], 2, 2),
        (1, "cpu", ["auto"], 2, 1),
        (3, "cpu", ["auto"], 1, 1),
        (0, "cpu", [], 2, 1),
        (3, "cuda", ["auto"], 2, 1),
        (3, "cpu", ["auto", "reference"], 2, 1),
    ],
)
def test_how_many(n_arms: int, device: str, kernels: list[str], threads: int, wanted: int) -> None:
    assert with_threads(threads, lambda: n_at_once(n_arms, device, kernels)) == wanted
