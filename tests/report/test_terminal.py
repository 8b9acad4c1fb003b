"""Tables on screen: numbers by their formats, no wider than asked, and nothing in a name is obeyed."""

import pytest

from cosae.report.terminal import text_table

HEAD = ["arm", "FVE", "L0", "interval"]
ROWS = [["standard", 0.84, 32, "[+0.0164, +0.0415]"], ["a longer name", None, -3.25, "–"]]


def test_cells_line_up_under_their_heads():
    lines = text_table(HEAD, ROWS, title="run", notes=["a note"], formats=["", ".4f", ".1f"]).split("\n")
    assert lines == [
        "run",
        "arm               FVE    L0            interval",
        "standard       0.8400  32.0  [+0.0164, +0.0415]",
        "a longer name       -  -3.2                   -",
        "a note",
    ]


def test_a_table_without_head_is_aligned_as_asked():
    assert text_table([], [["!", 7], ["", "x"]], align="rl") == "!  7\n   x"


@pytest.mark.parametrize("width", [20, 30, 45])
def test_a_narrow_terminal_folds_and_cuts_nothing(width):
    shown = text_table(HEAD, ROWS, notes=["a note " * 9], formats=["", ".4f", ".1f"], width=width)
    assert max(map(len, shown.split("\n"))) <= width
    plain = text_table(HEAD, ROWS, notes=["a note " * 9], formats=["", ".4f", ".1f"])
    assert sorted(shown.replace("\n", " ").replace(" ", "")) == sorted(plain.replace("\n", " ").replace(" ", ""))


@pytest.mark.parametrize("name", ["[red]x[/red]", "[/]", ":smile:", "[link=file:///x]y[/link]"])
def test_names_are_not_markup(name):
    assert name in text_table(HEAD, [[name, 1.0, 2.0, ""]], title=name).split("\n")[0]


def test_what_does_not_print_is_replaced():
    shown = text_table(["a\x1b[2J"], [["b\nc"], ["d\u202ee"]], title="t\r", notes=["n\x07"])
    assert shown.split("\n") == ["t?", "a?[2J", "b?c", "d?e", "n?"]
