"""Local files → documents, lazily; a row or file that cannot be read is one CosaeError naming it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cosae.errors import CosaeError, check_choice, check_least, short
from cosae.io.kind import which_is
from cosae.io.untrusted import check_plain
from cosae.shown import counted
from cosae.text.chat import messages_of
from cosae.text.pylib import Document
from cosae.text.rows import read_jsonl, read_parquet, valid_text

_TEXT_SUFFIXES = """
    .c .cc .cfg .cpp .css .csv .go .h .hpp .html .ini .java .js .json .kt .lua .md .php .pl .py .pyi .r .rb
    .rs .rst .scala .sh .sql .swift .tex .toml .ts .tsv .txt .xml .yaml .yml
"""
TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())
"""What a folder is searched for; other files in it are passed over."""
ROW_SUFFIXES = (".jsonl", ".parquet")
TXT_UNITS = ("file", "paragraph", "line")


@dataclass(frozen=True)
class Reading:
    """How text is read. Raises CosaeError on a value that is not allowed.

    text_field  key or column that holds a row's text (.jsonl, .parquet, datasets)
    suffixes    endings of the files a folder is searched for; none: TEXT_SUFFIXES, and where a folder has no such
                file, its .jsonl and .parquet files
    txt_unit    what counts as a document in a .txt file named by itself: the file, each paragraph (blank lines
                between) or each line. In a folder every file is one document
    max_chars   a document is cut here, before anything else is done with it
    is_chat     rows hold conversations (cosae.text.chat) instead of texts
    """

    text_field: str = "text"
    suffixes: tuple[str, ...] = ()
    txt_unit: str = "file"
    max_chars: int | None = None
    is_chat: bool = False

    def __post_init__(self) -> None:
        if not self.text_field:
            raise CosaeError("text_field must name the key or column with the text. Got '' instead.")
        if wrong := [s for s in self.suffixes if not s.startswith(".") or len(s) < 2]:
            raise CosaeError(f"suffixes must be file endings such as .py. Got {wrong[0]!r} instead.")
        check_choice("txt_unit", self.txt_unit, TXT_UNITS)
        check_least("max_chars", self.max_chars, 1)
        if self.is_chat and self.max_chars is not None:
            raise CosaeError("conversations are not cut by characters: drop max_chars.")


@dataclass
class Tally:
    """What was met while reading. Counts, and the names of files in a folder that are not UTF-8 text."""

    read: int = 0
    blank: int = 0
    chosen: int = 0
    undecodable: list[str] = field(default_factory=list)

    @property
    def warning(self) -> str:
        """What was passed over, in words; empty where nothing was."""
        parts = [f"{self.blank} blank"] if self.blank else []
        if self.undecodable:
            parts.append(f"{len(self.undecodable)} not UTF-8 (the first: {self.undecodable[0]})")
        return ", ".join(parts)


def read_path(path: Path, reading: Reading, tally: Tally, order_key: Sequence[int] | None = None) -> Iterator[Document]:
    """Documents of a file or folder. Raises CosaeError at the call where there is none to read."""
    check_plain(path)
    if path.is_dir():
        return _read_folder(path, _files_of(path, reading.suffixes, order_key), reading, tally)
    if not path.is_file():
        raise CosaeError(
            "The corpus must be 'pylib', 'wiki:en', an existing folder or .txt, .jsonl or .parquet file, or "
            "'hf:DATASET[:CONFIG][:SPLIT]', with a weight behind it in a mixture (code/:0.7). "
            f"Got {str(path)!r}, which does not exist, instead."
        )
    suffix = path.suffix.lower()
    if suffix not in (".txt", *ROW_SUFFIXES, *reading.suffixes):
        raise CosaeError(
            "A corpus file must be .txt, .jsonl or .parquet, or end as data.suffixes says. "
            f"Got {path.name!r}{which_is(path)} instead."
        )
    with _readable(path):
        path.open("rb").close()
    return (_read_rows if suffix in ROW_SUFFIXES else _read_text)(path, path.name, reading)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CosaeError(f"The corpus file {str(path)!r} cannot be read: {error.strerror}.") from None


def _read_folder(folder: Path, paths: list[Path], reading: Reading, tally: Tally) -> Iterator[Document]:
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in ROW_SUFFIXES:
            yield from _read_rows(path, name, reading)
            continue
        try:
            with _readable(path):
                text = path.read_text("utf-8")
        except UnicodeDecodeError:
            tally.undecodable.append(name)  # a folder may hold a stray binary under a text file's name
            continue
        yield Document(name, text)


def _files_of(folder: Path, suffixes: tuple[str, ...], order_key: Sequence[int] | None) -> list[Path]:
    """Files to read, sorted by name, or in a seeded order. Raises CosaeError where there are none."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    wanted = {s.lower() for s in suffixes} or TEXT_SUFFIXES
    found = [p for p in files if p.suffix.lower() in wanted]
    if not found and not suffixes:
        found = [p for p in files if p.suffix.lower() in ROW_SUFFIXES]
    if not found:
        what = "file with one of these endings" if suffixes else "text or source file"
        raise CosaeError(
            f"A corpus folder must hold at least one {what}. Got {str(folder)!r}, which has none of "
            f"{' '.join(sorted(wanted))} among its {counted(len(files), 'file')}{which_is(folder)} instead."
        )
    if order_key is not None:
        found = [found[i] for i in np.random.default_rng(list(order_key)).permutation(len(found))]
    return found


