"""Contrasts of the colours of the pages, as WCAG 2 counts them, where it is light and where it is dark."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from segfit.report.figures import FOLD_PALETTE, PALETTE

_STYLE = resources.files("segfit.report").joinpath("style.css").read_text(encoding="utf-8")
_BLOCKS = [
    dict(re.findall(r"--(\w[\w-]*): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", _STYLE, re.S)
]
_TEXT = [
    *((ink, ground) for ink in ("ink", "muted", "accent") for ground in ("page", "soft", "top")),
    *((ink, f"{name}-soft") for name in ("good", "warn", "bad") for ink in (name, "ink")),
    ("bad", "page"),
    ("muted", "good-soft"),
    ("page", "accent"),  # of a button that is on
]
_GRAPHICS = [f"c{number}" for number in range(len(PALETTE))] + [f"f{number}" for number in range(len(FOLD_PALETTE))]


def _luminance(colour: str) -> float:
    parts = [value / 255 for value in bytes.fromhex(colour[1:])]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_both_schemes_have_the_same_colours() -> None:
    assert len(_BLOCKS) == 2
    assert _BLOCKS[0].keys() == _BLOCKS[1].keys()
    assert _contrast("#000000", "#ffffff") == pytest.approx(21)
    used = set(re.findall(r"var\(--([\w-]+)\)", _STYLE))
    assert used <= _BLOCKS[0].keys()


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(("ink", "ground"), _TEXT)
def test_text_can_be_read(scheme: int, ink: str, ground: str) -> None:
    assert _contrast(_BLOCKS[scheme][ink], _BLOCKS[scheme][ground]) >= 4.5


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("name", [*_GRAPHICS, "bar", "pale", "edge", "warn-edge"])
def test_graphics_can_be_seen(scheme: int, name: str) -> None:
    assert _contrast(_BLOCKS[scheme][name], _BLOCKS[scheme]["page"]) >= 3


@pytest.mark.parametrize("colour", PALETTE)
def test_classes_can_be_seen_on_black(colour: str) -> None:
    assert _contrast(colour, "#000000") >= 3


def test_no_class_has_the_colour_of_a_fold() -> None:
    for block in _BLOCKS:
        assert not {block[f"c{n}"] for n in range(len(PALETTE))} & {block[f"f{n}"] for n in range(len(FOLD_PALETTE))}
    assert not set(PALETTE) & set(FOLD_PALETTE)
