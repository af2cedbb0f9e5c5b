"""Names of cases and files: which are valid, which are the same name, which were probably meant to be."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

__all__ = ["LONGEST_NAME", "composed", "fault_of_name", "likely_partners", "same_letters"]

LONGEST_NAME = 200  # bytes: file systems allow 255, and endings are added to the id of a case (assumption)

_ROLE = re.compile(
    r"(.+?)[ _.-]+(?:0000|images?|img|scan|volume|labels?|masks?|segs?|segmentations?|gt|annotations?|ground_?truth)",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\d+")
_SEPARATORS = re.compile(r"[ _.-]+")


def composed(name: str) -> str:
    """Return a name with its accents stored in one way (NFC): file systems of macOS store them in another."""
    return unicodedata.normalize("NFC", name)


def fault_of_name(name: str) -> str:
    """Say why a case cannot have this id, which becomes the name of files; an empty string if it can."""
    if not name.strip():
        return "is empty"
    if name != Path(name).name or name.startswith("."):
        return "is a path or would be a hidden file"
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        return "has control characters or is not UTF-8 text"
    if len(name.encode()) > LONGEST_NAME:
        return f"is longer than {LONGEST_NAME} bytes"
    return ""


def same_letters(name: str) -> str:
    """Return what names have in common that differ in capitals or in how their accents are stored alone."""
    return composed(name).casefold()


def likely_partners(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Return for names the one of some others that was probably meant to be it, where there is just one.

    Names are probably the same if they differ in capitals, accents, separators, zeros before a number or an ending
    like ``_seg`` alone.
    """
    wanted = {name: _essence(name) for name in names}
    alike: dict[str, list[str]] = {}
    for other in others if wanted else ():
        alike.setdefault(_essence(other), []).append(other)
    found = {name: alike.get(essence, []) for name, essence in wanted.items()}
    return {name: partners[0] for name, partners in found.items() if len(partners) == 1}


def _essence(name: str) -> str:
    role = _ROLE.fullmatch(name)
    letters = unicodedata.normalize("NFKD", role[1] if role else name)
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter)).casefold()
    numbered = _NUMBER.sub(lambda number: number[0].lstrip("0") or "0", plain)
    words = _SEPARATORS.sub("_", numbered).strip("_")
    return re.sub(r"(?<=\D)_(?=.)|(?<=\d)_(?=\D)", "", words)  # two numbers stay apart
