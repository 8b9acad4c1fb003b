"""Compressed moments: what comes back, how it is rounded, and that rounding carries no state."""

from __future__ import annotations

import pytest
import torch

from cosae.kernels.moments import BLOCK, Moment, draws, key_of


def kept(dtype: str, value: torch.Tensor, key: int = 1, signed: bool = True) -> torch.Tensor:
    moment = Moment.zero(value, dtype, signed)
    moment.write(slice(0, len(value)), value, key)
    return moment.read(slice(0, len(value)))


def values(*shape: int, orders: float = 2.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=draw) * torch.exp(orders * torch.randn(*shape, generator=draw))


@pytest.mark.parametrize("width", [1, 19, BLOCK, BLOCK + 1, 600])
def test_rounding_goes_to_a_neighbour(width: int) -> None:
    """bf16: within one unit of it. int8: within one step of the code's curve, zeros and each block's largest exact."""
    value = values(7, width)
    value[2] = 0.0
    bf16 = kept("bfloat16", value)
    assert bool(((bf16 - value).abs() <= 2.0**-7 * value.abs()).all())
    for signed, levels, power in ((True, 127, 3), (False, 255, 6)):
        x = value if signed else value.square()
        int8 = kept("int8", x, signed=signed)
        for first in range(0, width, BLOCK):
            part, wanted = int8[:, first : first + BLOCK], x[:, first : first + BLOCK]
            scale = wanted.abs().amax(1, keepdim=True).clamp_min(1e-30)
            steps = levels * ((part.abs() / scale) ** (1 / power) - (wanted.abs() / scale) ** (1 / power))
            assert float(steps.abs().max()) < 1.0 + 1e-2
            torch.testing.assert_close(part.abs().amax(1), wanted.abs().amax(1), rtol=1e-6, atol=0)
        assert bool((int8[2] == 0).all())
        if signed:
            assert bool((int8 * value >= 0).all())
        else:
            assert bool((int8[x > 0] > 0).all())


@pytest.mark.parametrize(("dtype", "signed"), [("bfloat16", True), ("int8", True), ("int8", False)])
def test_rounding_is_unbiased(dtype: str, signed: bool) -> None:
    """The mean over 4000 draws is the value, to four standard errors."""
    value = values(1, 40, orders=0.7).abs().clamp_min(0.05)
    rounded = kept(dtype, value.expand(4000, -1).contiguous(), key_of(0, "x", 1), signed)
    error = (rounded.mean(0) - value[0]).abs()
    assert bool((error <= 4 * rounded.std(0) / 4000**0.5 + 1e-5 * value[0]).all())
    assert float(rounded.std(0).max()) > 0


def test_draws_are_uniform_and_known_by_their_place() -> None:
    whole = draws(5, 0, 60, 41, torch.device("cpu"))
    assert torch.equal(whole[7:19], draws(5, 7, 12, 41, torch.device("cpu")))
    share = whole.double() / 2**32
    assert abs(float(share.mean()) - 0.5) < 0.02
    counts = torch.histc(share, 16, 0, 1)
    assert float(((counts - 60 * 41 / 16) ** 2 / (60 * 41 / 16)).sum()) < 45
    assert not torch.equal(whole, draws(6, 0, 60, 41, torch.device("cpu")))


def test_vectors_and_doubles_are_never_compressed() -> None:
    for like in (torch.zeros(5), torch.zeros(()), torch.zeros(3, 4, dtype=torch.float64)):
        moment = Moment.zero(like, "int8", True)
        assert moment.uncompressed
        assert moment.data.dtype == like.dtype


def test_bytes_a_number() -> None:
    like = torch.zeros(10, 1024)
    sizes = {}
    for dtype in ("float32", "bfloat16", "int8"):
        moments = (Moment.zero(like, dtype, signed) for signed in (True, False))
        tensors = [t for moment in moments for t in moment.tensors().values()]
        sizes[dtype] = sum(t.numel() * t.element_size() for t in tensors) / like.numel()
    assert sizes == {"float32": 8.0, "bfloat16": 4.0, "int8": 2.0 + 8 / BLOCK}
