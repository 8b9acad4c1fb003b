"""Tokens of Python source → regions: names, operators, strings, comments, lines, blocks and brackets.

Each function below looks at one kind of thing; `table.CONCEPTS` says what every region means.
"""

from __future__ import annotations

import keyword
import re
import tokenize

from cosae.text.concepts.source import Regions, Source, Word, fstring_fields

_KEYWORDS = {
    **{f"keyword_{word}": word for word in ("def", "class", "return", "if", "for", "in", "not", "is", "import")},
    **{f"keyword_{word}": word for word in ("from", "raise", "while", "try")},
    "keyword_elif_else": "elif else",
    "keyword_and_or": "and or",
    "keyword_except_finally": "except finally",
    "keyword_with_as": "with as",
    "keyword_break_continue_pass": "break continue pass",
    "keyword_async_yield_lambda": "async await yield lambda",
    "keyword_assert_del_global": "assert del global nonlocal",
    "boolean": "True False",
    "none": "None",
}
_OPERATORS = {
    "open_parenthesis": "(",
    "close_parenthesis": ")",
    "comma": ",",
    "colon": ":",
    "dot": ".",
    "assign_operator": "=",
    "square_bracket": "[ ]",
    "brace": "{ }",
    "comparison_operator": "== != < > <= >=",
    "arithmetic_operator": "+ - * / // % **",
    "bitwise_operator": "& | ^ ~ << >>",
    "augmented_operator": "+= -= *= /= //= %= **= &= |= ^= <<= >>= @=",
}
_REGION_OF_KEYWORD = {word: region for region, words in _KEYWORDS.items() for word in words.split()}
_REGION_OF_OPERATOR = {sign: region for region, signs in _OPERATORS.items() for sign in signs.split()}
# Fixed here, not read from the interpreter, so that labels do not depend on its version.
_BUILTIN_NAMES = """
abs all any bool bytes bytearray callable classmethod dict dir enumerate filter float format frozenset getattr
hasattr hash id int isinstance issubclass iter len list map max min next object open ord print property range
repr reversed set setattr sorted staticmethod str sum super tuple type vars zip
"""
_NAME_SHAPES = (
    ("name_dunder", re.compile(r"__\w+__$")),
    ("name_private", re.compile(r"_(?!_)\w+$")),
    ("name_constant", re.compile(r"_*[A-Z][A-Z0-9_]+$")),
    ("name_capitalised", re.compile(r"[A-Z]+[a-z0-9]\w*$")),
    ("name_error", re.compile(r"[A-Z]\w*(?:Error|Exception|Warning)$")),
    ("name_self", re.compile(r"(?:self|cls)$")),
    ("name_builtin", re.compile(rf"(?:{'|'.join(_BUILTIN_NAMES.split())})$")),
    ("name_one_letter", re.compile(r".$")),
)
_STRING_OPENING = re.compile(r"([A-Za-z]*)('''|\"\"\"|'|\")")
_NEWLINES = re.compile(r"\r\n|\r|\n")
_BLANK_LINES = re.compile(r"(?<=[\r\n])[ \t\f]*[\r\n]+")
_NO_STATEMENT = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
_DEPTHS = 4


def paint_tokens(source: Source, regions: Regions) -> None:
    """Add every region of this module to `regions`."""
    _paint_words(source.words, regions)
    _paint_lines(source, regions)
    _paint_blocks(source, regions)
    _paint_brackets(source.words, regions)


def _paint_words(words: tuple[Word, ...], regions: Regions) -> None:
    """Names, numbers, operators and strings."""
    shapes_of: dict[str, list[str]] = {}
    for word in words:
        kind, text, start, end = word
        if kind == tokenize.NAME:
            if text not in shapes_of:
                shapes_of[text] = _name_regions(text)
                if not keyword.iskeyword(text):
                    regions["first_mention"].append((start, end))
            for name in shapes_of[text]:
                regions[name].append((start, end))
        elif kind == tokenize.NUMBER:
            regions["number"].append((start, end))
        elif kind == tokenize.OP and text in _REGION_OF_OPERATOR:
            regions[_REGION_OF_OPERATOR[text]].append((start, end))
        elif kind == tokenize.STRING:
            _paint_string(word, regions)


def _name_regions(text: str) -> list[str]:
    if keyword.iskeyword(text):
        return [_REGION_OF_KEYWORD[text]] if text in _REGION_OF_KEYWORD else []
    return [name for name, shape in _NAME_SHAPES if shape.match(text)]


def _paint_string(word: Word, regions: Regions) -> None:
    _, text, start, end = word
    opening = _STRING_OPENING.match(text)
    if opening is None:
        return
    prefix, quote = opening.group(1).lower(), opening.group(2)
    inner, close = start + opening.end(), end - len(quote)
    regions["string"].append((start, end))
    regions["string_quote"] += [(start, inner), (close, end)]
    for letter, name in (("b", "bytes_string"), ("r", "raw_string"), ("f", "f_string")):
        if letter in prefix:
            regions[name].append((start, end))
    if "f" in prefix:
        fields = fstring_fields(text, inner - start, close - start, "r" in prefix)
        regions["f_string_field"] += [(start + first, start + last) for first, last in fields]


def _paint_lines(source: Source, regions: Regions) -> None:
    """Comments, newlines, and where statements begin."""
    in_statement = False
    for kind, _, start, end in source.words:
        if kind == tokenize.COMMENT:
            regions["comment_hash"].append((start, start + 1))
            regions["comment"].append((start, end))
            before = source.text[source.text.rfind("\n", 0, start) + 1 : start]
            regions["trailing_comment" if before.strip() else "comment_line"].append((start, end))
        if kind == tokenize.NEWLINE:
            in_statement = False
        elif kind not in _NO_STATEMENT:
            if not in_statement and kind != tokenize.STRING:
                regions["statement_start"].append((start, end))
            in_statement = True
    regions["newline"] += [match.span() for match in _NEWLINES.finditer(source.text)]
    regions["blank_line"] += [match.span() for match in _BLANK_LINES.finditer(source.text)]


def _paint_blocks(source: Source, regions: Regions) -> None:
    """indented_d: code at least d blocks deep, from its first statement to the next one further out."""
    opened: list[int] = []
    outside = 0
    for kind, _, start, end in source.words:
        if kind == tokenize.INDENT:
            if not opened:
                regions["module_level"].append((outside, end))
            opened.append(end)
        elif kind == tokenize.DEDENT:
            depth = len(opened)
            first = opened.pop()
            if depth <= _DEPTHS:
                regions[f"indented_{depth}"].append((first, start))
            if not opened:
                outside = start
    regions["module_level"].append((outside, len(source.text)))


def _paint_brackets(words: tuple[Word, ...], regions: Regions) -> None:
    """brackets_d: inside at least d brackets, these included; and lines an open bracket carries on."""
    opened: list[int] = []
    carried: int | None = None
    for kind, text, start, end in words:
        if kind == tokenize.NL and opened and carried is None:
            carried = end
        if kind != tokenize.OP:
            continue
        if text in "([{":
            opened.append(start)
        elif text in ")]}" and opened:
            depth = len(opened)
            regions[f"brackets_{min(depth, 3)}"].append((opened.pop(), end))
            if depth == 1 and carried is not None:
                regions["continued_line"].append((carried, end))
                carried = None
