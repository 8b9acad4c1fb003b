"""What every number carries beside its recipe: commit, packages, hardware."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("cosae", "torch", "numpy", "transformers", "tokenizers", "datasets", "safetensors", "scikit-learn", "numba")


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def stamp() -> dict[str, Any]:
    """When a file was written, and by what code."""
    return {"written_at": now(), "commit": commit(), "packages": packages()}


def commit() -> str | None:
    """Commit of the checkout this package runs from, "+changes" where it was edited; None for an installed wheel."""
    here = Path(__file__).resolve().parents[3]
    if not (here / ".git").exists():
        return None
    try:
        head = _git(here, "rev-parse", "HEAD")
        dirty = _git(here, "status", "--porcelain", "--untracked-files=no", "--", "src")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if dirty else "")


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def packages() -> dict[str, str]:
    """Versions of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def hardware(device: str) -> dict[str, Any]:
    """Processor, cores, threads, accelerator."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        if named := re.search(r"^model name.*?:(.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE):
            processor = named[1].strip()
    counts = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    found: dict[str, Any] = {"processor": processor, **counts, "device": device}
    if device.startswith("cuda") and torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name(torch.device(device))
    return found
