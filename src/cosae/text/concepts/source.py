"""Python source → its tree and its tokens, all placed by character offsets.

Enters: the text of one document. Leaves: `Source`, which turns what `ast` and `tokenize` say into characters.

Three traps are handled here and nowhere else:
- `ast` columns are UTF-8 bytes, `tokenize` columns are characters.
- Lines end at \\n, \\r\\n or \\r only; `str.splitlines` also splits at form feeds and would shift the rest.
- Python 3.12 changed how f-strings are tokenised and where their inner nodes lie. So an f-string is one token
  here whatever runs, and `fstring_fields` finds its replacement fields in the text.
"""

from __future__ import annotations

import ast
import re
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

Span = tuple[int, int]
Regions = defaultdict[str, list[Span]]
"""Character spans [start, end) by region name; spans of one name may overlap."""

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n|\Z)")
_FSTRING_STARTS = {getattr(tokenize, name, None) for name in ("FSTRING_START", "TSTRING_START")} - {None}
_FSTRING_ENDS = {getattr(tokenize, name, None) for name in ("FSTRING_END", "TSTRING_END")} - {None}
_QUOTES = re.compile(r"'''|\"\"\"|'|\"")


class Word(NamedTuple):
    """One token of the source: kind is a number of the token module; an f-string is one STRING."""

    kind: int
    text: str
    start: int
    end: int


class Source:
    """A text with its tree and its tokens.

    Raises SyntaxError, ValueError, RecursionError, MemoryError or tokenize.TokenError where the text is not
    Python of the version that runs.
    """

    def __init__(self, text: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources are not our business
            self.tree = ast.parse(text)
        self.text = text
        self.lines = [match.group() for match in _LINE.finditer(text) if match.group()]
        self.line_start = [0]
        for line in self.lines:
            self.line_start.append(self.line_start[-1] + len(line))
        self._bytes_of_line = {n: line.encode() for n, line in enumerate(self.lines, 1) if not line.isascii()}
        self.words = tuple(self._words())

    def start(self, node: ast.AST) -> int:
        """Character offset of the node's first character."""
        return self._from_bytes(node.lineno, node.col_offset)  # type: ignore[attr-defined]

    def end(self, node: ast.AST) -> int:
        """Character offset just past the node's last character."""
        return self._from_bytes(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def span(self, node: ast.AST) -> Span:
        """Both ends of the node, in characters."""
        return self.start(node), self.end(node)

    def _from_bytes(self, line: int, column: int) -> int:
        encoded = self._bytes_of_line.get(line)
        if encoded is not None:
            column = len(encoded[:column].decode(errors="replace"))
        return self.line_start[line - 1] + column

    def _place(self, line: int, column: int) -> int:
        return min(self.line_start[min(line - 1, len(self.lines))] + column, len(self.text))

    def _words(self) -> Iterator[Word]:
        lines = iter([line[:-1] + "\n" if line.endswith("\r") else line for line in self.lines])
        depth, opened = 0, 0
        for kind, text, start, end, _ in tokenize.generate_tokens(lambda: next(lines, "")):
            first, last = self._place(*start), self._place(*end)
            if kind in _FSTRING_STARTS:
                opened = opened if depth else first
                depth += 1
            elif kind in _FSTRING_ENDS:
                depth -= 1
                if not depth:
                    yield Word(tokenize.STRING, self.text[opened:last], opened, last)
            elif not depth:
                yield Word(kind, text, first, last)


def fstring_fields(text: str, start: int, end: int, raw: bool) -> list[Span]:
    """The outermost replacement fields, braces included, of an f-string whose contents are text[start:end].

    raw is True for rf-strings, in which \\N{...} is a field and not the name of a character.
    """
    fields, at = [], start
    while at < end:
        if not raw and text.startswith("\\N{", at):
            at = text.index("}", at) + 1
        elif text.startswith(("{{", "}}"), at) or (not raw and text[at] == "\\" and text[at + 1] not in "{}"):
            at += 2
        elif text[at] == "{":
            close = _field_end(text, at, end)
            fields.append((at, close))
            at = close
        else:
            at += 1
    return fields


def _field_end(text: str, at: int, end: int) -> int:
    """Just past the } that closes the field opened at text[at]: quotes and brackets count in the expression
    before the colon, only nested fields count in the format after it."""
    brackets, in_format, at = 0, False, at + 1
    while at < end:
        quote = None if in_format else _QUOTES.match(text, at)
        if quote:  # a string inside the expression: skip to its own end
            at = text.find(quote.group(), quote.end(), end)
            at = end if at < 0 else at + len(quote.group())
        elif text[at] == "{" and in_format:
            at = _field_end(text, at, end)
        elif text[at] == "}" and not brackets:
            return at + 1
        else:
            if not in_format:
                brackets += (text[at] in "([{") - (text[at] in ")]}")
                in_format = text[at] == ":" and not brackets
            at += 1
    return end
