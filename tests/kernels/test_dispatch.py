"""Which path serves, and what happens where the compiled loops cannot."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from cosae.errors import CosaeError
from cosae.kernels import choose, describe, keep_memory, reference
from cosae.kernels.choose import CPU
from cosae.kernels.cpu import native
from cosae.kernels.select import search
from tests.support.score_worlds import make_terms


def test_names() -> None:
    assert choose("reference", "cpu") is reference
    assert choose("auto", "cpu") is CPU
    assert choose("cpu", "cpu") is CPU
    with pytest.raises(CosaeError, match=r"kernel .*auto, reference, cpu, triton"):
        choose("cuda", "cpu")


def test_record_says_which_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe("reference") == "reference: dense PyTorch"
    monkeypatch.setattr(native, "AVAILABLE", False)
    assert describe().endswith("plain PyTorch loops")


def test_a_numba_that_cannot_be_imported_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a clash of numba with numpy looks like: the modules of loops do not import."""
    monkeypatch.setitem(sys.modules, "cosae.kernels.cpu.loops.search", None)
    with caplog.at_level(logging.WARNING):
        assert native._import_loops.__wrapped__() is None
    assert "plain PyTorch serves" in caplog.text


def test_where_the_screen_cannot_serve_the_reason_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    search.log_once.cache_clear()
    terms = make_terms("cosine", dtype=torch.float64)
    with caplog.at_level(logging.INFO):
        CPU.select_batch_topk(terms, 20)
        CPU.select_batch_topk(terms, 20)
    assert caplog.text.count("float32") == 1


def test_keep_memory_is_only_for_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_memory() is False
