"""Notes beside a store: versions, two writers at once, and what is refused."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cosae.browse.server.notes import Note, NoteConflictError, Notes
from cosae.errors import CosaeError


def test_a_note_is_found_again_with_its_tags_and_bookmark(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "store.notes.sqlite")
    assert notes.of("a", 3) == Note("a", 3)
    assert notes.every() == []
    assert not notes.path.exists(), "looking makes no file"
    written = notes.write(Note("a", 3, "fires on <b>numbers</b> \u202e", ("number", "number", "x, y"), True))
    assert (written.version, written.tags) == (1, ("number", "x, y"))
    notes.write(Note("a/b", 3, "another SAE"))
    again = Notes(notes.path)
    assert again.of("a", 3) == written
    assert [note.sae for note in again.every()] == ["a", "a/b"]
    assert again.every("a") == [written]
    exported = again.exported()["notes"]
    assert exported[0]["note"] == written.note
    assert exported[0]["changed"] == written.changed > "2020"


def test_who_comes_second_overwrites_nobody(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes")
    first = notes.write(Note("a", 1, "mine"))
    with pytest.raises(NoteConflictError, match="changed elsewhere") as refused:
        notes.write(Note("a", 1, "theirs", version=0))
    assert refused.value.found == first
    assert notes.write(Note("a", 1, "both", version=first.version)).version == 2


def test_many_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "notes"

    def add(number: int) -> int:
        notes = Notes(path)  # as a server of its own
        for tries in range(1000):
            now = notes.of("a", 0)
            try:
                notes.write(Note("a", 0, now.note + f"{number} ", version=now.version))
            except NoteConflictError:
                continue
            return tries
        raise AssertionError("never came in")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(16)))
    found = Notes(path).of("a", 0)
    assert sorted(map(int, found.note.split())) == list(range(16))
    assert found.version == 16


def test_what_is_refused(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes")
    with pytest.raises(CosaeError, match="at most 20,000 characters"):
        notes.write(Note("a", 1, "x" * 20_001))
    with pytest.raises(CosaeError, match="tags"):
        notes.write(Note("a", 1, tags=("",)))
    assert not notes.path.exists()
    notes.path.write_text("no database, but long enough to be looked at")
    with pytest.raises(CosaeError, match="cannot be read"):
        notes.every()
    absent = Notes(tmp_path / "nowhere" / "notes")
    with pytest.raises(CosaeError, match="cannot be read"):
        absent.write(Note("a", 1))


def test_a_database_of_something_else_holds_no_notes(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "notes") as file:
        file.execute("CREATE TABLE others (x)")
    file.close()
    assert Notes(tmp_path / "notes").every() == []
