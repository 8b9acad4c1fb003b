"""Checkpoints: a folder that is complete or absent, holding all that a run needs to go on to the bit.

    checkpoints/step_000000500/
        checkpoint.json        step, numbers of every arm, stream cursor, digests of the files beside it, and
                               its own
        stream.safetensors     shuffle buffer and generator
        random.safetensors     the process' global generators
        arm.NAME.safetensors   parameters, optimiser moments, feature ages; arm.NAME@IofN.safetensors those of one of N
                               parts of its features, where several processes trained it

The one before stays until the new one is complete (cosae.io.staged).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosae.errors import CosaeError, sentences
from cosae.io.digest import file_digest
from cosae.io.legacy import upgrade
from cosae.io.staged import staged
from cosae.io.untrusted import check_plain, one_line, parse_json, read_text
from cosae.train.ranks import ONE, Ranks

FOLDER = "checkpoints"
RECORD = "checkpoint.json"
VERSION = 1
KEEP = 2
MAX_BYTES = 2**28
NAME = re.compile(r"step_\d{9}")


def write_checkpoint(
    run: Path, step: int, parts: dict[str, dict[str, Tensor]], record: dict[str, Any], ranks: Ranks = ONE
) -> Path:
    """Write `parts` (file stem → tensors) and `record` (JSON) as the checkpoint after `step` steps; prune old ones.

    Every rank writes its own parts, into one folder that all of them see; the leader writes the record and puts the
    folder in its place.

    Raises CosaeError where the disk refuses; the checkpoints before it are untouched then.
    """
    root = run / FOLDER
    place = root / f"step_{step:09d}"
    whole = ExitStack()
    try:
        with whole:
            opened = ranks.first(lambda: _opened(whole, place))
            folder = ranks.gather(opened)[0]
            assert folder is not None
            written, fault = {}, None
            try:
                for stem, tensors in parts.items():
                    file = folder / f"{stem}.safetensors"
                    save_file(_apart(tensors), file)
                    written[file.name] = file_digest(file)
            except (OSError, SafetensorError) as error:
                fault = f"{place} could not be written ({getattr(error, 'strerror', None) or error})"
            every = ranks.gather((written, fault))
            faults = [f"rank {rank}: {told}" if ranks.n > 1 else told for rank, (_, told) in enumerate(every) if told]
            if faults:
                raise CosaeError(f"{faults[0]}; what was there before is kept.")
            digests = {name: digest for some, _ in every for name, digest in some.items()}
            numbers = {"version": VERSION, "step": step, "files": digests, **record}
            ranks.first(lambda: _finish(whole, folder, numbers))
    except CosaeError as error:
        earlier = checkpoints(run)
        before = f"the one before it ({earlier[-1].name}) is kept" if earlier else "there is none before it"
        raise CosaeError(
            sentences(
                f"the checkpoint at step {step} could not be written: {error}",
                f"Make room, then go on with `cosae resume {run}`; {before}",
            )
        ) from None
    if ranks.leads:
        for old in checkpoints(run)[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)
    return place


def _opened(whole: ExitStack, place: Path) -> Path:
    """A folder to write into, which becomes `place` when `whole` is closed."""
    for partial in place.parent.glob(".step_*"):
        shutil.rmtree(partial, ignore_errors=True)
    return whole.enter_context(staged(place))


def _finish(whole: ExitStack, folder: Path, record: dict[str, Any]) -> None:
    """Write the record, and put the folder in its place."""
    text = json.dumps({"sha256": _record_digest(record), "record": record})
    try:
        (folder / RECORD).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CosaeError(f"{folder} could not be written ({error.strerror or error}).") from None
    whole.close()


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, no two in the same memory; copied only where that needs it."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in tensors.items():
        there = value.detach().cpu().contiguous()
        alone = there.untyped_storage().nbytes() == there.numel() * there.element_size()
        if there.untyped_storage().data_ptr() in taken or not alone:
            there = there.clone()
        taken.add(there.untyped_storage().data_ptr())
        apart[name] = there
    return apart


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    return sorted(p for p in (run / FOLDER).glob("step_*") if NAME.fullmatch(p.name))


def has_checkpoints(run: Path) -> bool:
    """Whether anything lies where checkpoints do, complete or not."""
    return any((run / FOLDER).glob("step_*")) or any((run / FOLDER).glob("damaged_step_*"))


def quarantine(run: Path, step: int) -> None:
    """Rename checkpoints after `step`, which were found damaged: none of them is counted again, or takes a place."""
    for place in checkpoints(run):
        if place.name > f"step_{step:09d}":
            aside = place.with_name(f"damaged_{place.name}")
            shutil.rmtree(aside, ignore_errors=True)
            place.rename(aside)


def part_stem(arm: str, place: int, n: int) -> str:
    """The file stem of one of n parts of an arm."""
    return f"arm.{arm}" if n == 1 else f"arm.{arm}@{place}of{n}"


def read_latest(
    run: Path, wanted: Callable[[str], bool] = lambda stem: True
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], list[str]]:
    """(parts, record, warnings) of the newest complete checkpoint; warnings name the damaged ones passed over.

    wanted: of which files, by their stems, the tensors are needed. Raises CosaeError where the run has no complete
    checkpoint.
    """
    warnings: list[str] = []
    for place in sorted((run / FOLDER).glob("step_*"), reverse=True):
        try:
            return (*_read(place, wanted), warnings)
        except CosaeError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            warnings.append(f"{place} is damaged ({one_line(error)}); going on from the checkpoint before it.")
    if warnings:
        raise CosaeError(f"no checkpoint in {run / FOLDER} is complete: {' '.join(warnings)} Start the run again.")
    raise CosaeError(f"{run} has no checkpoint to go on from (none under {FOLDER}/). Start the run again.")


def _read(place: Path, wanted: Callable[[str], bool]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    check_plain(place)
    saved = parse_json(read_text(place / RECORD, MAX_BYTES), finite=False)
    record: dict[str, Any] = saved["record"]
    if _record_digest(record) != saved["sha256"]:
        raise ValueError(f"{RECORD} differs from what was written")
    if place.name != f"step_{record['step']:09d}":
        raise ValueError(f"it holds step {record['step']}, and was renamed")
    if record["version"] > VERSION:
        raise CosaeError(f"{place} was written by a later cosae (version {record['version']}): upgrade cosae.")
    parts = {}
    for name, digest in record["files"].items():
        if file_digest(place / name) != digest:
            raise ValueError(f"{name} differs from what was written")
        if wanted(stem := name.removesuffix(".safetensors")):
            parts[stem] = load_file(place / name)
    return parts, upgrade(record)


def _record_digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
