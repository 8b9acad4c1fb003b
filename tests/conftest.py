"""What holds for every test: hypothesis draws the same examples on every run, and processes leave each other the cores.

Beside other workers of pytest-xdist torch and BLAS run one thread each, in the processes that tests start too; waiting
OpenMP threads do not spin. The variables are read once, when the libraries load.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("cosae", derandomize=True, deadline=None)
settings.load_profile("cosae")

LONGEST = (
    *("cli/test_every_field.py", "test_examples.py", "run/test_store_run.py", "cli/test_every_option.py"),
    *("run/test_resume.py", "run/test_phases.py", "kernels/test_kernel_selection.py", "contract/test_contract.py"),
    *("train/test_loop.py", "sae/test_file.py", "kernels/test_triton.py", "evaluate/test_measurements.py"),
)
"""Files that take longest. They come first: a worker takes a whole file, and none should begin a long one last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, all else as it was."""
    place = {Path(__file__).parent / name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


@pytest.fixture(autouse=True)
def own_threads() -> None:
    """Each test begins with the number of torch's threads that its worker began with, whatever ran before it left."""
    import torch

    OWN_THREADS.setdefault("n", torch.get_num_threads())
    if torch.get_num_threads() != OWN_THREADS["n"]:
        torch.set_num_threads(OWN_THREADS["n"])


OWN_THREADS: dict[str, int] = {}
