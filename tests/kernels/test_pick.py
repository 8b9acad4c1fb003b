"""Which format the screen takes: the cheapest by the clock and by what passed; never a matter of results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosae.errors import CosaeError
from cosae.kernels import StepCache, describe
from cosae.kernels.cache import RETRY, Choices
from cosae.kernels.cpu import native
from cosae.kernels.select import pick, survivors
from cosae.kernels.select.clock import Clock
from cosae.sae.model import SAE
from cosae.train.arm import Arm
from cosae.train.step import ArmState, OptimizerConfig, train_step
from tests.support.score_worlds import make_terms

FORMATS = tuple(pick.FORMATS)


@pytest.fixture
def _seconds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock whose every contestant takes what the test says; asked at every shape."""
    hands = [0.0]

    def run(screen: object, terms: object, name: str) -> None:
        hands[0] += request.param[name]

    def dots(*_: object) -> torch.Tensor:
        hands[0] += request.param["dot"] * pick.DOTS
        return torch.zeros(0)

    monkeypatch.setattr(pick, "CLOCK", Clock(lambda: hands[0]))
    monkeypatch.setattr(pick, "SMALL", 0)
    monkeypatch.setattr(pick, "_run", run)
    monkeypatch.setattr(pick.sums, "entry_dots", dots)


def took(choices: Choices, n_wanted: int = 100) -> str:
    terms = make_terms("inner", 32, 16, 64)
    return pick.pick(terms, n_wanted, lambda terms, name: None, choices)


@pytest.mark.usefixtures("_seconds")
@pytest.mark.parametrize("_seconds", [{"fp32": 1.0, "bf16": 1.8, "int8": 3.0, "dot": 1e-9}], indirect=True)
def test_a_processor_that_announces_bf16_and_is_slow_at_it_takes_fp32() -> None:
    choices = Choices()
    assert took(choices) == "fp32"
    assert choices.seconds == pytest.approx({"fp32": 1.0, "bf16": 1.8, "int8": 3.0})
    choices.learn("fp32", 120)
    assert describe("auto", "cpu", choices).startswith("cpu: fp32 screen (by the clock, ms: fp32 1000.0, bf16 1800.0")


@pytest.mark.usefixtures("_seconds")
@pytest.mark.parametrize("_seconds", [{"fp32": 3.0, "bf16": 2.0, "int8": 1.0, "dot": 1e-3}], indirect=True)
def test_the_fastest_product_is_left_where_its_bound_lets_too_much_pass() -> None:
    """1.0 s + 2500 exact scores of 1 ms are more than 2.0 s + 100; after RETRY searches it gets another chance."""
    choices = Choices()
    assert took(choices) == "int8"
    choices.learn("int8", 900)
    assert took(choices) == "int8"
    choices.learn("int8", 2500)
    assert took(choices) == "bf16"
    for _ in range(RETRY):
        choices.learn("bf16", 110)
    assert took(choices) == "int8"


@pytest.mark.usefixtures("_seconds")
@pytest.mark.parametrize("_seconds", [{"fp32": 3.0, "bf16": 2.0, "int8": 1.0, "dot": 1e-9}], indirect=True)
def test_int8_that_is_missing_or_saturates_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors without VNNI add pairs of products in 16 bits."""
    pick.exact_int8.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.int() @ b.int()).clamp(-32768, 32767))
    assert took(Choices()) == "bf16"
    pick.exact_int8.cache_clear()
    monkeypatch.delattr(torch, "_int_mm")
    assert took(Choices()) == "bf16"
    monkeypatch.setenv("COSAE_SCREEN", "int8")
    assert took(Choices()) == "bf16"
    pick.exact_int8.cache_clear()


def test_small_products_need_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pick, "CLOCK", None)
    assert took(Choices()) == "fp32"


def test_the_variable_forces_a_format_and_refuses_other_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FORMATS:
        monkeypatch.setenv("COSAE_SCREEN", name)
        assert took(Choices()) == name
    monkeypatch.setenv("COSAE_SCREEN", "fp8")
    with pytest.raises(CosaeError, match="COSAE_SCREEN"):
        took(Choices())


def test_the_clock_times_the_screen_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real contestants, at a small shape: each runs the search's own screen and is remembered."""
    monkeypatch.setattr(pick, "CLOCK", Clock(file=tmp_path / "kernels.json"))
    monkeypatch.setattr(pick, "SMALL", 0)
    cache = StepCache()
    terms = replace(make_terms("cosine", 40, 16, 64), cache=cache)
    assert survivors.survivors(terms, torch.zeros(64), 5000) is not None
    assert set(cache.choices.seconds) == {name for name in FORMATS if name != "int8" or pick.exact_int8(16)}
    assert cache.choices.picked in cache.choices.seconds
    assert "64 x 16 x 64" in (tmp_path / "kernels.json").read_text(encoding="utf-8")


def start(score: str, selector: str) -> ArmState:
    draw = torch.Generator().manual_seed(5)
    sae = SAE.build(24, 96, score, selector, 4, 3, sample=torch.randn(400, 24, generator=draw))
    return ArmState.start(Arm.of("one", score, selector, k=4, seed=0), sae, 24.0, OptimizerConfig())


def advance(state: ArmState, first: int, last: int) -> None:
    for step in range(first, last):
        draw = torch.Generator().manual_seed(step)
        x_BD = torch.randn(128, 24, generator=draw) * torch.exp(0.7 * torch.randn(128, 1, generator=draw))
        train_step(state, x_BD, step, 1.0, 600)


def bits(state: ArmState) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in state.tensors().items()}


@pytest.mark.parametrize("loops", ["compiled", "plain"])
@pytest.mark.parametrize(
    ("score", "selector"),
    [("inner", "batch_topk"), ("cosine", "batch_topk"), ("cosine_per_feature", "topk"), ("cosine", "jumprelu"),
     ("inner", "abs_topk"), ("inner_unit", "gated")],
)  # fmt: skip
def test_steps_and_resumed_steps_have_the_same_bits_whatever_format_is_taken(
    score: str, selector: str, loops: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loops == "plain":
        monkeypatch.setattr(native, "AVAILABLE", False)
    elif not native.AVAILABLE:
        pytest.skip("numba is not installed")
    found = {}
    for name in FORMATS:
        monkeypatch.setenv("COSAE_SCREEN", name)
        state = start(score, selector)
        advance(state, 0, 5)
        assert state.cache.choices.picked == name
        monkeypatch.setenv("COSAE_SCREEN", FORMATS[FORMATS.index(name) - 1])
        resumed = start(score, selector)
        resumed.restore({k: v.clone() for k, v in state.tensors().items()}, state.numbers())
        advance(resumed, 5, 9)
        found[name] = bits(resumed)
        monkeypatch.setenv("COSAE_SCREEN", name)
        advance(state, 5, 9)
        assert bits(state) == found[name]
    assert found["fp32"] == found["bf16"] == found["int8"]
