"""Tables for a terminal, through rich: whatever is shown on screen as rows and columns is laid out here."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cosae.io import escape
from cosae.report.format import MINUS, NONE

_ALIGN = {"l": "left", "r": "right"}


def text_table(
    head: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    title: str | Sequence[str] = (),
    notes: Sequence[str] = (),
    formats: Sequence[str] = (),
    align: str = "",
    width: int | None = None,
) -> str:
    """A table as text to print: its title, head and rows, and the notes below.

    title    a line above the table, or several, of which the first is bold
    head     one heading a column; empty for a table without headings
    rows     cells: text as it is, None as a dash, a number by its column's format
    formats  format specs such as ".3f" or "+.4f", one a column; "" or missing: as str() writes the number
    align    "l" or "r" a column; by default the first is left-aligned and all others are right-aligned
    width    columns of the terminal; by default the terminal's own, and no limit where standard output is none

    Where the table is wider than that, its widest cells fold; nothing is cut. Bold headings and title where standard
    output is a terminal, plain text elsewhere. Names and tokens cannot be taken for rich's markup or move the cursor:
    characters that do not print become "?", minus signs and dashes become hyphens.
    """
    styled = sys.stdout.isatty()
    console = Console(
        file=io.StringIO(), force_terminal=styled, width=width or (None if styled else 100_000),
        markup=False, emoji=False, highlight=False, soft_wrap=False,
    )  # fmt: skip
    n_columns = len(head) or max(map(len, rows), default=0)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(head), header_style="bold")
    for at in range(n_columns):
        side = align[at] if at < len(align) else "r" if at else "l"
        heading = Text(printable(head[at]) if head else "", overflow="fold")
        table.add_column(heading, justify=_ALIGN[side], overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        spec = [formats[at] if at < len(formats) else "" for at in range(len(row))]
        table.add_row(*(Text(_cell(value, form)) for value, form in zip(row, spec, strict=True)))
    for at, line in enumerate([title] if isinstance(title, str) else title):
        console.print(Text(printable(line), style="" if at else "bold"))
    console.print(table)
    for note in notes:
        console.print(Text(printable(note)))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _cell(value: object, form: str) -> str:
    if value is None:
        return "-"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return printable(format(value, form) if number else str(value))


def printable(words: str) -> str:
    """Without characters that a terminal would obey; minus signs and dashes as hyphens."""
    return escape.printable(words.replace(MINUS, "-").replace(NONE, "-"))
