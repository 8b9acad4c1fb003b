"""Files of others: text, JSON, safetensors, NumPy archives and pickled tensors, read as data and never executed.

Bytes, depth and number of what a file holds are bounded before memory is taken for it; `.pt` goes through torch's
weights-only unpickler; archives are held against their size on disk before anything is unpacked. Every failure is one
CosaeError sentence.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from cosae.errors import CosaeError, short

MAX_RATIO, FREE_BYTES = 16, 16 * 2**20
"""A file may unpack to at most FREE_BYTES and so many times its size: weights hardly compress, bombs do."""
MAX_HEADER_BYTES = MAX_JSON_BYTES = 16 * 2**20
MAX_DEPTH, MAX_ITEMS = 64, 2_000_000
"""Of lists and mappings in one another, and of all values in them."""
MAX_ENTRIES = 4096
"""Of an archive."""


class one_sentence:
    """`with one_sentence(said, advice):` whatever fails inside becomes a CosaeError: what is said, the reason in
    brackets, and the advice. Libraries have many ways to refuse bytes that nobody wrote on purpose."""

    def __init__(self, said: str, advice: str = "") -> None:
        self.said, self.advice = said, f": {advice}" if advice else ""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, CosaeError):
            raise CosaeError(f"{self.said} ({one_line(error)}){self.advice}.") from None


def check_plain(path: Path, inside: str = "*") -> None:
    """Raises CosaeError for a pipe, a socket or a device, and for a folder with one among what is `inside` it: opening
    one may wait, or read, without end."""
    for place in (path, *path.glob(inside)) if path.is_dir() else (path,):
        if place.exists() and not place.is_file() and not place.is_dir():
            raise CosaeError(
                f"{place} is a pipe, a socket or a device, and no plain file: give a copy of what it holds."
            )


def read_text(path: Path, most: int = MAX_JSON_BYTES) -> str:
    """The UTF-8 text of a plain file of at most so many bytes. Raises OSError, ValueError."""
    check_plain(path)
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most} bytes")
    return data.decode("utf-8")


def parse_json(text: str | bytes, *, finite: bool = True, most: int = MAX_ITEMS) -> Any:
    """A JSON value of at most so many values. Raises ValueError, for depth too.

    finite: NaN, infinities and numbers beyond floats become None
    """
    to_none: dict[str, Any] = {"parse_constant": lambda _: None, "parse_float": _finite} if finite else {}
    try:
        value = json.loads(text, **to_none)
    except RecursionError:
        raise ValueError("its lists and mappings lie too deep in one another") from None
    check_bounded(value, most)
    return value


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def check_bounded(value: Any, most: int = MAX_ITEMS) -> None:
    """Raises ValueError for lists and mappings deeper than MAX_DEPTH or with more than so many values in all."""
    level, items = [value], 0
    for _ in range(MAX_DEPTH + 1):
        level = [node for node in level if isinstance(node, dict | list)]
        if not level:
            return
        items += sum(map(len, level))
        if items > most:
            raise ValueError(f"it holds more than {most} values")
        level = [one for node in level for one in (node.values() if isinstance(node, dict) else node)]
    raise ValueError(f"its lists and mappings lie more than {MAX_DEPTH} deep in one another")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping; NaN and infinities become None. Raises CosaeError."""
    check_plain(path)
    if not path.is_file():
        raise CosaeError(f"{path} does not exist: the SAE's folder is incomplete, copy it whole.")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CosaeError(f"{path} is too large to be an SAE's configuration ({path.stat().st_size} bytes).")
    try:
        value = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise CosaeError(f"{path} is not readable JSON: the file is damaged ({one_line(error)}).") from None
    if not isinstance(value, dict):
        raise CosaeError(f"{path} must hold a mapping of settings. Got {type(value).__name__} instead.")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU. Raises CosaeError."""
    _there(path)
    with one_sentence(f"{path} is not a complete safetensors file", "copy it again"):
        with path.open("rb") as handle:
            header = int.from_bytes(handle.read(8), "little")
        if header > MAX_HEADER_BYTES:
            raise CosaeError(f"{path} claims a header of {header} bytes: that is no file of weights, not opened.")
        return load_file(path)


def read_pickled(path: Path) -> Any:
    """What a `.pt` file holds, tensors and plain containers only. Raises CosaeError for anything else in it."""
    _there(path)
    _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # the unpickler raises errors of many kinds on hostile bytes
        raise CosaeError(f"{path} is damaged or holds code: only tensors and plain containers are opened.") from None


def read_npz(path: Path) -> dict[str, Tensor]:
    """Arrays of a `.npz` archive of numbers as tensors. Raises CosaeError."""
    _there(path)
    _check_archive(path)
    with (
        one_sentence(f"{path} is not a whole archive of plain number arrays"),
        path.open("rb") as handle,
        np.load(handle, allow_pickle=False) as archive,
    ):
        return {name: _array(archive, name) for name in archive.files}


def _array(archive: Any, name: str) -> Tensor:
    """One array, as large as the archive's directory says: a header that claims more would be allocated first."""
    member = name if name in archive.zip.namelist() else f"{name}.npy"
    with archive.zip.open(member) as handle:
        major, _ = np.lib.format.read_magic(handle)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(handle)
        if dtype.kind not in "fiub":
            raise ValueError(f"{name} holds {dtype}, no plain numbers")
        if int(np.prod(shape, dtype=object)) * dtype.itemsize > archive.zip.getinfo(member).file_size:
            raise ValueError(f"{name} claims the shape {shape}, more than there is")
    return torch.from_numpy(np.ascontiguousarray(archive[name]))


