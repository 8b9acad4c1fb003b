"""Strings of others (names, metadata, tokens) where a reader would obey them: a terminal, Markdown, a page.

HTML itself is escaped by Jinja2 and MarkupSafe. What is JSON, as in Neuronpedia's batches, is left as it is.
"""

from __future__ import annotations

import re

_PLAIN = re.compile(r"\w(?:[\w ,/+…-]|\.(?=\d))*")
_EMPHASIS = re.compile(r"\b_|_\b")


def printable(text: str, keep: str = "") -> str:
    """Without characters that move a cursor, change colours or the direction of writing: "?" stands for each.

    Other spaces than the plain one become that. `keep` names characters that may stay, such as a line's end.
    """
    return "".join(c if c.isprintable() or c in keep else " " if c.isspace() and c > "\x7f" else "?" for c in text)


def markdown(text: object, length: int = 200) -> str:
    """One line that Markdown shows as it is: bare where it holds nothing but words, else a code span.

    In a code span no renderer sees links, images, HTML, mathematics or addresses; backslashes would not keep all of
    them from links. Pipes are escaped as tables want it.
    """
    line = _line(text, length)
    return line if _PLAIN.fullmatch(line) and not _EMPHASIS.search(line) else code_span(line, length)


def code_span(text: object, length: int = 200) -> str:
    """One line as a Markdown code span that nothing in it can end, in a table either."""
    line = _line(text, length) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    room = " " if line.startswith("`") or line.endswith("`") else ""
    inside = re.sub(r"(\\*)\|", lambda found: found[1] + " " * bool(found[1]) + r"\|", line)
    return f"{fence}{room}{inside}{room}{fence}"


def _line(text: object, length: int) -> str:
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= length else line[: length - 1] + "…"
