"""Numbers and values as people read them. Imports next to nothing, so the CLI uses it too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["count", "dice", "duration", "extent", "gigabytes", "listing", "number", "numbers", "plain"]

_MISSING = "–"


def duration(seconds: float | None) -> str:
    """Return ``420 ms``, ``4.2 s``, ``45 s``, ``12 min``, ``1 h 52 min`` or ``2 d 3 h``; a dash if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return _MISSING
    if 0 < seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return _pair(minutes, 60, "h", "min")
    return _pair(round(minutes / 60), 24, "d", "h")


def _pair(amount: int, size: int, large: str, small: str) -> str:
    rest = amount % size
    return f"{amount // size} {large}" + (f" {rest} {small}" if rest else "")


def gigabytes(value: float | None) -> str:
    """Return ``38 KB``, ``1.4 MB``, ``40 MB``, ``0.73 GB`` or ``12 GB`` for a number of GiB; a dash if unknown."""
    if value is None or not math.isfinite(value):
        return _MISSING
    if value < 0.0995:
        megabytes = 1024 * value
        if megabytes < 0.995:
            return f"{1024 * megabytes:.0f} KB"
        return f"{megabytes:.1f} MB" if megabytes < 9.95 else f"{megabytes:.0f} MB"
    return f"{value:.2f} GB" if value < 9.95 else f"{value:.0f} GB"


def dice(value: float | None) -> str:
    """Return three decimals, or a dash for NaN and None."""
    return _MISSING if value is None or not math.isfinite(value) else f"{value:.3f}"


def number(value: float | None) -> str:
    """Return a number with four significant digits and thin spaces between thousands; a dash for NaN and None."""
    if value is None or not math.isfinite(value):
        return _MISSING
    if isinstance(value, int) or float(value).is_integer():
        text = f"{int(value):,}"
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}".replace("e-0", "e-")
    return text.replace(",", "\u202f").replace("-", "−")


def numbers(values: Iterable[float]) -> str:
    """Return ``(3, 0.781, 0.781)``: sizes or a place in mm."""
    return f"({', '.join(f'{value:.4g}' for value in values)})"


def extent(values: Sequence[float | None]) -> str:
    """Return ``40 × 56 × 40``."""
    return " × ".join(number(value) for value in values)


def count(amount: int, noun: str, plural: str = "") -> str:
    """Return ``1 case`` or ``3 cases``."""
    return f"{number(amount)} {noun if amount == 1 else plural or noun + 's'}"


def listing(names: Sequence[str], limit: int = 6) -> str:
    """Return ``a, b and c``; after `limit` names ``a, b and 12 more``."""
    names = [*names[: limit - 1], f"{len(names) - limit + 1} more"] if len(names) > limit else list(names)
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else "none"


def plain(value: Any) -> str:
    """Return any JSON-able value in words: lists of numbers as an extent, yes and no, nested lists by semicolons."""
    match value:
        case None:
            return _MISSING
        case bool():
            return "yes" if value else "no"
        case int() | float():
            return number(value)
        case str():
            return value
        case Mapping():
            return ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) or "none"
        case [*items]:
            if not items:
                return "none"
            if all(isinstance(item, int | float | None) and not isinstance(item, bool) for item in items):
                return extent(items)
            nested = any(isinstance(item, list | tuple | Mapping) for item in items)
            return ("; " if nested else ", ").join(plain(item) for item in items)
        case _:
            return str(value)
