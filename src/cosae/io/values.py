"""The one way from text, JSON and YAML to typed values, and back.

to_plain, from_plain   dataclasses ↔ mappings and lists that JSON holds, names and types checked
convert, from_text     a plain value, or a text, as a type hint says
parse                  "kind:name=value,name=value" → a dataclass
literal                a text of no known type: JSON where it is JSON
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from cosae.errors import CosaeError, check_choice, short

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and scalars → dicts, lists and scalars that JSON holds."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: type[T], plain: Any, where: str) -> T:
    """The inverse of `to_plain` for a dataclass, checking names and types. Raises CosaeError naming `where`."""
    if not isinstance(plain, dict):
        raise CosaeError(f"{where} must be a mapping of fields. Got {type(plain).__name__} instead.")
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    if other := [name for name in plain if not isinstance(name, str)]:
        raise CosaeError(f"{where} must have names of fields in text. Got {short(other[0])} instead.")
    if unknown := sorted(set(plain) - set(known)):
        named = ", ".join(map(short, unknown[:8]))
        raise CosaeError(f"{where} has no field {named}. It has {', '.join(sorted(known))}.")
    needed = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in plain]:
        raise CosaeError(f"{where} must have the field {', '.join(map(repr, missing))}, which is missing.")
    hints = typing.get_type_hints(kind)
    return kind(**{name: convert(hints[name], value, f"{where}.{name}") for name, value in plain.items()})


def convert(hint: Any, value: Any, where: str) -> Any:
    """A plain value as the type hint says: whole floats become int, lists tuples, mappings dataclasses.

    Raises CosaeError naming `where` for a value of another type.
    """
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = [o for o in typing.get_args(hint) if o is not type(None)]
        if value is None and len(options) < len(typing.get_args(hint)):
            return None
        for other in options[1:]:
            with suppress(CosaeError):
                return convert(other, value, where)
        return convert(options[0], value, where)
    if origin is typing.Literal:
        check_choice(where, value, typing.get_args(hint))
        return value
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return value if isinstance(value, hint) else from_plain(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise CosaeError(f"{where} must be a list. Got {short(value)} instead.")
        inner = typing.get_args(hint)[0]
        return tuple(convert(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)):
        raise CosaeError(f"{where} must be of type {hint.__name__}. Got {short(value)} instead.")
    return value


def from_text(hint: Any, text: str, where: str) -> Any:
    """A text as the type says: numbers, true or false, tuples joined by +, names. Raises CosaeError naming `where`."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return from_text(typing.get_args(hint)[0], text, where)
    if origin is tuple:
        return tuple(from_text(typing.get_args(hint)[0], part, f"each of {where}") for part in text.split("+") if part)
    if hint is bool:
        check_choice(where, text.lower(), ("true", "false"))
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            what = "a whole number" if hint is int else "a number"
            raise CosaeError(f"{where} must be {what}. Got {text!r} instead.") from None
    return convert(hint, text, where)


def settings(text: str, what: str) -> dict[str, str]:
    """`name=value,name=value` → the texts by name. Raises CosaeError, naming `what`, for other text."""
    found: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise CosaeError(f"{what} settings are written name=value, with commas between. Got {part!r} instead.")
        if name in found:
            raise CosaeError(f"{what} was given {name} twice; give it once.")
        found[name] = value
    return found


def parse(cls: type[T], text: str, what: str, kind_field: str, allowed: Mapping[str, Collection[str]]) -> T:
    """`kind:name=value,name=value` → cls, a dataclass whose field `kind_field` holds the kind.

    allowed: the settings that each kind reads. Raises CosaeError, naming `what`, for anything else.
    """
    kind, _, rest = text.strip().partition(":")
    check_choice(what, kind, allowed)
    given, hints = settings(rest, f"{what} {kind}"), typing.get_type_hints(cls)
    if other := [name for name in given if name not in allowed[kind]]:
        takes = ", ".join(allowed[kind]) or "no settings"
        raise CosaeError(f"{what} {kind} takes {takes}. Got {other[0]!r} instead.")
    return cls(**{kind_field: kind}, **{name: from_text(hints[name], v, f"{what} {name}") for name, v in given.items()})


def literal(text: str) -> Any:
    """JSON where it is JSON (numbers, true, null, lists), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
