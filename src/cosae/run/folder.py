"""A run's folder: what lies in it, and reading and writing it without ever leaving a torn file.

RUN/ recipe.json · run.json · metrics.jsonl · evaluation.json · checkpoints/ · arms/NAME/ (SAE folders)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cosae.recipe import Recipe
from cosae.train.log import finite
from cosae.types import CosaeError

RUN, RECIPE, METRICS, EVALUATION, ARMS = "run.json", "recipe.json", "metrics.jsonl", "evaluation.json", "arms"
FORMAT = "cosae-run"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping. Raises CosaeError where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CosaeError(f"{path} is not readable JSON: the run's folder is damaged.") from None
    if not isinstance(value, dict):
        raise CosaeError(f"{path} does not hold a mapping: the run's folder is damaged.")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write atomically; NaN and infinity become null. Raises CosaeError where the disk refuses."""
    staged = path.with_name(f".{path.name}.partial")
    try:
        staged.write_text(json.dumps(finite(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        staged.replace(path)
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
    if there and any(out.iterdir()):
        raise CosaeError(f"{out} is not empty and holds no run: choose another --out.")


def make_folder(out: Path, recipe: Recipe) -> None:
    """Make the folder and write the recipe into it. Raises CosaeError where the disk refuses."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        recipe.write(out / RECIPE)
    except OSError as error:
        raise CosaeError(f"{out} cannot be written ({error.strerror}); choose another --out.") from None
