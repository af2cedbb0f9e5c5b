"""Errors say what is wrong and what to do in fields, and cross processes."""

import pickle
from pathlib import Path

import pytest

from segfit import errors
from segfit.errors import DatasetError, InputError, Problem, SegfitError, StageError, nearest, reason_of
from segfit.execution.workers import LostCaseError
from segfit.images.image import FileError, problem_of

ERRORS = [
    InputError("it is wrong", "change it"),
    InputError("it is wrong"),
    StageError("it failed", "rerun"),
    FileError(Path("/a/b.png"), "is empty", "copy it again"),
    DatasetError([Problem("a", "is empty", "label it"), Problem("b", "is odd", "none", fatal=False)], "all was kept"),
    LostCaseError("a", "killed by signal 9"),
]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_errors_cross_processes_with_their_fields(error: SegfitError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert (str(back), vars(back)) == (str(error), vars(error))


def test_the_text_is_problem_and_action() -> None:
    assert [str(error) for error in ERRORS[:4]] == [
        "it is wrong; change it",
        "it is wrong",
        "it failed; rerun",
        "/a/b.png is empty; copy it again",
    ]
    assert str(ERRORS[4]) == "a: is empty; label it\nb: is odd; none"


def test_an_error_becomes_a_problem_of_its_case() -> None:
    assert problem_of("a", InputError("case a: it is wrong", "change it")) == Problem("a", "it is wrong", "change it")
    assert problem_of("a", InputError("it is wrong"), "look") == Problem("a", "it is wrong", "look")
    assert problem_of("a", FileError(Path("/s/x.dcm"), "is empty", "copy"), images=[Path("/s")]).problem == (
        "s/x.dcm is empty"
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("bad\n   bytes"), "bad bytes"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (OSError("broken data stream"), "broken data stream"),
        (EOFError(), "EOFError"),
        (ValueError("Object arrays cannot be loaded when allow_pickle=False"), "ValueError"),
        (
            ValueError("Exceeds the limit: value has 10000 digits; use sys.set_int_max_str_digits() to increase it"),
            "Exceeds the limit: value has 10000 digits",
        ),
        (RuntimeError("Pickles run code. Set the environment variable NUMCODECS_X=1."), "Pickles run code."),
        (RuntimeError("Load failed. This can still be loaded, \x1b[1mif you trust it\x1b[0m."), "Load failed."),
    ],
)
def test_reasons_of_libraries_come_without_their_advice(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason


def test_the_same_word_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(errors, "get_close_matches", lambda word, *_, **__: asked.append(word) or ["spacing"])
    assert {nearest("spacinq", ["spacing", "shape"]) for _ in range(100)} == {" (did you mean 'spacing'?)"}
    assert asked == ["spacinq"]
