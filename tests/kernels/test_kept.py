"""Notes about tensors hold exactly as long as their numbers do."""

from __future__ import annotations

import torch

from cosae.kernels import kept


def test_a_note_is_found_until_the_tensor_is_written_to() -> None:
    x = torch.nn.Parameter(torch.randn(4, 3))
    assert kept.found(x) is None
    kept.leave(x, "facts")
    assert kept.found(x) == "facts"
    assert kept.found(x.detach()) == "facts"
    assert kept.found(x.detach()[:2]) is None
    assert kept.found(x.detach().T) is None
    assert kept.found(x.detach().clone()) is None
    with torch.no_grad():
        x.add_(1.0)
    assert kept.found(x) is None
    assert kept.before(x) == "facts"
    kept.leave(x, "new facts")
    assert kept.found(x) == "new facts"


def test_freed_memory_tells_nothing() -> None:
    """A tensor that comes to lie where another one was is not taken for it."""
    for _ in range(200):
        x = torch.empty(64, 64)
        assert kept.before(x) is None
        kept.leave(x, "of a tensor that is gone")
        del x
    assert len(kept._notes) <= kept.MANY + 1


def test_inference_tensors_leave_nothing() -> None:
    with torch.inference_mode():
        x = torch.ones(3, 2)
        kept.leave(x, "facts")
        assert kept.found(x) is None
