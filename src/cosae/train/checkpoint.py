"""Checkpoints: a folder that is whole or absent, holding all that a run needs to go on to the bit.

    checkpoints/step_000000500/
        checkpoint.json        step, numbers of every arm, stream cursor, digests of the files beside it, and
                               its own
        stream.safetensors     shuffle buffer and generator
        arm.NAME.safetensors   parameters, optimiser moments, feature ages

Written to a hidden folder, flushed, then renamed. The one before stays until the new one stands.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosae.types import CosaeError

FOLDER = "checkpoints"
FACTS = "checkpoint.json"
VERSION = 1
KEEP = 2


def write_checkpoint(run: Path, step: int, parts: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> Path:
    """Write `parts` (file stem → tensors) and `facts` (JSON) as the checkpoint after `step` steps; prune old ones.

    Raises CosaeError where the disk refuses; the checkpoints before it are untouched then.
    """
    root = run / FOLDER
    place = root / f"step_{step:09d}"
    staged = root / f".step_{step:09d}.partial"
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        digests = {}
        for stem, tensors in parts.items():
            file = staged / f"{stem}.safetensors"
            save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, file)
            digests[file.name] = _digest(file)
        record = {"version": VERSION, "step": step, "files": digests, **facts}
        text = json.dumps({"sha256": _record_digest(record), "record": record})
        (staged / FACTS).write_text(text, encoding="utf-8")
        for file in staged.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(place, ignore_errors=True)
        staged.rename(place)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise CosaeError(
            f"the checkpoint at step {step} could not be written to {root} ({error}); the one before it still stands."
        ) from None
    for old in checkpoints(run)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    return sorted((run / FOLDER).glob("step_*"))


def read_latest(run: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], list[str]]:
    """(parts, facts, remarks) of the newest checkpoint that is whole; remarks name the damaged ones passed over.

    Raises CosaeError where the run has no whole checkpoint.
    """
    remarks: list[str] = []
    for place in reversed(checkpoints(run)):
        try:
            return (*_read(place), remarks)
        except CosaeError:
            raise
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            remarks.append(f"{place} is damaged ({error}); going on from the checkpoint before it.")
    if remarks:
        raise CosaeError(f"no checkpoint in {run / FOLDER} is whole: {' '.join(remarks)} Start the run again.")
    raise CosaeError(f"{run} has no checkpoint to go on from (none under {FOLDER}/). Start the run again.")


def _read(place: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    whole = json.loads((place / FACTS).read_text(encoding="utf-8"))
    facts: dict[str, Any] = whole["record"]
    if _record_digest(facts) != whole["sha256"]:
        raise ValueError(f"{FACTS} differs from what was written")
    if facts["version"] > VERSION:
        raise CosaeError(f"{place} was written by a later cosae (version {facts['version']}): upgrade cosae.")
    parts = {}
    for name, digest in facts["files"].items():
        if _digest(place / name) != digest:
            raise ValueError(f"{name} differs from what was written")
        parts[name.removesuffix(".safetensors")] = load_file(place / name)
    return parts, facts


def _record_digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
