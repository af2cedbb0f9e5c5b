"""Values of a plan, and their names, as people write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["name_in_words", "value_in_words"]

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


def name_in_words(name: str) -> str:
    """Return the name of a value as people write it: ``memory (GB)`` for ``memory_gb``."""
    if name in _NAMES:
        return _NAMES[name]
    unit = next((ending for ending in _UNITS if name.endswith(ending)), "")
    return name.removesuffix(unit).replace("_", " ") + _UNITS.get(unit, "")


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
