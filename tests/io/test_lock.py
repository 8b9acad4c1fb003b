"""The lock of a folder: one holder at a time, also across the removal of its file."""

from __future__ import annotations

import os
from pathlib import Path

import filelock
import pytest

from cosae.errors import CosaeError
from cosae.io.lock import LOCK, hold


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    with hold(tmp_path), pytest.raises(CosaeError, match="this very process"), hold(tmp_path):
        pass
    with hold(tmp_path):
        pass


@pytest.mark.skipif(os.name != "posix", reason="elsewhere an open file cannot be removed")
def test_who_opened_a_lock_that_was_then_removed_does_not_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture removes its lock when it ends; a second process may have opened that very file just before."""
    opened, place = os.open, tmp_path / LOCK
    places: list[int] = []

    def slow_open(path: object, *options: object, **more: object) -> int:
        handle = opened(path, *options, **more)  # type: ignore[arg-type]
        if str(path) == str(place) and not places:
            places.append(handle)
            place.unlink()  # the other process ends between our open and our lock
        return handle

    place.touch()
    monkeypatch.setattr(os, "open", slow_open)
    lock = filelock.FileLock(place, timeout=2)
    with lock:
        assert places
        assert place.exists()  # the lock is on the file that everybody finds
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(place, blocking=False).acquire()
