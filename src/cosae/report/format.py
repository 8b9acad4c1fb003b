"""Numbers as a reader sees them: a true minus sign, a dash where there is none."""

from __future__ import annotations

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"


def fixed(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number with so many decimals; above 10 000 without any."""
    if value is None:
        return NONE
    plus = "+" if sign else ""
    if abs(value) >= 1e4:
        return f"{value:{plus},.0f}".replace("-", MINUS)
    if float(f"{value:.{digits}f}") == 0:
        value = 0.0
    return f"{value:{plus}.{digits}f}".replace("-", MINUS)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return NONE if value is None else f"{fixed(100 * value, digits)} %"


def count(value: float | None) -> str:
    """A whole number with thousands set apart by thin spaces."""
    return NONE if value is None else f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def significant(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits; no powers of ten where the number can be read without."""
    if value is None:
        return NONE
    text = f"{value:.{digits}g}"
    if "e+" in text and abs(value) < 1e9:
        return count(float(text)).replace("-", MINUS)
    return text.replace("-", MINUS)


def times(value: float | None) -> str:
    """A ratio."""
    return NONE if value is None else f"{significant(value)} ×"


def counted(value: str | float | None, digits: int = 2) -> str:
    """A whole number as one, another with its decimals, text as it is."""
    if value is None or isinstance(value, str):
        return NONE if value is None else value
    return count(value) if value == int(value) else fixed(value, digits)


def shortened(value: str, length: int) -> str:
    """The string, cut to `length` characters with an ellipsis."""
    return value if len(value) <= length else value[: length - 1] + "…"
