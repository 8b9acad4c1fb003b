"""A corpus of images or sound by name → one medium at a time, lazily, of one of its sides.

    FOLDER         every image (.png, .jpg …) or sound (.wav, .flac …) below it, sorted by name
    FILE.npy       images only: (N, H, W) or (N, H, W, 3) bytes; or (N, C, H, W) floats, taken as the model's input
    FILE.parquet, a folder of `save_to_disk`, hf:…   a column with bytes, or {"bytes": …, "path": …}
    digits         images only: the handwritten digits that are part of scikit-learn

A medium's side is a function of its content alone, so equal ones never fall on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosae.errors import CosaeError
from cosae.io.untrusted import check_plain, one_sentence
from cosae.media import digits
from cosae.text.pylib import Split
from cosae.text.rows import is_saved_dataset, open_dataset, read_parquet

SUFFIXES: dict[str, tuple[str, ...]] = {
    "images": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "audio": (".wav", ".flac", ".ogg", ".mp3"),
}
MAX_BYTES = 2**28


@dataclass(frozen=True)
class Medium:
    """One image or sound: the bytes of its file, or an array."""

    name: str
    content: bytes | NDArray[Any]

    def side(self, held_out_frac: float) -> Split:
        content = self.content if isinstance(self.content, bytes) else np.ascontiguousarray(self.content).tobytes()
        head = hashlib.sha256(b"0:" + content).digest()[:8]
        return "held_out" if int.from_bytes(head, "big") < held_out_frac * 2**64 else "train"


def read_media(spec: str, kind: str, field: str, seed: int = 0) -> Iterator[Medium]:
    """All of a corpus, those of a folder or an array in an order that the seed decides.

    Raises CosaeError at the call for a spec that names nothing, and while reading for a row without content.
    """
    path = Path(spec)
    if spec == "digits" and kind == "images":
        return _of_array(digits.pixels(), seed, digits.names())
    if spec.startswith("hf:") or is_saved_dataset(path):
        rows = open_dataset(spec, [seed], encoded=field)
        return _of_rows(((n, row.get(field)) for n, row in rows), spec, field)
    check_plain(path)
    if path.is_dir():
        return _of_folder(path, kind, seed)
    if path.suffix.lower() == ".parquet" and path.is_file():
        listed = read_parquet(path, path.name, [field], advice="name the column with data.text_field")
        return _of_rows(((n, row[field]) for n, row in enumerate(listed)), path.name, field)
    if path.suffix.lower() == ".npy" and path.is_file() and kind == "images":
        with one_sentence(f"{path.name} must be a whole .npy file of images"):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not (array.ndim == 4 or (array.ndim == 3 and array.dtype == np.uint8)):
            raise CosaeError(
                f"{path.name} must hold images (N, H, W) or (N, H, W, 3) of bytes, or (N, C, H, W) of floats. Got "
                f"{array.dtype} of shape {array.shape} instead."
            )
        return _of_array(array, seed, [f"{path.stem} {i}" for i in range(len(array))])
    arrays = " a .npy file," if kind == "images" else ""
    raise CosaeError(
        f"{kind} must be a folder of files ({' '.join(SUFFIXES[kind])}),{arrays} a .parquet file, a folder written by "
        f"datasets' save_to_disk, or 'hf:DATASET[:CONFIG][:SPLIT]'. Got {spec!r} instead."
    )


def in_own_order(spec: str) -> bool:
    """Whether a corpus comes in the order of a file or of the hub."""
    return spec.startswith("hf:") or spec.lower().endswith(".parquet")


def _of_folder(folder: Path, kind: str, seed: int) -> Iterator[Medium]:
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES[kind] and p.is_file())
    if not found:
        raise CosaeError(f"the folder {folder} must hold {kind} ({' '.join(SUFFIXES[kind])}). Got none.")
    order = np.random.default_rng([seed, 5]).permutation(len(found))
    return (Medium(found[i].relative_to(folder).as_posix(), _bytes(found[i])) for i in order)


def _bytes(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise CosaeError(f"{path.name} must be at most {MAX_BYTES:,} bytes long. Got {path.stat().st_size:,}.")
    return path.read_bytes()


def _of_array(array: Any, seed: int, names: list[str]) -> Iterator[Medium]:
    order = np.random.default_rng([seed, 5]).permutation(len(array))
    return (Medium(names[i], np.asarray(array[i])) for i in order)


def _of_rows(rows: Iterator[tuple[int, Any]], spec: str, field: str) -> Iterator[Medium]:
    for number, value in rows:
        named = value.get("path") if isinstance(value, dict) else None
        content = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(value, dict) and content is None and named and not spec.startswith("hf:"):
            content = _bytes(Path(named)) if Path(named).is_file() else None
        if not isinstance(content, bytes):
            raise CosaeError(
                f"each row must hold a file's bytes under {field!r} (data.text_field). Got {type(value).__name__} at "
                f"{spec}, row {number} instead."
            )
        yield Medium(str(named) if named else f"{Path(spec).name}:{number}", content)
