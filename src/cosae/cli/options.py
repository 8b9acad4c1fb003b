"""What several verbs do with their options."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cosae.errors import CosaeError
from cosae.io.values import literal


def changes_of(named: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Dotted path → value of the options that were given, and of PATH=VALUE texts."""
    changes = {path: value for path, value in named.items() if value is not None}
    for text in settings:
        path, equals, value = text.partition("=")
        if not equals:
            raise CosaeError(f"--set takes field=value, with a dotted path for the field. Got {text!r} instead.")
        changes[path] = literal(value)
    return changes


def logger(quiet: bool) -> Callable[[str], None]:
    """What says things on standard error, or keeps them."""
    return (lambda _: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))