def _read_text(path: Path, name: str, reading: Reading) -> Iterator[Document]:
    try:
        if reading.txt_unit == "file":
            yield Document(name, path.read_text("utf-8"))
        else:
            yield from _units(path, name, by_line=reading.txt_unit == "line")
    except UnicodeDecodeError as error:
        raise CosaeError(f"A corpus file must be UTF-8 text. Got {name!r}: {error}.") from None


def _units(path: Path, name: str, by_line: bool) -> Iterator[Document]:
    """Lines, or paragraphs, that are not blank; each is named by the number of its first line."""
    start, lines = 0, list[str]()
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                start = start if lines else number
                lines.append(line)
            if lines and (by_line or not line.strip()):
                yield Document(f"{name}:{start}", "".join(lines))
                lines = []
    if lines:
        yield Document(f"{name}:{start}", "".join(lines))


def _read_rows(path: Path, name: str, reading: Reading) -> Iterator[Document]:
    field, unit = reading.text_field, "line"
    rows: Iterator[tuple[int, Any]] = read_jsonl(path, name)
    if path.suffix.lower() == ".parquet":
        advice, unit = "name the column with data.text_field", "row"
        rows = enumerate(read_parquet(path, name, [field], ["name", "id"], advice))
    for number, row in rows:
        yield document_of(row, f"{name}, {unit} {number}", f"{name}:{number}", reading)


def document_of(row: Any, where: str, name: str, reading: Reading) -> Document:
    """A row's text, or conversation, under `text_field`; its name under "name" or "id", else where it was read from."""
    text_field = reading.text_field
    if reading.is_chat and isinstance(row, dict):
        return Document(_name(row, text_field, name), messages_of(row.get(text_field), where))
    if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
        got = f"the keys {short(sorted(map(str, row)))}" if isinstance(row, dict) else type(row).__name__
        if isinstance(row, dict) and text_field in row:
            got = f"{type(row[text_field]).__name__} there"
        raise CosaeError(
            f'Each row must hold its text as a string under "{text_field}" (data.text_field). Got {got} at {where} '
            "instead."
        )
    return Document(_name(row, text_field, name), valid_text(row[text_field]))


def _name(row: dict[str, Any], text_field: str, otherwise: str) -> str:
    found = (row[k] for k in ("name", "id") if isinstance(row.get(k), str | int) and k != text_field)
    return str(next(found, otherwise))
