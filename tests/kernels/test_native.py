"""How compiled loops are run and kept."""

from __future__ import annotations

import threading

import pytest
import torch

from cosae.kernels.cpu import native


@pytest.mark.skipif(not native.AVAILABLE, reason="numba is not installed")
def test_no_loop_is_a_closure() -> None:
    """numba keeps a closure's machine code under a key that no other process finds: it would be compiled every time."""
    compiled = [
        value
        for name in ("search", "sums", "adam")
        for value in vars(native.loops(name)).values()
        if hasattr(value, "py_func")
    ]
    assert len(compiled) > 15
    assert all(loop.py_func.__closure__ is None for loop in compiled)


def test_parts_are_taken_one_after_the_other_and_answered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert native.parts_for(native.SMALL_WORK - 1, 3) == 1
    assert native.parts_for(native.SMALL_WORK, 3) == 6
    both = threading.Barrier(2, timeout=20)

    def loop(part: int, n_parts: int, base: int) -> int:
        if part < 2:
            both.wait()  # two threads are at work
        return base + 10 * part + n_parts

    assert native.run_parts(loop, 6, 1000) == [1006 + 10 * part for part in range(6)]


def test_a_part_that_fails_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def loop(part: int, n_parts: int) -> int:
        return 1 // part

    with pytest.raises(ZeroDivisionError):
        native.run_parts(loop, 4)
