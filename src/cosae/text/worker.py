"""Text → token ids and offsets, in the run's own process or, run as a script, in a process of its own.

As a script it imports neither torch nor cosae: it reads pickled requests from its standard input, which only the
process that started it can write, and answers on its standard output until the input ends. It goes when its parent
goes, however that ended.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

SAID_CHARS = 300

Encoded = tuple[NDArray[np.int32], NDArray[np.int32]]
"""One text: its ids (T,), and the start and end of each token in it (T, 2), in characters."""
Failed = tuple[int, str]
"""Number of the text that could not be tokenised, -1 for all of them, and why, in one line."""


def encode(tokenizer: Any, texts: list[str]) -> list[Encoded] | Failed:
    """Ids and offsets of each text, no special token added; or the first text that the tokenizer fails on."""
    try:
        return _encode(tokenizer, texts)
    except Exception as error:
        for index, text in enumerate(texts):
            try:
                _encode(tokenizer, [text])
            except Exception as own:
                return index, said(own)
        return -1, said(error)


def _encode(tokenizer: Any, texts: list[str]) -> list[Encoded]:
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # nothing is too long here: rows are cut later
    )
    return [
        (np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int32).reshape(-1, 2))
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def said(error: Exception) -> str:
    """What an error says, in one line that is not long: it may quote a file."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')[:SAID_CHARS]}" if lines else type(error).__name__


def main() -> None:
    """Answer requests until their end; then go at once, even from the middle of a text."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a tokenizer prints must not end up among the answers
    sys.path[:] = pickle.load(sys.stdin.buffer)
    tokenizer: Any = None
    answer: list[Encoded] | Failed | None = None
    try:
        tokenizer = pickle.load(sys.stdin.buffer)
    except Exception as error:
        answer = -1, said(error)
    requests: SimpleQueue[list[str]] = SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    while True:
        texts = requests.get()
        try:
            pickle.dump(answer or encode(tokenizer, texts), answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
        except BrokenPipeError:
            os._exit(0)  # nobody is left to answer


def _read(requests: SimpleQueue[list[str]]) -> None:
    try:
        while True:
            requests.put(pickle.load(sys.stdin.buffer))
    except (EOFError, pickle.UnpicklingError):
        os._exit(0)  # the parent is done with this process, or is no more


if __name__ == "__main__":
    main()
