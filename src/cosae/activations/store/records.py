"""JSON records that notice when a bit of them has changed.

A file holds {"sha256": …, "record": …} in one fixed spelling. Whatever differs from that spelling, or from the digest,
is refused. Written under a hidden name, flushed, then renamed: the file is whole, or what it was before.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cosae.activations.store.shards import flush
from cosae.errors import CosaeError


def spell(record: dict[str, Any]) -> str:
    """The one spelling of a record: plain ASCII, keys in their own order."""
    return json.dumps(record, allow_nan=False, separators=(",", ":"))


def digest(record: dict[str, Any]) -> str:
    """SHA-256 of a record, in hex."""
    return hashlib.sha256(spell(record).encode()).hexdigest()


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record. Raises OSError where the disk refuses."""
    staged = path.with_name(f".{path.name}.partial")
    try:
        staged.write_text(_render(record), encoding="ascii")
        flush(staged)
        staged.replace(path)
        flush(path.parent)
    except OSError:
        staged.unlink(missing_ok=True)
        raise


def read_record(path: Path) -> dict[str, Any]:
    """The record in a file. Raises CosaeError where it is not to the bit what `write_record` wrote."""
    try:
        text = path.read_text(encoding="ascii")
        record = json.loads(text)["record"]
        whole = isinstance(record, dict) and text == _render(record)
    except OSError as error:
        raise CosaeError(f"{path} cannot be read ({error.strerror}); check the path.") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise CosaeError(f"{path} is damaged: it is not what was written; put back a copy of it.")
    assert isinstance(record, dict)
    return record


def _render(record: dict[str, Any]) -> str:
    return f'{{"sha256":"{digest(record)}",\n"record":{spell(record)}}}\n'
