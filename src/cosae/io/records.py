"""JSON records that notice when a bit of them has changed.

A file holds {"sha256": …, "record": …} in one canonical text. Whatever differs from it, or from the digest, is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cosae.errors import CosaeError
from cosae.io.atomic import write_text
from cosae.io.digest import canonical, value_digest
from cosae.io.untrusted import parse_json, read_text

MAX_BYTES = 2**30
"""An index holds the names of all documents."""


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record in one step. Raises OSError where the disk refuses."""
    write_text(path, _render(record))


def read_record(path: Path) -> dict[str, Any]:
    """The record in a file. Raises CosaeError where it is not to the bit what `write_record` wrote."""
    try:
        text = read_text(path, MAX_BYTES)
        record = parse_json(text, most=MAX_BYTES)["record"]
        if isinstance(record, dict) and text == _render(record):
            return record
    except OSError as error:
        raise CosaeError(f"{path} cannot be read ({error.strerror}); check the path.") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise CosaeError(f"{path} is damaged: it is not what was written; put back a copy of it.")


def _render(record: dict[str, Any]) -> str:
    return f'{{"sha256":"{value_digest(record)}",\n"record":{canonical(record)}}}\n'
