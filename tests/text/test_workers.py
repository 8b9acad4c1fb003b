"""Tokenising in processes: the same tokens for any number, one sentence for whatever fails, nobody left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cosae.errors import CosaeError
from cosae.text.pylib import Document
from cosae.text.tokenization import TokenizedDocument, tokenize_documents
from cosae.text.workers import Workers
from tests.support import ROOT
from tests.support.letters import Letters

DOCUMENTS = [Document(f"d{i}", f"text {i} " * (i % 7)) for i in range(300)]


def tokens(workers: Workers | None, documents: Any = DOCUMENTS, **options: Any) -> list[TokenizedDocument]:
    return list(tokenize_documents(documents, Letters(), add_bos=True, workers=workers, **options))


def same(a: list[TokenizedDocument], b: list[TokenizedDocument]) -> bool:
    return len(a) == len(b) and all(
        x.name == y.name and np.array_equal(x.ids_T, y.ids_T) and np.array_equal(x.offset_T2, y.offset_T2)
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture(scope="module")
def two() -> Iterator[Workers]:
    with Workers(Letters(), 2) as workers:
        yield workers


def alive(workers: Workers) -> list[int]:
    assert workers._end is not None
    processes = workers._end.peek()[2][0]
    return [p.pid for p in processes if p.poll() is None]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"


def test_any_number_of_processes_gives_the_same_tokens(two: Workers) -> None:
    here = tokens(None)
    assert [d.ids_T[1:].tolist() for d in here[:9]] == [[ord(c) for c in d.text] for d in DOCUMENTS[:9]]
    assert same(tokens(two), here)
    assert same(tokens(two, max_tokens=1234), tokens(None, max_tokens=1234))
    with Workers(Letters(), 1) as one:
        assert same(tokens(one, DOCUMENTS[:70]), here[:70])


def test_what_a_tokenizer_prints_does_not_reach_the_answers(two: Workers) -> None:
    (found,) = tokens(two, [Document("loud", "PRINT")])
    assert len(found.ids_T) == 6


@pytest.mark.parametrize("number", [None, 2])
def test_a_tokenizer_that_raises_is_one_sentence_naming_the_document(two: Workers, number: int | None) -> None:
    documents = [*DOCUMENTS[:100], Document("the odd one", "RAISE"), *DOCUMENTS[100:]]
    given, pool = list[str](), two if number else None
    with pytest.raises(CosaeError) as caught:
        given.extend(d.name for d in tokenize_documents(documents, Letters(), add_bos=True, workers=pool))
    assert str(caught.value).startswith(
        "The tokenizer Letters failed on document 'the odd one': RuntimeError: cannot read this."
    )
    assert given == [d.name for d in DOCUMENTS[:64]]  # whole requests before it
    assert same(tokens(two), tokens(None))  # and the processes go on


@pytest.mark.parametrize("number", [None, 2])
def test_a_data_set_that_raises_is_told_after_the_documents_before_it(two: Workers, number: int | None) -> None:
    def broken() -> Iterator[Document]:
        yield from DOCUMENTS[:256]
        raise CosaeError("row 256 is broken")

    given, pool = list[str](), two if number else None
    with pytest.raises(CosaeError, match="row 256 is broken"):
        given.extend(d.name for d in tokenize_documents(broken(), Letters(), add_bos=True, workers=pool))
    assert given == [d.name for d in DOCUMENTS[:256]]


def test_a_process_that_dies_is_one_sentence_and_nothing_hangs() -> None:
    with Workers(Letters(), 2) as workers:
        with pytest.raises(CosaeError, match=r"signal 9 .*n_workers"):
            tokens(workers, [*DOCUMENTS[:64], Document("deadly", "DIE")])
        pids = alive(workers)
    assert all(gone(pid) for pid in pids)


def test_processes_end_with_their_pool_even_in_the_middle_of_a_text() -> None:
    workers = Workers(Letters(), 2)
    busy = workers.submit(["SLEEP"])
    tokens(workers, DOCUMENTS[:3])
    pids = alive(workers)
    assert len(pids) == 2
    begun = time.monotonic()
    del workers
    gc.collect()
    assert all(gone(pid) for pid in pids)
    with pytest.raises(CosaeError):
        busy.result(10)
    assert time.monotonic() - begun < 10


def test_a_closed_pool_starts_again_when_it_is_asked() -> None:
    with Workers(Letters(), 1) as workers:
        first = tokens(workers, DOCUMENTS[:5])
        workers.close()
        workers.close()
        assert same(tokens(workers, DOCUMENTS[:5]), first)


CHILD = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would this
from tests.support import ROOT
from tests.support.letters import Letters
from cosae.text.workers import Workers
workers = Workers(Letters(), 2)
workers.submit(["hello"]).result()
busy = workers.submit(["SLEEP"])
print(*(p.pid for p in workers._end.peek()[2][0]), flush=True)
if sys.argv[1] == "leave":
    sys.exit(0)
busy.result()
"""


@pytest.mark.parametrize("how", ["leave", signal.SIGINT, signal.SIGKILL], ids=str)
def test_no_process_outlives_the_run(how: Any) -> None:
    command = [sys.executable, "-c", CHILD, str(how)]
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True, cwd=ROOT
    )
    assert run.stdout is not None
    pids = [int(pid) for pid in run.stdout.readline().split()]
    assert len(pids) == 2
    if how != "leave":
        os.killpg(run.pid, how)  # as the terminal does it: the whole group at once
    run.wait(30)
    run.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not all(gone(pid) for pid in pids):
        time.sleep(0.05)
    assert all(gone(pid) for pid in pids)


def test_a_tokenizer_that_cannot_travel_is_refused() -> None:
    class Local(Letters):
        pass

    with pytest.raises(CosaeError, match="cannot be handed to worker processes"):
        Workers(Local(), 1)
    with pytest.raises(CosaeError, match="n_workers must be at least 1"):
        Workers(Letters(), 0)
