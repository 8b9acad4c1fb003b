"""Text and plain values become typed values, and back."""

from dataclasses import dataclass
from typing import Literal

import pytest

from cosae.errors import CosaeError
from cosae.io.values import from_plain, from_text, literal, to_plain


@dataclass(frozen=True)
class Inner:
    size: int
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    inner: Inner
    mode: Literal["a", "b"] = "a"
    widths: tuple[int, ...] = ()
    limit: int | None = None
    batch: int | Literal["auto"] = 1


def test_dataclasses_round_trip() -> None:
    value = Outer(Inner(3, 1.0), "b", (1, 2), 7, "auto")
    assert from_plain(Outer, to_plain(value), "it") == value
    assert from_plain(Outer, {"inner": {"size": 2.0, "rate": 1}}, "it") == Outer(Inner(2, 1.0))


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ([], "mapping"),
        ({"inner": {"size": 1}, "size": 2}, "'size'"),
        ({"inner": {}}, r"it\.inner .*'size'"),
        ({"inner": {"size": 1.5}}, r"it\.inner\.size .*int"),
        ({"inner": {"size": True}}, r"it\.inner\.size .*int"),
        ({"inner": {"size": 1}, "mode": "c"}, "a, b"),
        ({"inner": {"size": 1}, "widths": 3}, "list"),
        ({"inner": {"size": 1}, "widths": [1, "x"]}, r"widths\[1\]"),
    ],
)
def test_wrong_plain_values_are_named(plain: object, message: str) -> None:
    with pytest.raises(CosaeError, match=message):
        from_plain(Outer, plain, "it")


def test_text_becomes_what_the_hint_says() -> None:
    assert from_text(int | None, "12", "it") == 12
    assert from_text(float, "1e-3", "it") == 1e-3
    assert from_text(bool, "False", "it") is False
    assert from_text(tuple[int, ...], "256+1024", "it") == (256, 1024)
    assert from_text(str | None, "x", "it") == "x"
    for hint, text, message in ((int, "1.5", "whole"), (float, "x", "number"), (bool, "1", "true, false")):
        with pytest.raises(CosaeError, match=message):
            from_text(hint, text, "it")


def test_literals() -> None:
    texts = ("1", "true", "null", "[1, 2]", "1e-3", "word")
    assert [literal(text) for text in texts] == [1, True, None, [1, 2], 1e-3, "word"]
