"""Phases: their names, counts and what is left, by a clock that the test sets; and how they end."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from cosae.io.progress import Progress
from cosae.io.signals import StopAsked, stop_on_signals
from tests.support.clock import FakeClock


def test_a_phase_is_named_counted_and_says_what_is_left_once_it_has_two_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = FakeClock()
    progress = Progress(clock=clock)
    with progress.phase("loading model"):
        clock.now = 100.0
    with progress.phase("first window", 65536):
        for now, rows in ((130.0, 8192), (132.0, 4096), (160.0, 4096), (161.0, 4096)):
            clock.now = now
            progress.advance(rows)
    assert capsys.readouterr().err.splitlines() == [
        "loading model",
        "first window (0 of 65k tokens)",
        "first window (8192 of 65k tokens)",  # its rate is not known: it may carry anything
        "first window (16k of 65k tokens), about 3 min left",  # 8192 tokens in 30 s
    ]


def test_a_phase_within_another_counts_for_itself(capsys: pytest.CaptureFixture[str]) -> None:
    clock = FakeClock()
    progress = Progress(clock=clock)
    with progress.phase("measuring reconstruction"), progress.phase("encoding tokens", 300):
        for _ in progress.each([1, 2], "probing", "SAEs"):
            progress.rows(100)  # no tokens are counted here
        clock.now = 20.0
        progress.reached(200)
        progress.rows(200)  # read ahead: no more than there are
    assert capsys.readouterr().err.splitlines() == [
        "measuring reconstruction",
        "encoding tokens (0 of 300 tokens)",
        "probing (0 of 2 SAEs)",
        "encoding tokens (200 of 300 tokens)",
    ]


def test_nothing_is_said_where_nothing_is_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(shown=False)
    with progress.phase("first window", 10):
        progress.advance(10)
    progress.note("hello")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    clock = FakeClock()
    progress = Progress(clock=clock)
    with progress.phase("filling buffer", 100_000):
        for clock.now in (20.0, 40.0):
            progress.advance(30_000)
        progress.note("a line of its own")
    seen = capsys.readouterr().err
    assert "filling buffer (60k of 100k tokens), about 27 s left |" in seen
    assert "a line of its own" in seen


def test_a_signal_stops_a_phase_at_once_or_where_data_are_read() -> None:
    progress = Progress(shown=False)
    with stop_on_signals() as progress.stop:
        os.kill(os.getpid(), signal.SIGTERM)
        progress.advance()  # while there is something to save, whoever saves looks for itself
        with pytest.raises(StopAsked):
            progress.rows(1)
    with stop_on_signals(at_once=KeyboardInterrupt("at once")) as progress.stop:
        with pytest.raises(KeyboardInterrupt, match="at once"):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match="at once"), progress.phase("first window"):
            pass  # should the first have been lost on its way
