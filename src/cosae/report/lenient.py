"""JSON → frozen dataclasses, leniently: what is missing or of another type is left at the field's default.

A report must come out of a damaged or hand-edited file too, so nothing here raises. Every field of a record needs a
default; None, or an empty tuple, mapping or record, stands for what is not there.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


class Numbers(dict[str, float]):
    """Finite numbers by name, as attributes; None for a name that is not there. For what is read in one place only."""

    def __getattr__(self, name: str) -> float | None:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)


def read_record(kind: type[Record], value: object) -> Record:
    """The JSON value as a record of this dataclass; its defaults where the value is of another shape."""
    found: Record | None = _read(kind, value)
    return kind() if found is None else found


def _read(hint: Any, value: object) -> Any:
    """The value as this type; None where it is empty or of another type."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if hint is Numbers:
        items = value.items() if isinstance(value, Mapping) else ()
        return Numbers({str(key): n for key, one in items if (n := _number(one)) is not None})
    if origin in (Union, types.UnionType):
        return next((found for one in args if (found := _read(one, value)) is not None), None)
    if origin is tuple:
        entries = [_entry(args[0], one) for one in value] if isinstance(value, list | tuple) else []
        nothing = args[0] is Any or types.NoneType in get_args(args[0])  # may stand among the entries
        return tuple(one for one in entries if nothing or one is not None) or None
    if origin is Mapping:
        found = {str(key): _read(args[1], one) for key, one in value.items()} if isinstance(value, Mapping) else {}
        return {key: one for key, one in found.items() if one is not None or args[1] is Any} or None
    if is_dataclass(hint):
        return _fields(hint, value) if isinstance(value, Mapping) and value else None
    if hint is float:
        return _number(value)
    return value if isinstance(value, hint) and not (hint is int and isinstance(value, bool)) else None


def _entry(hint: Any, value: object) -> Any:
    """An entry of a list, where records keep their place: one of another shape is an empty record."""
    found = _read(hint, value)
    return hint() if found is None and isinstance(hint, type) and is_dataclass(hint) else found


def _fields(kind: Any, value: Mapping[Any, object]) -> Any:
    read = {name: _read(hint, value[name]) for name, hint in _hints(kind).items() if name in value}
    return kind(**{name: one for name, one in read.items() if one is not None})


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
