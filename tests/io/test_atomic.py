"""Files that others write: what was there stays until the new ones stand, and comes back after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosae.errors import sentences
from cosae.io.atomic import kept_until_new


def test_what_was_there_comes_back_where_the_new_does_not_stand(tmp_path: Path) -> None:
    old, never = tmp_path / "old.json", tmp_path / "never.json"
    old.write_text("1")

    def half_done() -> None:
        with kept_until_new([old, never]):
            assert not old.exists()
            old.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_done()
    assert old.read_text() == "1"
    with kept_until_new([old, never]):
        old.write_text("2")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert old.read_text() == "2"


def test_what_a_kill_left_aside_comes_back(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    (tmp_path / ".old.json.previous").write_text("1")
    old.write_text("half of what was killed")
    with pytest.raises(ValueError, match="again"), kept_until_new([old]):
        raise ValueError("again")
    assert old.read_text() == "1"


def test_sentences_do_not_run_together() -> None:
    assert sentences("check the filter", "Saved up to 3") == "check the filter. Saved up to 3."
    assert sentences("Gone!", "", "Is it?") == "Gone! Is it?"
