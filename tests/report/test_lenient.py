"""JSON as records: what fits is read, what does not is left at its default, and nothing raises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from cosae.report.lenient import read_record


@dataclass(frozen=True)
class Inner:
    value: float | None = None


@dataclass(frozen=True)
class Outer:
    number: float | None = None
    whole: int | None = None
    flag: bool | None = None
    word: str = "none"
    inner: Inner = field(default_factory=Inner)
    perhaps: Inner | None = None
    finite: tuple[float, ...] = ()
    places: tuple[float | None, ...] = ()
    records: tuple[Inner, ...] = ()
    by_name: Mapping[str, Inner] = field(default_factory=dict)
    either: Mapping[str, Inner] | Inner = field(default_factory=Inner)
    free: Mapping[str, Any] = field(default_factory=dict)


def test_what_fits_is_read():
    value = {
        "number": 3, "whole": 4, "flag": False, "word": "w", "inner": {"value": 1.5}, "perhaps": {"value": 2},
        "finite": [1, None, "x", 2], "places": [1, None, "x", 2], "records": [{"value": 1}, 7, {"value": 2}],
        "by_name": {"a": {"value": 1}, "b": None}, "free": {"a": None, "b": [1]}, "unknown": 1,
    }  # fmt: skip
    assert read_record(Outer, value) == Outer(
        3.0, 4, False, "w", Inner(1.5), Inner(2.0), (1.0, 2.0), (1.0, None, None, 2.0),
        (Inner(1.0), Inner(), Inner(2.0)), {"a": Inner(1.0)}, Inner(), {"a": None, "b": [1]},
    )  # fmt: skip


def test_a_field_of_two_shapes():
    assert read_record(Outer, {"either": {"value": 1}}).either == Inner(1.0)
    assert read_record(Outer, {"either": {"a": {"value": 1}}}).either == {"a": Inner(1.0)}


@pytest.mark.parametrize("odd", [None, True, 1.5, float("nan"), "text", [], [[]], {}, {"a": None}, {"value": []}])
def test_what_does_not_fit_is_left_out(odd):
    assert read_record(Inner, odd) == Inner()
    for name in Outer.__dataclass_fields__:
        read_record(Outer, {name: odd})
    assert read_record(Outer, {"number": float("inf"), "whole": True, "word": 3, "flag": 1}) == Outer()
