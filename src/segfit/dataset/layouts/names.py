"""Names of files that mean the same: equal but for how accents are stored, or probably meant to be equal."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

__all__ = ["composed", "likely_partner"]

_ROLE = re.compile(
    r"(.+?)[ _.-]+(?:0000|images?|img|scan|volume|labels?|masks?|segs?|segmentations?|gt|annotations?|ground_?truth)",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\d+")
_SEPARATORS = re.compile(r"[ _.-]+")


def composed(name: str) -> str:
    """Return a name with its accents stored in one way (NFC): file systems of macOS store them in another."""
    return unicodedata.normalize("NFC", name)


def likely_partner(name: str, others: Iterable[str]) -> str | None:
    """Return the one of some names that was probably meant to be `name`; None if there is none or more than one.

    Names are probably the same if they differ in capitals, accents, separators, zeros before a number or an ending
    like ``_seg`` alone.
    """
    wanted = _essence(name)
    found = [other for other in others if _essence(other) == wanted]
    return found[0] if len(found) == 1 else None


def _essence(name: str) -> str:
    role = _ROLE.fullmatch(name)
    letters = unicodedata.normalize("NFKD", role[1] if role else name)
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter)).casefold()
    numbered = _NUMBER.sub(lambda number: number[0].lstrip("0") or "0", plain)
    words = _SEPARATORS.sub("_", numbered).strip("_")
    return re.sub(r"(?<=\D)_(?=.)|(?<=\d)_(?=\D)", "", words)  # two numbers stay apart
