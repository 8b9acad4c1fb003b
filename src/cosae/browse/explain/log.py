"""Every question and answer, a JSON line each: a run that stopped goes on without asking again what was answered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from cosae.browse.explain.endpoint import Answer, Chat, Messages
from cosae.errors import CosaeError
from cosae.io.atomic import written
from cosae.io.digest import value_digest
from cosae.io.untrusted import parse_json


class Asked:
    """A file of lines {"key", "about", "messages", "answer", "tokens_in", "tokens_out"}, and who is asked.

    asked, known   questions that were asked now, and that were answered by the file; tokens_in, tokens_out: of those
                   asked now, as far as told
    """

    def __init__(self, path: Path, chat: Chat) -> None:
        self.path, self.chat = path, chat
        self.asked = self.known = self.tokens_in = self.tokens_out = 0
        self._lock, self._there = Lock(), _read(path)
        with written(path, "choose another place"):
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
            self._file = path.open("a", encoding="utf-8")
            if not whole:
                self._file.write("\n")  # what a crash tore stays a line of its own, which no one reads

    def ask(
        self, messages: Messages, about: Mapping[str, Any], max_tokens: int, temperature: float, seed: int, attempt: int
    ) -> str | None:
        """The answer's text, None where it has none. Raises CosaeError where there is no answer to be had."""
        question = [self.chat.model, messages, max_tokens, temperature, seed, attempt]
        key = value_digest(question)
        with self._lock:
            if key in self._there:
                self.known += 1
                return self._there[key]
        found = self.chat.ask(messages, max_tokens, temperature, seed + attempt)
        with self._lock:
            self._note(key, dict(about), messages, found)
        return found.text

    def _note(self, key: str, about: dict[str, Any], messages: Messages, found: Answer) -> None:
        record: dict[str, Any] = {"key": key, "model": self.chat.model, "about": about, "messages": messages}
        record |= {"answer": found.text, "tokens_in": found.tokens_in, "tokens_out": found.tokens_out}
        with written(self.path, "make room and give the same command again"):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        self._there[key] = found.text
        self.asked += 1
        self.tokens_in += found.tokens_in or 0
        self.tokens_out += found.tokens_out or 0

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


def _read(path: Path) -> dict[str, str | None]:
    """Key → answer of the lines that are whole."""
    found: dict[str, str | None] = {}
    if not path.is_file():
        return found
    try:
        with path.open("rb") as lines:
            for line in lines:
                with suppress(ValueError, KeyError, TypeError):
                    one = parse_json(line)
                    if isinstance(one["key"], str) and isinstance(one["answer"], str | None):
                        found[one["key"]] = one["answer"]
    except OSError as error:
        raise CosaeError(f"{path} cannot be read ({error.strerror}): check the path.") from None
    return found
