"""Processes that tokenise: requests in, answers in the order of the requests.

Each process is fed by a thread that waits for its answer, so the run's own thread never waits on a full pipe. The
processes end when `close` is called, when the pool is collected, when the interpreter exits, and when it is killed
(their input ends). What they answer is what `worker.encode` answers here: their number changes nothing.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from cosae.errors import CosaeError, check_least
from cosae.text import worker as tokenize_worker
from cosae.text.worker import Encoded, Failed

_Job = tuple["Future[list[Encoded] | Failed]", list[str]]


class Workers:
    """`n_workers` processes with a copy of the tokenizer each, started with the first request.

    Raises CosaeError for fewer than one, and for a tokenizer that cannot be pickled.
    """

    def __init__(self, tokenizer: Any, n_workers: int) -> None:
        check_least("n_workers", n_workers, 1)
        try:
            self._tokenizer = pickle.dumps(tokenizer)
        except Exception as error:
            raise CosaeError(
                f"The tokenizer {type(tokenizer).__name__} cannot be handed to worker processes ({error}): use "
                "data.n_workers 0."
            ) from None
        self.n_workers = n_workers
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._end: weakref.finalize[Any, Workers] | None = None

    def submit(self, texts: Sequence[str]) -> Future[list[Encoded] | Failed]:
        """The answer to come. Its `result()` raises CosaeError where the process ended without one."""
        if self._end is None:
            self._start()
        future: Future[list[Encoded] | Failed] = Future()
        self._jobs.put((future, list(texts)))
        return future

    def close(self) -> None:
        """End the processes, whatever they are doing. A later request starts others."""
        if self._end is not None:
            self._end()
            self._end = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        command = [sys.executable, "-P", str(Path(tokenize_worker.__file__))]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self._jobs = SimpleQueue()
        processes: list[subprocess.Popen[bytes]] = []
        self._end = weakref.finalize(self, _end, processes, self._jobs)
        for _ in range(self.n_workers):
            pipe = subprocess.PIPE
            # a session of its own: out of reach of the terminal's Ctrl-C, which is the run's to answer
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, start_new_session=True)
            processes.append(process)
            # no reference to the pool: its threads must not keep it from being collected
            work = (process, self._tokenizer, self._jobs)
            threading.Thread(target=_feed, args=work, name="cosae tokenises", daemon=True).start()


def _feed(process: subprocess.Popen[bytes], tokenizer: bytes, jobs: SimpleQueue[_Job | None]) -> None:
    """One process' thread: hand it a job, wait for the answer, until None comes."""
    ready = False
    while (job := jobs.get()) is not None:
        future, texts = job
        if not future.set_running_or_notify_cancel():
            continue
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            if not ready:
                process.stdin.write(pickle.dumps(sys.path) + tokenizer)
                ready = True
            pickle.dump(texts, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            future.set_result(pickle.load(process.stdout))
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            future.set_exception(_lost(process))
        except BaseException as error:
            future.set_exception(error)


def _lost(process: subprocess.Popen[bytes]) -> CosaeError:
    try:
        status = process.wait(5)
    except subprocess.TimeoutExpired:
        return CosaeError("a tokenising process stopped answering; use data.n_workers 0.")
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return CosaeError(
        f"a tokenising process ended {how} without an answer (out of memory, perhaps); use fewer data.n_workers, or 0."
    )


def _end(processes: list[subprocess.Popen[bytes]], jobs: SimpleQueue[_Job | None]) -> None:
    for process in processes:
        process.kill()
        jobs.put(None)
    for process in processes:
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what was not written yet has nowhere to go
                pipe.close()
