"""Adam with unit rows: against torch's Adam and a step written out by hand, by both paths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cosae.errors import CosaeError
from cosae.kernels import StepCache
from cosae.kernels.cpu import native
from cosae.kernels.select import screen
from cosae.sae.model import SAE
from cosae.train import adam
from cosae.train.optimizer import UnitRowAdam

SHAPES = {"W_enc": (30, 17), "W_dec": (30, 17), "b_enc": (30,), "scale_a": ()}


@pytest.fixture(params=["compiled", "plain"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(native, "AVAILABLE", False)
    elif not native.AVAILABLE:
        pytest.skip("numba is not installed")


def draw(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=source, dtype=dtype) for name, shape in SHAPES.items()}


def make_parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    values = draw(0, dtype)
    values["W_dec"] /= values["W_dec"].norm(dim=-1, keepdim=True)
    return {name: nn.Parameter(value) for name, value in values.items()}


def set_gradients(parameters: dict[str, nn.Parameter], seed: int, scale: float = 1.0) -> None:
    for name, value in draw(seed, parameters["W_enc"].dtype).items():
        parameters[name].grad = scale * value


def step_by_hand(optimizer: torch.optim.Adam, parameters: dict[str, nn.Parameter], clip: float) -> float:
    """The paper's order with torch's own pieces."""
    decoder = parameters["W_dec"]
    with torch.no_grad():
        unit = decoder / decoder.norm(dim=-1, keepdim=True)
        decoder.grad -= (decoder.grad * unit).sum(-1, keepdim=True) * unit
    norm = nn.utils.clip_grad_norm_(list(parameters.values()), clip)
    optimizer.step()
    with torch.no_grad():
        decoder /= decoder.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    return float(norm)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_twenty_steps_equal_torch_adam(dtype: torch.dtype, scale: float) -> None:
    ours, theirs = make_parameters(dtype), make_parameters(dtype)
    fast = UnitRowAdam(ours, ("W_dec",), lr=0.01, lr_multipliers={"scale_a": 3.0}, clip=1.0)
    groups = [{"params": [p], "lr": 0.03 if name == "scale_a" else 0.01} for name, p in theirs.items()]
    slow = torch.optim.Adam(groups)
    for seed in range(1, 21):
        set_gradients(ours, seed, scale)
        set_gradients(theirs, seed, scale)
        assert fast.step() == pytest.approx(step_by_hand(slow, theirs, 1.0), rel=1e-5)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-4, atol=1e-5)
    assert torch.allclose(ours["W_dec"].norm(dim=-1), torch.ones(30, dtype=dtype), atol=1e-6)


@pytest.mark.usefixtures("_path")
def test_lr_scale_and_no_clip() -> None:
    """The first Adam step moves every coordinate by lr · scale in the gradient's sign, whatever the gradient's size."""
    parameters = make_parameters()
    before = parameters["W_enc"].detach().clone()
    set_gradients(parameters, 1, 100.0)
    norm = UnitRowAdam(parameters, lr=0.01, clip=None, eps=0.0).step(lr_scale=0.5)
    assert norm == pytest.approx(100 * float(torch.cat([g.reshape(-1) for g in draw(1).values()]).norm()), rel=1e-5)
    moved = parameters["W_enc"].detach() - before
    torch.testing.assert_close(moved, -0.005 * draw(1)["W_enc"].sign(), rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("_path")
def test_radial_gradient_moves_nothing() -> None:
    parameters = make_parameters()
    before = parameters["W_dec"].detach().clone()
    parameters["W_dec"].grad = 5.0 * before
    optimizer = UnitRowAdam({"W_dec": parameters["W_dec"]}, ("W_dec",), lr=0.01, eps=1e-3)
    assert optimizer.step() < 1e-5
    torch.testing.assert_close(parameters["W_dec"].detach(), before, rtol=0, atol=2e-5)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("bad", ["W_enc", "W_dec", "scale_a"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradient_changes_nothing(bad: str, value: float) -> None:
    parameters = make_parameters()
    optimizer = UnitRowAdam(parameters, ("W_dec",), lr=0.01)
    set_gradients(parameters, 1)
    optimizer.step()
    before = {name: p.detach().clone() for name, p in parameters.items()} | optimizer.state_dict()
    set_gradients(parameters, 2)
    parameters[bad].grad.view(-1)[-1] = value
    with pytest.raises(FloatingPointError, match=bad):
        optimizer.step()
    after = {name: p.detach() for name, p in parameters.items()} | optimizer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.usefixtures("_path")
def test_resume_is_exact_and_missing_gradients_are_left_alone() -> None:
    straight, broken = make_parameters(), make_parameters()
    first, second = UnitRowAdam(straight, ("W_dec",)), UnitRowAdam(broken, ("W_dec",))
    for seed in range(1, 7):
        if seed == 4:
            state = second.state_dict()
            broken = {name: nn.Parameter(p.detach().clone()) for name, p in broken.items()}
            second = UnitRowAdam(broken, ("W_dec",))
            second.load_state_dict(state)
        for parameters, optimizer in ((straight, first), (broken, second)):
            optimizer.zero_grad()
            set_gradients(parameters, seed)
            if seed % 2:
                parameters["b_enc"].grad = None
            optimizer.step()
    assert all(torch.equal(straight[name], broken[name]) for name in SHAPES)
    assert int(first.state_dict()["count.b_enc"]) == 3
    assert int(first.state_dict()["count.W_dec"]) == 6


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.AVAILABLE:
        pytest.skip("numba is not installed")
    answers = []
    for n_parts in (1, 2, 5):
        monkeypatch.setattr(native, "parts_for", lambda work, n=n_parts: n)
        parameters = make_parameters()
        optimizer = UnitRowAdam(parameters, ("W_dec",))
        for seed in range(1, 4):
            set_gradients(parameters, seed)
            optimizer.step()
        answers.append(parameters)
    for other in answers[1:]:
        assert all(torch.equal(other[name], answers[0][name]) for name in SHAPES)


@pytest.mark.usefixtures("_path")
def test_a_step_is_seen_by_autograd() -> None:
    """A graph made before a step must refuse to run after it: its saved weights are gone."""
    parameters = make_parameters()
    loss = parameters["W_enc"].square().sum()
    set_gradients(parameters, 1)
    UnitRowAdam(parameters).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unit_rows": ("decoder",)}, "'decoder'"),
        ({"unit_rows": ("b_enc",)}, "matrices"),
        ({"lr_multipliers": {"a": 2.0}}, "'a'"),
        ({"lr": -1.0}, "lr must be"),
        ({"lr": float("nan")}, "lr must be"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"clip": 0.0}, "clip"),
        ({"state_dtype": "int4"}, "state_dtype .*bfloat16, int8"),
    ],
)
def test_mistakes_get_one_sentence(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(CosaeError, match=message):
        UnitRowAdam(make_parameters(), **arguments)


def test_foreign_state_is_refused() -> None:
    optimizer = UnitRowAdam(make_parameters())
    state = optimizer.state_dict()
    with pytest.raises(CosaeError, match="shape"):
        optimizer.load_state_dict({**state, "mean.W_enc": torch.zeros(2, 2)})
    del state["mean.W_enc"]
    with pytest.raises(CosaeError, match=r"mean\.W_enc"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_compressed_moments_follow_adam(state_dtype: str) -> None:
    """Fifty steps towards a target end where float32 moments end, within a few percent of the way."""
    ends = {}
    for kind in ("float32", state_dtype):
        parameters = make_parameters()
        optimizer = UnitRowAdam(parameters, ("W_dec",), lr=0.02, state_dtype=kind)
        target = draw(9)["W_enc"]
        for _ in range(50):
            parameters["W_enc"].grad = (parameters["W_enc"].detach() - target) * torch.linspace(0.01, 1.0, 17)
            parameters["W_dec"].grad = draw(5)["W_dec"]
            optimizer.step()
        ends[kind] = {name: p.detach() for name, p in parameters.items()}
    for name in ("W_enc", "W_dec"):
        way = (ends["float32"][name] - make_parameters()[name].detach()).norm()
        assert float((ends[state_dtype][name] - ends["float32"][name]).norm()) < 0.05 * float(way)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_compressed_moments_resume_exactly(state_dtype: str) -> None:
    """Draws depend on seed, parameter and step alone; another seed rounds otherwise; fp32 states are refused."""
    runs: dict[str, dict[str, nn.Parameter]] = {}
    for run in ("straight", "broken", "other seed"):
        parameters = make_parameters()
        options = {"state_dtype": state_dtype, "seed": int(run == "other seed")}
        optimizer = UnitRowAdam(parameters, ("W_dec",), **options)
        for seed in range(1, 7):
            if run == "broken" and seed == 4:
                state = optimizer.state_dict()
                optimizer = UnitRowAdam(parameters, ("W_dec",), **options)
                optimizer.load_state_dict(state)
            set_gradients(parameters, seed)
            optimizer.step()
        runs[run] = parameters
    assert all(torch.equal(runs["straight"][name], runs["broken"][name]) for name in SHAPES)
    assert not torch.equal(runs["straight"]["W_enc"], runs["other seed"]["W_enc"])
    with pytest.raises(CosaeError, match=f"as state_dtype {state_dtype} asks" if state_dtype == "bfloat16" else "only"):
        optimizer.load_state_dict(UnitRowAdam(make_parameters(), ("W_dec",)).state_dict())


def test_stretches_of_rows_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for chunk in (1 << 20, 17 * 4):
        monkeypatch.setattr(adam, "CHUNK", chunk)
        parameters = make_parameters()
        optimizer = UnitRowAdam(parameters, ("W_dec",), state_dtype="int8")
        for seed in range(1, 4):
            set_gradients(parameters, seed)
            optimizer.step()
        answers.append(optimizer.state_dict())
    assert all(torch.equal(answers[0][key], answers[1][key]) for key in answers[0])


@pytest.mark.parametrize("width", [1, 7, 16, 33, 192, 513])
@pytest.mark.parametrize("unit", [False, True])
def test_norms_left_for_the_screen_are_those_it_would_find(width: int, unit: bool) -> None:
    """To the bit: a run that is resumed finds them anew, and must go on as if it had not stopped."""
    draw = torch.Generator().manual_seed(width)
    rows = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(53, width, generator=draw), dim=-1))
    optimizer = UnitRowAdam({"rows": rows}, unit_rows=("rows",) if unit else (), lr=0.1, screened="rows")
    cache = StepCache()
    for _ in range(3):
        rows.grad = torch.randn(53, width, generator=draw)
        optimizer.step(cache=cache)
        assert (cache.rows(rows) is not None) == native.serves()
        found = screen.row_norms(rows.detach(), cache)
        again = screen.row_norms(rows.detach().clone())
        assert torch.equal(found, again)
        torch.testing.assert_close(again, rows.detach().norm(dim=-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("touched", [False, True])
def test_what_the_gradients_loop_measured_is_what_a_sweep_measures(touched: bool) -> None:
    """The step is the same with and without what the loop saw; a gradient written to afterwards is measured anew."""
    if not native.serves():
        pytest.skip("numba is not installed")

    def step(passed: bool) -> tuple[float, dict[str, torch.Tensor], int]:
        sae = SAE.build(d_in=24, d_sae=96, score="cosine", k=4, seed=0)
        x_BD = torch.randn(64, 24, generator=torch.Generator().manual_seed(1))
        parameters = dict(sae.named_parameters())
        optimizer = UnitRowAdam(parameters, unit_rows=("decoder.rows_FD",), lr=1e-2)
        cache = StepCache()
        sae.train_forward(x_BD, cache=cache).error[0].sum().backward()
        if touched:
            parameters["decoder.rows_FD"].grad.mul_(0.5)
        names = ("score.rows_FD", "decoder.rows_FD")
        known = [cache.measured_of(parameters[n].grad, parameters[n].detach(), n != names[0]) for n in names]
        norm = optimizer.step(cache=cache if passed else None)
        return norm, {name: p.detach().clone() for name, p in parameters.items()}, 2 - known.count(None)

    norm, after, known = step(passed=True)
    assert known == (1 if touched else 2)
    wanted_norm, wanted, _ = step(passed=False)
    assert norm == wanted_norm
    for name, value in after.items():
        assert torch.equal(value, wanted[name]), name
