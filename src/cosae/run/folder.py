"""A run's folder: what lies in it, and reading and writing it without ever leaving a partial file.

RUN/ recipe.json · run.json · metrics.jsonl · timing.jsonl · events.jsonl · evaluation.json · checkpoints/ · arms/NAME/
(SAE folders) · .lock (who writes it)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError
from cosae.io.atomic import replaced, write_text, written
from cosae.io.legacy import upgrade
from cosae.io.lines import finite
from cosae.io.lock import LOCK
from cosae.io.untrusted import parse_json, read_text
from cosae.recipe import Recipe

RUN, RECIPE, METRICS, EVALUATION, ARMS = "run.json", "recipe.json", "metrics.jsonl", "evaluation.json", "arms"
EVENTS = "events.jsonl"
FORMAT, VERSION = "cosae-run", 2
MAX_BYTES = 2**28


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping. Raises CosaeError where it is not one."""
    try:
        value = upgrade(parse_json(read_text(path, MAX_BYTES)))
    except (OSError, ValueError):
        raise CosaeError(f"{path} is not readable JSON: the run's folder is damaged.") from None
    if not isinstance(value, dict):
        raise CosaeError(f"{path} does not hold a mapping: the run's folder is damaged.")
    return value


def write_json(path: Path, value: Any, advice: str = "make room and resume the run") -> None:
    """Write atomically; NaN and infinity become null. Raises CosaeError, with advice, where the disk refuses."""
    with written(path, advice):
        write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def check_free(out: Path) -> None:
    """Raises CosaeError unless `out` is absent or an empty folder."""
    with written(out, "choose another --out"):
        there = out.exists()
    if there and not out.is_dir():
        raise CosaeError(f"{out} is a file; give a folder for the run.")
    if (out / RECIPE).exists() or (out / RUN).exists():
        raise CosaeError(f"{out} already holds a run: go on with `cosae resume {out}`, or choose another --out.")
    if there and any(path.name != LOCK for path in out.iterdir()):
        raise CosaeError(f"{out} is not empty and holds no run: choose another --out.")


def write_recipe(out: Path, recipe: Recipe) -> None:
    """recipe.json, in one step. Raises CosaeError where the disk refuses."""
    with written(out, "make room, or choose another --out"), replaced(out / RECIPE) as staged:
        recipe.write(staged)
