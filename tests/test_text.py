from __future__ import annotations

import pytest

from segfit.text import count, dice, duration, extent, gigabytes, listing, number, numbers, plain, printable


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (float("inf"), "–"),
        (0, "0.0 s"),
        (0.42, "420 ms"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (99.4, "99 s"),
        (99.6, "2 min"),
        (3569, "59 min"),
        (3600, "1 h"),
        (6720, "1 h 52 min"),
        (86399, "1 d"),
        (97200, "1 d 3 h"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.0, "0 KB"),
        (38 / 2**20, "38 KB"),
        (1.4 / 1024, "1.4 MB"),
        (40 / 1024, "40 MB"),
        (0.0994, "102 MB"),
        (0.726, "0.73 GB"),
        (9.94, "9.94 GB"),
        (12.3, "12 GB"),
    ],
)
def test_gigabytes(value: float | None, text: str) -> None:
    assert gigabytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "3"), (3.0, "3"), (0.123456, "0.1235"), (-0.5, "−0.5"), (1234567, "1\u202f234\u202f567"), (2e-5, "2e−5")],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        ([40, 56.5, 40], "40 × 56.5 × 40"),
        ([None, 1.0], "– × 1"),
        (["a", "b"], "a, b"),
        ([[1, 2], [3, 4]], "1 × 2; 3 × 4"),
        ({"a": 1, "b": [2, 3]}, "a: 1, b: 2 × 3"),
        ([], "none"),
    ],
)
def test_plain(value: object, text: str) -> None:
    assert plain(value) == text


def test_small_ones() -> None:
    assert dice(float("nan")) == "–"
    assert dice(0.8766) == "0.877"
    assert extent((1.5, 2)) == "1.5 × 2"
    assert count(1, "case") == "1 case"
    assert count(3, "case") == "3 cases"
    assert listing([]) == "none"
    assert listing(["a"]) == "a"
    assert listing(["a", "b", "c"]) == "a, b and c"
    assert listing([str(i) for i in range(10)], 4) == "0, 1, 2 and 7 more"


def test_numbers_are_a_vector() -> None:
    assert numbers((3, 0.78125, 1e-5)) == "(3, 0.7812, 1e-05)"


def test_printable_text_keeps_its_lines_and_letters() -> None:
    assert printable("Ganglion\tÅ 腫瘍\n–") == "Ganglion\tÅ 腫瘍\n–"
    assert printable("\x1b]0;x\x07 \r \x7f \x9b \u2028 \u202e") == (
        "\\u001b]0;x\\u0007 \\u000d \\u007f \\u009b \\u2028 \\u202e"
    )
