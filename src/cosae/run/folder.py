"""A run's folder: what lies in it, and reading and writing it without ever leaving a torn file.

RUN/ recipe.json · run.json · metrics.jsonl · timing.jsonl · events.jsonl · evaluation.json · checkpoints/ · arms/NAME/
(SAE folders) · .lock (who writes it)
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from cosae.errors import CosaeError
from cosae.io.atomic import sync_file, sync_folder, write_text
from cosae.io.legacy import upgrade
from cosae.recipe import Recipe
from cosae.train.log import finite

RUN, RECIPE, METRICS, EVALUATION, ARMS = "run.json", "recipe.json", "metrics.jsonl", "evaluation.json", "arms"
EVENTS, LOCK = "events.jsonl", ".lock"
FORMAT, VERSION = "cosae-run", 2


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping. Raises CosaeError where it is not one."""
    try:
        value = upgrade(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise CosaeError(f"{path} is not readable JSON: the run's folder is damaged.") from None
    if not isinstance(value, dict):
        raise CosaeError(f"{path} does not hold a mapping: the run's folder is damaged.")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write atomically; NaN and infinity become null. Raises CosaeError where the disk refuses."""
    try:
        write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise CosaeError(f"{path} cannot be written ({error}): make room and resume the run.") from None


def check_free(out: Path) -> None:
    """Raises CosaeError unless `out` is absent or an empty folder."""
    try:
        there = out.exists()
    except OSError as error:
        raise CosaeError(f"{out} cannot be written ({error.strerror}); choose another --out.") from None
    if there and not out.is_dir():
        raise CosaeError(f"{out} is a file; give a folder for the run.")
    if (out / RECIPE).exists() or (out / RUN).exists():
        raise CosaeError(f"{out} already holds a run: go on with `cosae resume {out}`, or choose another --out.")
    if there and any(path.name != LOCK for path in out.iterdir()):
        raise CosaeError(f"{out} is not empty and holds no run: choose another --out.")


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """Make the folder `out` where there is none, and be the only process that writes a run or a store there.

    The lock goes with its process, however that ends. Raises CosaeError where another one holds it, or the disk
    refuses. Systems without POSIX locks get none.
    """
    key = str(out.resolve())
    if key in _HELD:
        raise CosaeError(f"{out} is being written by this very process: wait for it, or choose another folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise CosaeError(f"{out} cannot be written ({error.strerror}); choose another folder.") from None
    _HELD.add(key)
    try:
        with file:
            _lock(file, out)
            yield
    finally:
        _HELD.discard(key)


def _lock(file: TextIO, out: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock not inherited by worker processes
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise CosaeError(
            f"{out} is being written by another process ({file.read().strip() or 'unknown'}): wait for it, or stop it "
            "first."
        ) from None
    except OSError:
        return  # a file system without locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()


_HELD: set[str] = set()
"""Folders this process writes: POSIX locks do not keep a process from itself."""


def write_recipe(out: Path, recipe: Recipe) -> None:
    """recipe.json, in one step. Raises CosaeError where the disk refuses."""
    staged = out / f".{RECIPE}.partial"
    try:
        recipe.write(staged)
        sync_file(staged)
        staged.replace(out / RECIPE)
        sync_folder(out)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise CosaeError(f"{out} cannot be written ({error.strerror}); make room, or choose another --out.") from None
