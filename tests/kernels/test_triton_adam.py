"""The optimiser's Triton sweeps against the plain definition, for every precision of the moments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cosae.kernels import Kernel, StepCache
from cosae.train.optimizer import UnitRowAdam

SHAPES = {"encoder": (7, 300), "decoder": (7, 19), "bias": (7,), "a": ()}


def draw(seed: int, device: torch.device) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=source).to(device) for name, shape in SHAPES.items()}


def start(device: torch.device, kernel: str, state_dtype: str) -> tuple[dict[str, nn.Parameter], UnitRowAdam]:
    values = draw(0, device)
    values["decoder"] /= values["decoder"].norm(dim=-1, keepdim=True)
    parameters = {name: nn.Parameter(value) for name, value in values.items()}
    options = {"lr": 0.01, "kernel": kernel, "state_dtype": state_dtype, "screened": "encoder"}
    return parameters, UnitRowAdam(parameters, ("decoder",), **options)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_steps_stay_with_the_definition(state_dtype: str, device: torch.device, triton_path: Kernel) -> None:
    """Both draw the same: codes may differ only where two roundings of a value lie on both sides of a draw."""
    ours, fast = start(device, "triton", state_dtype)
    theirs, slow = start(device, "reference", state_dtype)
    for seed in range(1, 7 if state_dtype == "float32" else 4):
        gradients = draw(seed, device)
        gradients["encoder"][3] = 0.0
        if seed == 2:
            gradients["decoder"] *= 1e3
        for parameters in (ours, theirs):
            for name, value in gradients.items():
                parameters[name].grad = value.clone()
        assert fast.step() == pytest.approx(slow.step(), rel=1e-5)
    for name in SHAPES:
        close = (ours[name] - theirs[name]).abs() <= 1e-5 + 1e-4 * theirs[name].abs()
        assert float(close.float().mean()) > 0.995, name
    mine, wanted = fast.state_dict(), slow.state_dict()
    for key, value in mine.items():
        assert value.dtype == wanted[key].dtype
        same = torch.isclose(value.float(), wanted[key].float(), rtol=1e-4, atol=1e-7)
        assert float(same.float().mean()) > 0.995, key
    torch.testing.assert_close(ours["decoder"].norm(dim=-1), torch.ones(7, device=device))


def test_the_next_screen_finds_its_rows(device: torch.device, triton_path: Kernel) -> None:
    """Unit rows, norms and rounding errors that the sweep leaves are those a fresh preparation would make."""
    from cosae.kernels.triton import rows as triton_rows

    parameters, optimizer = start(device, "triton", "float32")
    cache = StepCache()
    for seed in (1, 2):
        for name, value in draw(seed, device).items():
            parameters[name].grad = value
        optimizer.step(cache=cache)
        left = triton_rows.prepared(cache, parameters["encoder"].detach(), torch.bfloat16)
        assert left is not None
        fresh = triton_rows.unit_rows(parameters["encoder"].detach(), 1e-12, torch.bfloat16)
        torch.testing.assert_close(left.unit_RD.float(), fresh.unit_RD.float(), rtol=2.0**-7, atol=0)
        torch.testing.assert_close(left.norm_R, fresh.norm_R)
        torch.testing.assert_close(left.error_R, fresh.error_R, rtol=1e-2, atol=1e-6)
    assert triton_rows.prepared(cache, parameters["decoder"].detach(), torch.bfloat16) is None


def test_a_non_finite_gradient_changes_nothing(device: torch.device, triton_path: Kernel) -> None:
    parameters, optimizer = start(device, "triton", "int8")
    before = {name: p.detach().clone() for name, p in parameters.items()} | optimizer.state_dict()
    for name, value in draw(1, device).items():
        parameters[name].grad = value
    parameters["encoder"].grad[2, 5] = float("nan")
    with pytest.raises(FloatingPointError, match="encoder"):
        optimizer.step()
    after = {name: p.detach() for name, p in parameters.items()} | optimizer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_step_is_seen_by_autograd(device: torch.device, triton_path: Kernel) -> None:
    parameters, optimizer = start(device, "triton", "float32")
    loss = parameters["encoder"].square().sum()
    parameters["encoder"].grad = torch.ones_like(parameters["encoder"])
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
