"""Build the environment that holds the peers `benchmarks.step` is timed against.

python benchmarks/peers.py [FOLDER]     default: $COSAE_PEERS/step, or a folder in the user's cache

One environment serves all three. What pip resolves is installed but for NVIDIA's libraries, triton and torchvision:
nothing here runs on a GPU, and a torchvision for another torch breaks transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

WANTED = ("torch==2.13.0", "sae-lens==6.54.12", "dictionary-learning==0.1.0", "eai-sparsify==1.3.3")
LEFT_OUT = ("nvidia", "torchvision", "triton")


def default_folder() -> Path:
    """$COSAE_PEERS/step, or a folder in the user's cache."""
    return Path(os.environ.get("COSAE_PEERS", Path.home() / ".cache" / "cosae-peers")) / "step"


def find_python(folder: Path | None = None) -> Path | None:
    """The interpreter in `folder`, or the default one; None where it was never built."""
    python = (default_folder() if folder is None else folder) / "bin" / "python"
    return python if python.is_file() else None


def build(folder: Path) -> Path:
    """A fresh environment in `folder`; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
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
