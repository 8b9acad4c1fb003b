"""What counts as a row of padding, and how the centre learns."""

from __future__ import annotations

import pytest
import torch

from cosae.sae import frame


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_only_rows_of_zeros_are_masked(dtype: torch.dtype) -> None:
    """A row whose squares vanish in its precision is alive; NaN and infinity are not zeros."""
    x_BD = torch.zeros(6, 3, dtype=dtype)
    x_BD[1, 2] = torch.finfo(dtype).tiny
    x_BD[2, 0] = -torch.finfo(dtype).max
    x_BD[3, 1] = torch.nan
    x_BD[4, 1] = torch.inf
    assert frame.live_rows(x_BD).tolist() == [False, True, True, True, True, False]
    assert frame.live_rows(x_BD.reshape(2, 3, 3)).tolist() == [[False, True, True], [True, True, False]]
    assert frame.live_rows(x_BD[:0]).tolist() == []


def test_the_centre_gets_minus_the_sum() -> None:
    x_BD, grad_BD = torch.randn(5, 3), torch.randn(5, 3)
    centre_D = torch.randn(3, requires_grad=True)
    z_BD = frame.less_centre(x_BD, centre_D)
    z_BD.backward(grad_BD)
    assert torch.equal(z_BD.detach(), x_BD - centre_D.detach())
    torch.testing.assert_close(centre_D.grad, -grad_BD.sum(0))
    x_BD.requires_grad_()
    frame.less_centre(x_BD, centre_D).backward(grad_BD)
    assert torch.equal(x_BD.grad, grad_BD)