def tensors(value: Any, path: Path) -> dict[str, Tensor]:
    """A mapping of names to tensors, checked to be one; Python numbers become tensors."""
    if not isinstance(value, Mapping):
        raise CosaeError(f"{path} must hold a mapping of names to tensors. Got {type(value).__name__} instead.")
    found: dict[str, Tensor] = {}
    for name, one in value.items():
        if isinstance(one, Tensor):
            if one.layout != torch.strided or one.is_complex() or one.is_meta or one.is_nested or one.is_quantized:
                raise CosaeError(f"{path}: {short(name)} is not a plain dense tensor.")
            if one.numel() * one.element_size() > FREE_BYTES + MAX_RATIO * path.stat().st_size:
                raise CosaeError(
                    f"{path}: {short(name)} claims the shape {tuple(one.shape)}, more than the file holds."
                )
            found[str(name)] = one.detach()
        elif isinstance(one, bool | int | float):
            found[str(name)] = torch.tensor(one)
    return found


def take(state: Mapping[str, Tensor], names: tuple[str, ...], path: Path) -> list[Tensor]:
    """The named tensors, all of them. Raises CosaeError naming what is missing and what is there."""
    missing = [name for name in names if name not in state]
    if missing:
        there = ", ".join(name[:60] for name in sorted(map(str, state))[:12]) or "nothing"
        raise CosaeError(f"{path} lacks {', '.join(missing)}; it holds {there}. The file is not of this format.")
    return [state[name] for name in names]


def transposed(matrix: Tensor, name: str, path: Path) -> Tensor:
    """A matrix, rows and columns exchanged. Raises CosaeError for another shape."""
    if matrix.ndim != 2:
        raise CosaeError(f"{path}: {name} must be a matrix. Got shape {tuple(matrix.shape)} instead.")
    return matrix.T


def whole(value: Any, name: str, path: Path) -> int:
    """A whole number of at least 1. Raises CosaeError."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CosaeError(f"{path}: {name} must be a whole number of at least 1. Got {short(value)} instead.")
    return value


def number(value: Tensor, name: str, path: Path) -> float:
    """The one finite number in a tensor. Raises CosaeError."""
    if value.numel() != 1 or value.is_complex() or not bool(torch.isfinite(value).all()):
        raise CosaeError(f"{path}: {name} must be one finite number. Got {value.dtype} of shape {tuple(value.shape)}.")
    return float(value)


def _there(path: Path) -> None:
    check_plain(path)
    if not path.is_file():
        raise CosaeError(f"{path} does not exist: the SAE's folder is incomplete, copy it whole.")
    if path.stat().st_size == 0:
        raise CosaeError(f"{path} is empty (0 bytes): copy it again.")


def _check_archive(path: Path) -> None:
    """Refuse archives that would unpack to far more than they are; the sizes are read from the directory alone."""
    size, entries = path.stat().st_size, []
    with one_sentence(f"{path} is a damaged archive", "copy it again"):
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
    if len(entries) > MAX_ENTRIES:
        raise CosaeError(f"{path} has {len(entries)} entries, no SAE more than {MAX_ENTRIES}: not opened.")
    if unpacked > FREE_BYTES + MAX_RATIO * size:
        raise CosaeError(f"{path} would unpack from {size} to {unpacked} bytes: no file of weights, not opened.")


def one_line(error: BaseException, most: int = 120) -> str:
    """An exception's text, or its kind where it has none, as one line of so many characters at most."""
    text = " ".join(str(error).split()).rstrip(".")
    return (text[:most] + "…") if len(text) > most else text or type(error).__name__
