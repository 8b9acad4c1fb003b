"""One shard of a store: written, checked, and mapped into memory.

Its header says which shard it is, so that one put in another's place is noticed without reading it.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from cosae.activations.store.format import (
    COLUMNS,
    NUMPY_DTYPES,
    ShardShape,
    ShardTag,
    choose_offset,
    restore_rows,
    round_rows,
)
from cosae.io.atomic import replaced
from cosae.io.digest import file_digest
from cosae.io.untrusted import parse_json
from cosae.types import Activations

HEADER_KEY = "cosae"
MAX_HEADER_BYTES = 1 << 20


@dataclass(frozen=True)
class ShardRows:
    """Rows for a shard. labels_NL (N, L) uint8 and labelled_N (N,) bool, or None both."""

    activations: Activations
    labels_NL: Tensor | None = None
    labelled_N: Tensor | None = None

    def __len__(self) -> int:
        return len(self.activations)

    def __getitem__(self, rows: slice) -> ShardRows:
        return replace(self, **{name: part[rows] for name, part in vars(self).items() if part is not None})

    @classmethod
    def cat(cls, parts: list[ShardRows]) -> ShardRows:
        """Parts one after the other."""
        if len(parts) == 1:
            return parts[0]
        labels = [part.labels_NL for part in parts if part.labels_NL is not None]
        labelled = [part.labelled_N for part in parts if part.labelled_N is not None]
        joined = (torch.cat(column) if column else None for column in (labels, labelled))
        return cls(Activations.cat([part.activations for part in parts]), *joined)


def write_shard(folder: Path, tag: ShardTag, rows: ShardRows, dtype: str) -> Shard:
    """Write one shard. Raises OSError or SafetensorError where the disk refuses; nothing of the shard is left then."""
    offset_D, noise = choose_offset(rows.activations.x_ND, dtype)
    x_ND, scale_N = round_rows(rows.activations.x_ND, dtype, offset_D)
    mean_D, squares = _moments(x_ND, scale_N, offset_D)
    # rows from nowhere in particular share one tensor among their ids, which a file must not
    tensors = {"x": x_ND} | {name: getattr(rows.activations, field).clone() for name, field in COLUMNS.items()}
    tensors |= {"mean": mean_D, "squares": squares}
    optional = {"scale": scale_N, "offset": offset_D, "labels": rows.labels_NL, "labelled": rows.labelled_N}
    tensors |= {name: value for name, value in optional.items() if value is not None}
    # one key: safetensors writes several in an order of its own, and equal shards must be equal files
    metadata = {HEADER_KEY: json.dumps(asdict(tag))}
    with replaced(folder / tag.file) as staged:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, staged, metadata)
        size, sha256 = staged.stat().st_size, file_digest(staged)
    label_bytes = 0 if rows.labels_NL is None else rows.labels_NL.shape[1]
    shape = ShardShape(len(rows), x_ND.shape[1], dtype, label_bytes, offset_D is not None)
    return Shard(folder, tag, shape, size, sha256, noise)


@dataclass(frozen=True, eq=False)
class Shard:
    """A shard that an index or a journal lists: where it lies, what its header must say, its size and SHA-256.

    noise: of rounding, as a share of the variance of its ordinary rows; None in stores of cosae 0.1
    """

    folder: Path
    tag: ShardTag
    shape: ShardShape
    n_bytes: int
    sha256: str
    noise: float | None = None

    @classmethod
    def listed(cls, folder: Path, tag: ShardTag, entry: Mapping[str, Any], like: ShardShape) -> Shard:
        """The shard of an entry of an index or journal. Raises ValueError, KeyError or TypeError for no such entry."""
        rows, n_bytes, sha256 = entry["rows"], entry["bytes"], entry["sha256"]
        centred, noise = entry.get("centred", False), entry.get("noise")
        plain = isinstance(rows, int) and isinstance(n_bytes, int) and isinstance(sha256, str)
        plain &= isinstance(centred, bool) and isinstance(noise, float | None)
        if not plain or rows < 1 or entry["file"] != tag.file:
            raise ValueError("entry of a shard")
        return cls(folder, tag, replace(like, rows=rows, centred=centred), n_bytes, sha256, noise)

    def entry(self) -> dict[str, Any]:
        """What an index or journal lists."""
        tag = self.tag
        size = {"rows": self.shape.rows, "bytes": self.n_bytes}
        rounding = {"centred": self.shape.centred, "noise": self.noise}
        return {"file": tag.file, "side": tag.side, **size, "sha256": self.sha256, **rounding}

    @property
    def path(self) -> Path:
        return self.folder / self.tag.file

    def header_fault(self) -> str | None:
        """What is wrong as far as its size and header show; None where nothing is. Reads a page or two."""
        try:
            found = self.path.stat().st_size
            if found != self.n_bytes:
                return f"it has {found} bytes, not the {self.n_bytes} that were written"
            header, first = _read_header(self.path)
            tagged = parse_json(header.pop("__metadata__", {}).get(HEADER_KEY, "null"))
            laid_out = {name: (t["dtype"], t["shape"]) for name, t in header.items()}
            places = sorted(
                (int(begin), int(end), name) for name, t in header.items() for begin, end in [t["data_offsets"]]
            )
        except FileNotFoundError:
            return "it is missing"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return "its header is not readable"
        if tagged != asdict(self.tag):
            return f"it is another shard ({self._difference(tagged)})"
        if laid_out != self.shape.tensors():
            return "its header does not fit the index"
        last = 0  # each tensor begins where the one before it ends, and the last ends with the file
        for begin, end, name in places:
            kind, size = laid_out[name]
            if begin != last or end - begin != math.prod(size) * np.dtype(NUMPY_DTYPES[kind]).itemsize:
                return f"its header puts {name} where it does not belong"
            last = end
        return None if first + last == found else "its tensors do not fill it"

    def _difference(self, tagged: Any) -> str:
        if not isinstance(tagged, dict) or tagged.keys() != asdict(self.tag).keys():
            return "its header names none"
        if tagged["store"] != self.tag.store:
            return "of another store"
        return f"{str(tagged['side'])[:20]} number {str(tagged['number'])[:20]}"

    def content_fault(self) -> str | None:
        """What is wrong with its bytes, all of which are read; None where nothing is."""
        try:
            same = file_digest(self.path) == self.sha256
        except OSError as error:
            return f"it cannot be read ({error.strerror})"
        return None if same else "its checksum is not the one that was written: bits of it have changed"

    def map(self) -> MappedShard:
        """Its columns, for a shard without faults."""
        return MappedShard(self.path, self.shape)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where its data begin: 8 bytes of length, JSON, data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise ValueError("length of header")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("header")
    return header, 8 + length


class MappedShard:
    """A shard, memory-mapped: arrays by column. Views are read-only and must not outlive it."""

    def __init__(self, path: Path, shape: ShardShape) -> None:
        header, first = _read_header(path)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.column: dict[str, NDArray[Any]] = {}
        for name, (kind, size) in shape.tensors().items():
            begin, end = header[name]["data_offsets"]
            flat = np.frombuffer(self._map, np.uint8, end - begin, first + begin)
            self.column[name] = flat.view(NUMPY_DTYPES[kind]).reshape(size)

    def release(self) -> None:
        """Stop counting the pages read so far as this process's memory; they stay in the disk cache."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _moments(x_ND: Tensor, scale_N: Tensor | None, offset_D: Tensor | None, rows: int = 256) -> tuple[Tensor, Tensor]:
    """(D,) mean and (1,) Σ |x − mean|², float64. In blocks that stay in the cache, joined by Chan, Golub & LeVeque."""
    mean_D, squares, n = torch.zeros(x_ND.shape[1], dtype=torch.float64), 0.0, 0
    for first in range(0, len(x_ND), rows):
        scale = None if scale_N is None else scale_N[first : first + rows]
        block = restore_rows(x_ND[first : first + rows], scale, offset_D).to("cpu", torch.float64, copy=True)
        more = len(block)
        apart_D = block.mean(0)
        flat = block.sub_(apart_D).flatten()
        apart_D -= mean_D
        squares += float(flat.dot(flat)) + float(apart_D.dot(apart_D)) * (n * more / (n + more))
        mean_D += apart_D * (more / (n + more))
        n += more
    return mean_D, torch.tensor([squares], dtype=torch.float64)
