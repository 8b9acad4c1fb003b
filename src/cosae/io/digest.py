"""SHA-256 of files and of plain values, in hex."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def file_digest(path: Path) -> str:
    """Of a file's bytes. Read, not mapped: its pages do not count as this process's memory. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def value_digest(value: Any) -> str:
    """Of a plain value, as `canonical` writes it."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def canonical(value: Any) -> str:
    """The one JSON text of a plain value: ASCII, no spaces, keys in their own order. Raises ValueError for NaN."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
