"""Token ids that are ready → token lists, row by row: no tokenizer is needed.

FILE.npy       (N, T) whole numbers, one sequence a row; (N,) of them are cut into rows of `context`
FILE.parquet, FILE.jsonl, hf:…, a folder of `save_to_disk`   a column or key with a list of ids
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosae.errors import CosaeError
from cosae.io.untrusted import check_plain, one_sentence
from cosae.text.pylib import Split
from cosae.text.rows import is_saved_dataset, open_dataset, read_jsonl, read_parquet
from cosae.text.tokenization import TokenizedDocument

FIELD = "input_ids"
"""Where rows have their ids, unless another field is named."""


def read_ids(spec: str, field: str, context: int) -> Iterator[TokenizedDocument]:
    """Each row's ids under its number. Raises CosaeError at the call for a spec that names nothing, and while reading
    for what holds no ids, naming the row."""
    return (_row(spec, field, number, value) for number, value in _rows(spec, field, context))


def _row(spec: str, field: str, number: int, value: Any) -> TokenizedDocument:
    ids = np.asarray(value if value is not None else "")
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
        raise CosaeError(
            f"each row must hold a list of token ids under {field!r} (data.text_field). Got {ids.dtype} of shape "
            f"{ids.shape} at {spec}, row {number} instead."
        )
    return TokenizedDocument(f"{Path(spec).name}:{number}", ids.astype(np.int32), np.zeros((len(ids), 2), np.int32))


def side_of_ids(ids_T: NDArray[np.int32], held_out_frac: float) -> Split:
    """The side of a row, by a hash of its ids: equal rows never fall on both."""
    head = hashlib.sha256(b"0:" + ids_T.tobytes()).digest()[:8]
    return "held_out" if int.from_bytes(head, "big") < held_out_frac * 2**64 else "train"


def _rows(spec: str, field: str, context: int) -> Iterator[tuple[int, Any]]:
    path = Path(spec)
    if spec.startswith("hf:") or is_saved_dataset(path):
        return ((number, row.get(field)) for number, row in open_dataset(spec))
    check_plain(path)
    kind = path.suffix.lower()
    if not path.is_file() or kind not in (".npy", ".jsonl", ".parquet"):
        raise CosaeError(
            "token ids must be an existing .npy, .jsonl or .parquet file, a folder written by datasets' save_to_disk, "
            f"or 'hf:DATASET[:CONFIG][:SPLIT]'. Got {spec!r} instead."
        )
    if kind == ".npy":
        with one_sentence(f"{path.name} must be a whole .npy file of token ids"):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim == 1:
            array = array[: len(array) - len(array) % context].reshape(-1, context)
        return iter(enumerate(array))
    if kind == ".parquet":
        rows = read_parquet(path, path.name, [field], advice="name the column with data.text_field")
        return ((number, row[field]) for number, row in enumerate(rows))
    return ((number, row.get(field) if isinstance(row, dict) else None) for number, row in read_jsonl(path, path.name))
