"""What the hub's client raises, in one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cosae.errors import CosaeError
from cosae.io.untrusted import one_line


@contextmanager
def plainly(hub: Any, what: str, *, writing: bool) -> Iterator[None]:
    """Whatever the hub's client raises, in one sentence."""
    try:
        yield
    except CosaeError:
        raise
    except Exception as error:  # the client, its HTTP library and the system raise errors of many kinds
        raise CosaeError(f"{what}: {_reason(hub.errors, error, writing)}.") from None


def _reason(errors: Any, error: BaseException, writing: bool) -> str:
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # the client's own wrapping
        return _reason(errors, error.__cause__, writing)
    login = "set HF_TOKEN or run `hf auth login`"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"the repository is gated: ask for access on its page, then {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision: name a branch, tag or commit that is there"
    if isinstance(error, errors.RepositoryNotFoundError):
        may = "write to" if writing else "see"
        return f"there is no such repository, or none that the token may {may}: check the name, or {login}"
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return "a file is no longer there: run the command again"
    if status == 401:
        return f"the token is not accepted: {login}"
    if status == 403:
        needs = "it needs write access to this repository" if writing else "it may not read this repository"
        return f"the token is not allowed to do that ({needs})"
    if status == 429:
        return "the hub asks to wait (too many requests): try later"
    if status is not None:
        return f"the hub answered with status {status} ({one_line(error, 160)}): try later"
    if isinstance(error, OSError) and error.errno is not None:
        return f"a file cannot be written ({error.strerror})"
    if "onsistency check" in str(error) or "peer closed" in str(error).lower():
        return f"a download stopped short ({one_line(error, 160)}): run the command again"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to reach the hub"
    return f"the hub could not be reached or understood ({type(error).__name__}: {one_line(error, 160)})"
