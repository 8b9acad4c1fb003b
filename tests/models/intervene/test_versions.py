"""The tests of this folder with the oldest transformers that pyproject allows, the pinned one and the newest there is.

Each gets an environment of its own: tests/interop/peers/environments.py.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.interop.peers.environments import ROOT, SOURCE, build

TORCH_SAYS = "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
"""A new torch to an old transformers, which compiles parts of `generate`."""


@pytest.mark.slow
@pytest.mark.parametrize("which", ["oldest", "pinned", "newest"])
def test_interventions_with_each_version(which: str) -> None:
    python = build(f"transformers_{which}")
    if which == "newest":  # an environment of an earlier day is not
        pip = [str(python), "-m", "pip", "install", "-q", "--upgrade", "transformers", "torch==2.13.0"]
        subprocess.run(pip, check=True)
    folder = Path(__file__).parent.relative_to(ROOT)
    environment = {**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    # what drives the tests from outside is not in that environment
    command = [str(python), "-m", "pytest", "-q", "-W", TORCH_SAYS, str(folder), "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
