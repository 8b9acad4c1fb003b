"""The tokens of the pass, on disk, so that a window can be told of at the end: 9 bytes a token, and 5 an SAE."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Tokens:
    """Appended to as chunks come: id int32, document int32 and for each SAE flags uint8 and r float32 of every token;
    start int64 of every sequence; names of documents.

    count, sequences   tokens and sequences there are
    """

    def __init__(self, folder: Path, n_saes: int, count: int = 0, sequences: int = 0) -> None:
        """Go on after so many tokens and sequences; what a crash left behind them is dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        self.count, self.sequences = count, sequences
        kinds: dict[str, Any] = {"id": np.int32, "document": np.int32}
        kinds |= {f"{name}{i}": kind for i in range(n_saes) for name, kind in (("flags", np.uint8), ("r", np.float32))}
        self._kinds = {**kinds, "start": np.int64}
        self._paths = {name: folder / f"{name}.bin" for name in self._kinds}
        self._names = folder / "documents.jsonl"
        for name, path in self._paths.items():
            path.touch()
            with path.open("r+b") as file:
                file.truncate((sequences if name == "start" else count) * np.dtype(self._kinds[name]).itemsize)
        if not count:
            self._names.unlink(missing_ok=True)

    def add(self, columns: Mapping[str, Array], start_S: Array, documents: Mapping[int, str]) -> None:
        """One chunk more. Raises OSError."""
        for name, value in {**columns, "start": start_S}.items():
            with self._paths[name].open("ab") as file:
                file.write(np.ascontiguousarray(value, self._kinds[name]).tobytes())
        with self._names.open("a", encoding="utf-8") as lines:
            lines.writelines(f"{json.dumps([number, name])}\n" for number, name in documents.items())
        self.count += len(columns["id"])
        self.sequences += len(start_S)

    def open(self, name: str) -> Array:
        """A column, mapped."""
        path, kind = self._paths[name], self._kinds[name]
        if not path.stat().st_size:
            return np.zeros(0, kind)
        return np.memmap(path, kind, "r")

    def documents(self) -> dict[int, str]:
        """Names by number; of a document that was noted twice, the same name twice."""
        return dict(self._lines())

    def _lines(self) -> Iterator[tuple[int, str]]:
        if self._names.is_file():
            with self._names.open(encoding="utf-8") as lines:
                for line in lines:
                    if line.endswith("\n"):  # a crash may have torn the last one, which is written again
                        number, name = json.loads(line)
                        yield int(number), str(name)
