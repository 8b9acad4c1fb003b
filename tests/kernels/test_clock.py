"""The clock: each contestant timed once, remembered between processes, and worth nothing but time where damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cosae.kernels.select import clock
from cosae.kernels.select.clock import ROUNDS, Clock


class Hands:
    """A clock that only its contestants move."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, dict.fromkeys(("slow", "fast", "hopeless", "broken"), 0)

    def __call__(self) -> float:
        return self.now

    def taking(self, name: str, *seconds: float) -> Callable[[], None]:
        def call() -> None:
            turn = self.calls[name]
            self.calls[name] += 1
            if name == "broken":
                raise RuntimeError("this processor cannot")
            self.now += seconds[min(turn, len(seconds) - 1)]

        return call

    def all(self) -> dict[str, Callable[[], None]]:
        times = {"slow": (9.0, 2.0, 4.0, 3.0), "fast": (5.0, 1.0), "hopeless": (8.0, 8.0), "broken": (1.0,)}
        return {name: self.taking(name, *seconds) for name, seconds in times.items()}


def test_the_shortest_call_counts_but_never_the_first(tmp_path: Path) -> None:
    """What raises is left out, and what has no chance is not called again."""
    hands = Hands()
    found = Clock(hands, tmp_path / "kernels.json").seconds("a shape", hands.all())
    assert found == {"slow": 2.0, "fast": 1.0, "hopeless": 8.0}
    assert hands.calls == {"slow": ROUNDS + 1, "fast": ROUNDS + 1, "hopeless": 2, "broken": 1}


def test_what_was_timed_is_remembered_for_the_shape_the_torch_and_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "deep" / "kernels.json"
    hands = Hands()
    first = Clock(hands, file).seconds("a shape", hands.all())
    later = Clock(hands, file)
    assert later.seconds("a shape", hands.all()) == first
    assert hands.calls["fast"] == ROUNDS + 1
    later.seconds("another", hands.all())
    monkeypatch.setattr(torch, "__version__", "9.9")
    later.seconds("a shape", hands.all())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    later.seconds("a shape", hands.all())
    assert hands.calls["fast"] == 4 * (ROUNDS + 1)
    assert len(json.loads(file.read_text(encoding="utf-8"))) == 4


DAMAGED = (
    *("", "{", "[1]", "null", '{"%s": 3}', '{"%s": {}}', '{"%s": {"fast": -1, "slow": 1}}'),
    *('{"%s": {"fast": "1"}}', '{"%s": {"fast": true}}', '{"%s": {"other": 1.0}}'),
)


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_is_timed_again_and_replaced(text: str, tmp_path: Path) -> None:
    file, hands = tmp_path / "kernels.json", Hands()
    Clock(hands, file).seconds("a shape", hands.all())
    (key,) = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(text.replace("%s", key), encoding="utf-8")
    assert Clock(hands, file).seconds("a shape", hands.all())["fast"] == 1.0
    assert hands.calls["fast"] == 2 * (ROUNDS + 1)
    assert json.loads(file.read_text(encoding="utf-8"))[key]["fast"] == 1.0


def test_a_file_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    hands = Hands()
    one = Clock(hands, tmp_path / "file" / "kernels.json")
    assert one.seconds("a shape", hands.all()) == one.seconds("a shape", hands.all())
    assert hands.calls["fast"] == ROUNDS + 1


def test_the_file_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    monkeypatch.setattr("sys.platform", "linux")
    assert clock.default_file() == Path("/elsewhere/cosae/kernels.json")
