"""Files that are complete or absent, and that survive a power cut once they stand: staged, flushed, renamed, and the
folder flushed after the rename."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cosae.errors import CosaeError


@contextmanager
def written(place: Path, what_to_do: str) -> Iterator[None]:
    """Raises CosaeError with the place, the system's word and what to do where the disk refuses what the block does."""
    try:
        yield
    except OSError as error:
        raise CosaeError(f"{place} cannot be written ({error.strerror or error}): {what_to_do}.") from None


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write to; it replaces `path` in one step when the block ends well.

    Otherwise it is removed, and what was there before is untouched. Whoever writes it, others may read it as the
    process' umask says. Raises OSError.
    """
    staged = path.with_name(f".{path.name}.partial")
    try:
        mode = new_file_mode(staged)
        yield staged
        staged.chmod(mode)
        sync_file(staged)
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def new_file_mode(path: Path) -> int:
    """What a new file at `path`, which is made and removed, may be used for by whom: safetensors lets nobody else read.

    Raises OSError.
    """
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    path.unlink()
    return mode


@contextmanager
def kept_until_new(paths: Iterable[Path]) -> Iterator[None]:
    """For files that others write as they like: those there lie aside until the block ends well, else they come back.

    What a block that was killed left aside comes back with the next one. Raises OSError.
    """
    aside = {path: path.with_name(f".{path.name}.previous") for path in paths}

    def put_back() -> None:
        for path, previous in aside.items():
            if previous.exists():
                previous.replace(path)

    put_back()
    for path, previous in aside.items():
        if path.exists():
            path.replace(previous)
    try:
        yield
    except BaseException:
        put_back()
        raise
    for previous in aside.values():
        previous.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step. Raises OSError; what was there before is untouched then."""
    with replaced(path) as staged:
        staged.write_text(text, encoding="utf-8")


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    with path.open("rb+") as handle:  # Windows flushes no file that is open for reading alone
        os.fsync(handle.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk, where the system can."""
    with suppress(OSError):  # some systems open no folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
