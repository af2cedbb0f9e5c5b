"""Numbers and values as people read them. Imports next to nothing, so the CLI uses it too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "by_axis",
    "count",
    "dice",
    "duration",
    "extent",
    "gigabytes",
    "listing",
    "measure_name",
    "name_in_words",
    "number",
    "numbers",
    "plain",
    "printable",
    "value_in_words",
]

_UNPRINTABLE = {
    code: f"\\u{code:04x}"
    for code in (*range(32), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    if chr(code) not in "\n\t"
}
"""Characters that steer a terminal or turn the direction of text, as JSON escapes them."""
_MISSING = "–"
_UNITS = {"_mm": " (mm)", "_gb": " (GB)", "_s": " (seconds)"}
_NAMES = {
    "percentile_00_5": "0.5 percentile",
    "percentile_10_mm": "10th percentile (mm)",
    "percentile_99_5": "99.5 percentile",
}
_LARGE = 100_000
"""From here on whole numbers are written with separators."""
_SIZES = ("spacing", "shape", "patch", "start", "_mm", "strides", "kernels", "multiples")
"""Values with one of these words in their name have one number per axis and are written with an x between."""


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


def measure_name(key: str, unit: str | None = None) -> str:
    """Return the name of a measure in words, with the unit of one that is a distance: ``HD95 (mm)``."""
    words = {"dice": "Dice", "iou": "IoU", "hd95": "HD95", "surface_dice": "surface Dice"}
    words["centreline_dice"] = "centreline Dice"
    text = words.get(key, key.replace("_", " "))
    return f"{text} ({unit})" if unit and key in ("hd95", "average_surface_distance") else text


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


def printable(text: str) -> str:
    """Return text without characters that steer a terminal, which names in files may hold; lines stay lines."""
    return text.translate(_UNPRINTABLE)


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


def by_axis(values: Sequence[float]) -> str:
    """Return ``128x96x96``; one number per axis."""
    return "x".join(f"{n:.6g}" for n in values)


def name_in_words(name: str, unit: str = "mm") -> str:
    """Return the name of a value as people write it: ``memory (GB)`` for ``memory_gb``; sizes are in `unit`."""
    ending = next((ending for ending in _UNITS if name.endswith(ending)), "")
    words = _NAMES.get(name) or name.removesuffix(ending).replace("_", " ") + _UNITS.get(ending, "")
    return words.replace("(mm)", f"({unit})")


def value_in_words(value: Any, name: str) -> str:
    """Return a JSON-able value as people write it: ``40x56x40`` where `name` has one number per axis.

    Other lists are written like ``32, 64, 128``, ranges like ``0.7 to 1.4``.
    """
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not given"}[value]
    if isinstance(value, int | float):
        return f"{value:,.0f}" if abs(value) >= _LARGE else f"{value:.6g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{name_in_words(key)} {value_in_words(item, key)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        numbers = all(isinstance(item, int | float) for item in value)
        if numbers and name.endswith("_range") and len(value) == 2:
            return " to ".join(value_in_words(item, name) for item in value)
        per_axis = numbers and any(word in name for word in _SIZES)
        return ("x" if per_axis else ", ").join(value_in_words(item, name) for item in value) or "none"
    return str(value)
