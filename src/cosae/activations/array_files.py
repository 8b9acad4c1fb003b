"""Files of N × d values, opened: safetensors, NumPy and Parquet.

An unreadable file raises one sentence; whether its values are finite is checked by the reader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cosae.errors import CosaeError
from cosae.io.kind import PICKLE, kind_of, which_is
from cosae.io.untrusted import FREE_BYTES, MAX_RATIO, check_plain, one_sentence

Array = Tensor | NDArray[Any]
ALLOWED = "float32, float16, bfloat16 or float64"


def open_array(path: Path, key: str | None = None) -> tuple[Array, str | None, str]:
    """(N, d) or (N, T, d) array, its key (None where it has none) and its dtype's name in the file.

    `.npy` files are memory-mapped and never unpickled; the others are read whole. Raises `CosaeError`.
    """
    readers = {
        ".safetensors": ("safetensors", _read_safetensors),
        ".npy": ("NumPy array", _read_npy),
        ".parquet": ("Parquet", _read_parquet),
    }
    if (suffix := path.suffix.lower()) not in readers:
        raise CosaeError(f"Activations must be a {', '.join(readers)} file. Got '{path}'{which_is(path)} instead.")
    check_plain(path)
    if not path.is_file():
        raise CosaeError(f"Activations file '{path}' does not exist; check the path.")
    kind, reader = readers[suffix]
    with one_sentence(f"'{path}' is damaged, cut short or no {kind} file", "write it again"):
        array, found = reader(path, key)
    dtype = str(array.dtype).removeprefix("torch.").lstrip("<>")
    dtype = {"f2": "float16", "f4": "float32", "f8": "float64"}.get(dtype, dtype)
    if dtype not in ("float32", "float16", "bfloat16", "float64"):
        raise CosaeError(f"'{path}' holds {dtype} values; save them as {ALLOWED}.")
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise CosaeError(
            f"'{path}' must hold an N × d or N × T × d array that is not empty. Got shape {tuple(array.shape)} instead."
        )
    return array, found, dtype


def _choose(path: Path, key: str | None, available: dict[str, str], what: str) -> str:
    """The key asked for, or the only one."""
    listed = ", ".join(f"{name} {shape}".strip() for name, shape in sorted(available.items()))
    if key is not None and key not in available:
        raise CosaeError(f"'{path}' has no {what} '{key}'; it has {listed or 'none'}.")
    if key is None and len(available) != 1:
        raise CosaeError(f"'{path}' has {len(available)} {what}s ({listed or 'none'}); name one by its key.")
    return key if key is not None else next(iter(available))


def _read_safetensors(path: Path, key: str | None) -> tuple[Array, str]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        shapes = {name: str(tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
        key = _choose(path, key, shapes, "tensor")
        return file.get_tensor(key), key


def _read_npy(path: Path, key: str | None) -> tuple[Array, None]:
    if key is not None:
        raise CosaeError(f"A .npy file holds a single array, without a key. Got key '{key}' for '{path}'.")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False), None
    except (ValueError, OSError, EOFError) as error:
        if kind_of(path) == PICKLE or "Python objects" in str(error) or "Object arrays" in str(error):
            raise CosaeError(
                f"'{path}' holds Python objects, pickled, which may run code: save an array of {ALLOWED} instead."
            ) from None
        raise


def _read_parquet(path: Path, key: str | None) -> tuple[Array, str | None]:
    try:
        import pyarrow as pa
        import pyarrow.compute
        import pyarrow.parquet as pq
    except ImportError:
        raise CosaeError("Reading .parquet needs pyarrow: pip install pyarrow.") from None
    file = pq.ParquetFile(path)
    schema = file.schema_arrow
    groups = (file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
    held = max(file.metadata.num_rows, sum(groups))
    if held > FREE_BYTES + MAX_RATIO * path.stat().st_size:
        raise ValueError(f"it would unpack from {path.stat().st_size} to {held} bytes or more")
    kinds = {field.name: str(field.type) for field in schema}
    of_lists = (pa.types.is_list, pa.types.is_fixed_size_list, pa.types.is_large_list)
    lists = {f.name: str(f.type) for f in schema if any(is_kind(f.type) for is_kind in of_lists)}
    if key is None and not lists:
        return _side_by_side(pa, path, kinds, file.read()), None
    key = _choose(path, key, lists, "list column")
    return _list_column(pa, path, key, file.read(columns=[key])[key]), key


def _side_by_side(pa: Any, path: Path, kinds: dict[str, str], table: Any) -> Array:
    """(N, number of columns), the columns in the file's order."""
    other = [f"'{name}' is {kind}" for name, kind in kinds.items() if not pa.types.is_floating(table[name].type)]
    if other or not kinds:
        have = f"column {other[0]}" if other else "there are no columns"
        raise CosaeError(
            f"'{path}' must have one column of lists or floating point columns only, but {have}; drop or convert it."
        )
    if gaps := [name for name in kinds if table[name].null_count]:
        raise CosaeError(f"Column '{gaps[0]}' of '{path}' has missing values; remove or fill those rows.")
    # Filled by column: stacking would promote mixed widths twice over and hold three copies.
    dtype = np.result_type(*(table.schema.field(name).type.to_pandas_dtype() for name in kinds))
    array = np.empty((table.num_rows, len(kinds)), dtype)
    for column, name in enumerate(kinds):
        array[:, column] = table[name].to_numpy()
    return array


def _list_column(pa: Any, path: Path, key: str, column: Any) -> Array:
    """(N, length of the lists)."""
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    if not chunks:
        return np.empty((0, 0), np.float32)
    lengths = np.unique(np.concatenate([pa.compute.list_value_length(c).fill_null(-1) for c in chunks]))
    if len(lengths) != 1 or lengths[0] < 0:
        raise CosaeError(
            f"Column '{key}' of '{path}' must hold lists of one length, none of them missing. Got lengths "
            f"{lengths.min()} to {lengths.max()} instead (-1 for a missing list)."
        )
    parts = [chunk.flatten() for chunk in chunks]
    if any(part.null_count for part in parts):
        raise CosaeError(f"Column '{key}' of '{path}' has missing values in its lists; remove or fill them.")
    if not pa.types.is_floating(parts[0].type):
        raise CosaeError(f"'{path}' holds {parts[0].type} values; save them as {ALLOWED}.")
    flat = np.concatenate([part.to_numpy() for part in parts])
    return flat.reshape(-1, int(lengths[0]))
