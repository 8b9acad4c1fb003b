"""A folder that is written whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from cosae.errors import CosaeError
from cosae.io.atomic import new_file_mode, sync_file, sync_folder, written


def check_place(out: Path, mark: str) -> None:
    """Raises CosaeError unless `out` is absent, empty, or one of ours: a folder with a file that `mark` matches."""
    with written(out, "choose another --out"):
        there, is_folder = out.exists() or out.is_symlink(), out.is_dir()
        ours = is_folder and (not any(out.iterdir()) or any(out.glob(mark)))
    if there and not is_folder:
        raise CosaeError(f"{out} is a file; give a folder with --out.")
    if there and not ours:
        raise CosaeError(f"{out} is not empty and holds no earlier result of this command: choose another --out.")


@contextmanager
def filled(out: Path, mark: str) -> Iterator[Path]:
    """`staged` for the --out of a command: raises CosaeError where `out` holds something else (`check_place`)."""
    check_place(out, mark)
    with staged(out) as folder:
        yield folder


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A fresh folder beside `out` to write into; it becomes `out` when the block ends well, else it is removed.

    What `out` held before stays until then; what was written survives a power cut once it stands. Raises CosaeError,
    with the place and the system's word, where the disk refuses.
    """
    with written(out, "choose another place"):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
        folder.mkdir()
        mode, folder_mode = new_file_mode(folder / ".mode"), folder.stat().st_mode
    try:
        yield folder
        for path in (*folder.rglob("*"), folder):
            path.chmod(folder_mode if path.is_dir() else mode)
            sync_folder(path) if path.is_dir() else sync_file(path)
        swap_in(folder, out)
        sync_folder(out.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CosaeError(f"{out} could not be written ({reason}); what was there before is kept.") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def swap_in(staged: Path, path: Path) -> None:
    """Put the staged directory in place; the old one steps aside first and is removed last."""
    aside = staged.with_name(staged.name + ".old")
    if path.exists():
        path.rename(aside)
    try:
        staged.rename(path)
    except OSError:
        if aside.exists():
            aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)
