"""Notes, tags and bookmarks of features, in a SQLite file beside the store; several servers may write at once.

A write names the version that it was made from: who comes second is told, and overwrites nobody.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError

LONGEST_NOTE, LONGEST_TAG, MOST_TAGS = 20_000, 80, 40
_TABLE = """CREATE TABLE IF NOT EXISTS notes (sae TEXT NOT NULL, feature INTEGER NOT NULL, note TEXT NOT NULL,
tags TEXT NOT NULL, bookmark INTEGER NOT NULL, version INTEGER NOT NULL, changed TEXT NOT NULL,
PRIMARY KEY (sae, feature))"""


@dataclass(frozen=True)
class Note:
    """What somebody wrote about a feature. version counts its writes; 0 where there was none."""

    sae: str
    feature: int
    note: str = ""
    tags: tuple[str, ...] = ()
    bookmark: bool = False
    version: int = 0
    changed: str = ""

    def check(self) -> None:
        """Raises CosaeError for values that are not allowed."""
        if len(self.note) > LONGEST_NOTE:
            raise CosaeError(f"a note holds at most {LONGEST_NOTE:,} characters. Got {len(self.note):,}: shorten it.")
        if len(self.tags) > MOST_TAGS or any(not tag or len(tag) > LONGEST_TAG for tag in self.tags):
            raise CosaeError(f"a feature has at most {MOST_TAGS} tags, of 1 to {LONGEST_TAG} characters each.")


class NoteConflictError(CosaeError):
    """Somebody else wrote in between; `found` is what stands there now."""

    def __init__(self, found: Note) -> None:
        super().__init__("this note was changed elsewhere in the meantime: read what it says now, then save again.")
        self.found = found


@dataclass(frozen=True)
class Notes:
    """The file; it is made with the first note."""

    path: Path

    def of(self, sae: str, feature: int) -> Note:
        """What was written about a feature; an empty note where nothing was."""
        rows = self._rows("WHERE sae = ? AND feature = ?", (sae, feature))
        return rows[0] if rows else Note(sae, feature)

    def every(self, sae: str | None = None) -> list[Note]:
        """All notes, by SAE and feature; of one SAE where it is named."""
        ordered = "ORDER BY sae, feature"
        return self._rows(ordered, ()) if sae is None else self._rows(f"WHERE sae = ? {ordered}", (sae,))

    def write(self, note: Note) -> Note:
        """Put a note in the place of the version it names; returns it with its new version.

        Raises NoteConflictError where that version is not the one that stands there.
        """
        note.check()
        with self._open() as file:
            file.execute("BEGIN IMMEDIATE")
            file.execute(_TABLE)
            before = self._read(file, "WHERE sae = ? AND feature = ?", (note.sae, note.feature))
            now = before[0] if before else Note(note.sae, note.feature)
            if now.version != note.version:
                file.execute("ROLLBACK")
                raise NoteConflictError(now)
            changed = datetime.now(UTC).isoformat(timespec="seconds")
            tags = json.dumps(list(dict.fromkeys(note.tags)))
            row = note.sae, note.feature, note.note, tags, int(note.bookmark), note.version + 1, changed
            file.execute("INSERT OR REPLACE INTO notes VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            file.execute("COMMIT")
        return self.of(note.sae, note.feature)

    def exported(self) -> dict[str, Any]:
        """All notes as plain values."""
        return {"format": "cosae notes", "notes": [asdict(note) for note in self.every()]}

    def _rows(self, where: str, values: tuple[Any, ...]) -> list[Note]:
        if not self.path.exists():
            return []
        with self._open() as file:
            return self._read(file, where, values)

    @staticmethod
    def _read(file: sqlite3.Connection, where: str, values: tuple[Any, ...]) -> list[Note]:
        if not file.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'notes'").fetchall():
            return []
        names = "sae, feature, note, tags, bookmark, version, changed"
        rows = file.execute(f"SELECT {names} FROM notes {where}", values).fetchall()
        return [Note(s, f, n, tuple(map(str, json.loads(tags))), bool(b), v, c) for s, f, n, tags, b, v, c in rows]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=20, isolation_level=None)) as file:
                yield file
        except (sqlite3.Error, UnicodeError, json.JSONDecodeError) as error:
            raise CosaeError(f"the notes in {self.path} cannot be read or written ({error}).") from None
