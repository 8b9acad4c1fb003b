"""Why an eval of SAEBench did not end: one sentence from an exception, or from what SAEBench only logs.

Files that could not be downloaded are told from everything else by the packages the exception chain went through.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

from cosae.interop.saebench.evals import EVALS
from cosae.interop.saebench.settings import Job

_PACKAGES = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "socket", "datasets.exceptions")
_WORDS = ("couldn't connect", "couldn't reach", "is not cached", "cannot find the requested files", "offline mode")


def one_sentence(name: str, job: Job, said: Sequence[str]) -> str:
    """One sentence from what an exception chain, or SAEBench's log, said."""
    first = next((line.strip() for text in said for line in text.splitlines() if line.strip()), "nothing was said")
    first = first[:300].rstrip(".")
    if any(word in " ".join(said).lower() for word in (*_PACKAGES, *_WORDS)):
        from_hub = EVALS[name].reads_model and not job.settings.model_path
        model = f"the model {job.settings.model_name}" if from_hub else ""
        needs = " and ".join(filter(None, [model, EVALS[name].data])) or "files"
        why = f"{name} needs {needs}, which could not be downloaded here ({first})"
        return f"{why}: run it where the hub can be reached or HF_HOME is filled, give copies as data, or leave it out."
    return f"{name} failed in SAEBench: {first}; the whole story is in {job.out / 'saebench.log'}."


def chain(error: BaseException) -> list[str]:
    """Each exception's text and kind, from the one that came out to the one it came from."""
    said: list[str] = []
    current: BaseException | None = error
    while current is not None:
        said += [str(current) or type(current).__name__, f"{type(current).__module__}.{type(current).__name__}"]
        current = current.__cause__ or current.__context__
    return said


@contextlib.contextmanager
def errors_logged() -> Iterator[list[str]]:
    """Errors that SAEBench only logs before it goes on: core does so for a model or data set it cannot read."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener, logger = Listener(logging.ERROR), logging.getLogger("sae_bench")
    logger.addHandler(listener)
    try:
        yield said
    finally:
        logger.removeHandler(listener)
