"""Objects that say what they are: one line in Python, a small table in a notebook.

Some of it comes from files that strangers wrote: text is escaped, characters that do not print are spelled out, and
long values are cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

MOST_CHARACTERS = 120


class Shown:
    """`repr` and `_repr_html_` from `_summary`."""

    def _summary(self) -> Mapping[str, object]:
        """Name → value of what a reader wants to know, the most important first; None is left out."""
        raise NotImplementedError

    def __repr__(self) -> str:
        known = ((name, value) for name, value in self._summary().items() if value is not None)
        return f"{type(self).__name__}({', '.join(f'{name}={in_words(value, True)}' for name, value in known)})"

    def _repr_html_(self) -> str:
        known = [(name, value) for name, value in self._summary().items() if value is not None]
        return html_table(type(self).__name__, known)


def in_words(value: object, quoted: bool = False) -> str:
    """A value in one short line: floats with three significant digits, text `quoted` or bare."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, str):
        text = spelled_out(value)
        text = text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"
        return f"'{text}'" if quoted else text
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{in_words(k)}: {in_words(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(in_words(item, quoted) for item in value)}]"
    return in_words(repr(value))


def spelled_out(text: str) -> str:
    """The text in one line that moves no terminal's cursor: control characters as their escapes, \\n for a newline."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def html_table(caption: str, rows: Sequence[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Rows as an HTML table, everything escaped; the first cell of a row is its heading."""
    lines = [f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>"] if head else []
    for first, *rest in rows:
        cells = "".join(f"<td style='text-align:left'>{escape(in_words(value))}</td>" for value in rest)
        lines.append(f"<tr><th style='text-align:left'>{escape(in_words(first))}</th>{cells}</tr>")
    return f"<table><caption>{escape(in_words(caption))}</caption>{''.join(lines)}</table>"


def counted(number: int, what: str) -> str:
    """A number with its noun: 1 document, 12,000 documents, 2 batches."""
    ending = "" if number == 1 else "es" if what.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{number:,} {what}{ending}"
