"""Errors say what is wrong and what to do in fields, and cross processes."""

import pickle
from pathlib import Path

import pytest

from segfit.errors import DatasetError, InputError, Problem, SegfitError, StageError
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
