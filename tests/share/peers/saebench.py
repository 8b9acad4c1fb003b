"""Build an environment with SAEBench 0.6.0 and sae-probes 0.4.2, for the slow tests and for `python=` of run_evals.

python tests/share/peers/saebench.py [FOLDER]     default: $COSAE_PEERS/saebench

Everything SAEBench asks for is resolved by pip and installed, but for NVIDIA's libraries (xgboost lists one; none is
needed on a CPU) and torchvision (nothing here imports it, and a build for another torch breaks transformers).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

WANTED = ("torch==2.13.0", "sae-bench==0.6.0", "sae-probes==0.4.2")
LEFT_OUT = ("nvidia", "torchvision", "triton")


def default_folder() -> Path:
    """$COSAE_PEERS/saebench, or a folder in the user's cache."""
    return Path(os.environ.get("COSAE_PEERS", Path.home() / ".cache" / "cosae-peers")) / "saebench"


def find_python() -> Path | None:
    """The interpreter: $COSAE_SAEBENCH_PYTHON, or that of the default folder; None where it was never built."""
    named = os.environ.get("COSAE_SAEBENCH_PYTHON")
    place = Path(named) if named else default_folder() / "bin" / "python"
    return place if place.is_file() else None


def build(folder: Path) -> Path:
    """A fresh environment in `folder`; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        subprocess.run([*pip, "--dry-run", "--report", str(report), *WANTED], check=True)
        found = [entry["metadata"] for entry in json.loads(report.read_text("utf-8"))["install"]]
    pins = [f"{one['name']}=={one['version']}" for one in found if not one["name"].lower().startswith(LEFT_OUT)]
    subprocess.run([*pip, "--no-deps", *pins], check=True)
    return python


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder()))
