"""Where Triton's kernels run: in its interpreter on the CPU, or compiled where `-m gpu` asks for a CUDA device."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from cosae.kernels import Kernel, choose


def pytest_configure(config: pytest.Config) -> None:
    # Triton reads this when it is imported: one process either interprets or compiles
    if not config.getoption("markexpr").startswith("gpu"):
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU with Triton's interpreter, or a real CUDA device."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if request.param == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton is in its interpreter: ask for -m gpu alone")
    return torch.device(request.param)


@pytest.fixture
def triton_path(device: torch.device) -> Kernel:
    """The Triton path where `device` is."""
    return choose("triton", device)
