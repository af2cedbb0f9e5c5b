"""Tables of cases as they come from spreadsheets: each has one fault, which is named and never read around."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from dataset_builder import build

from segfit.dataset.checks import check_dataset
from segfit.dataset.layouts import open_dataset
from segfit.errors import DatasetError

HEADER = "case,T1,label"


def row(case: str, *more: str, name: str | None = None) -> str:
    cells = (case if name is None else name, f"imagesTr/{case}_0000.nii.gz", f"labelsTr/{case}.nii.gz", *more)
    return ",".join(cells)


ROWS = [row(case) for case in "abcd"]


def as_table(folder: Path, text: str) -> Path:
    root = build(folder, channels=1)
    (root / "dataset.json").write_text('{"labels": {"background": 0, "organ": 1, "lesion": 2}}')
    (root / "cases.csv").write_text(text, encoding="utf-8")
    return root


FAULTS = {
    "a column twice": (
        "case,T1,T1,label\na,imagesTr/a_0000.nii.gz,imagesTr/b_0000.nii.gz,labelsTr/a.nii.gz\n",
        *("dataset", 'cases.csv has two columns called "T1"', "give every column its own name"),
    ),
    "more cells than names": (
        "\n".join([HEADER, *ROWS, row("e", "extra")]),
        *("dataset", "row 5 of cases.csv has 4 cells, the header 3", "add the missing names"),
    ),
    "a cell without end": (
        "\n".join([HEADER, *ROWS, "e," + "x" * 200_000 + ",labelsTr/e.nii.gz"]),
        *("dataset", "cases.csv is not a CSV table (field larger than field limit", "save it again as CSV"),
    ),
    "a path longer than any name": (
        "\n".join([HEADER, *ROWS, "e," + "x" * 300 + ".nii.gz,labelsTr/e.nii.gz"]),
        *("e", f"the listed file {'x' * 300}.nii.gz is missing", "add it or correct its path"),
    ),
    "the home folder of nobody": (
        "\n".join([HEADER, *ROWS, "e,~nobodys-home/e.nii.gz,labelsTr/e.nii.gz"]),
        *("e", "the listed file ~nobodys-home/e.nii.gz is missing", "add it or correct its path"),
    ),
    "no column of cases": (
        "\n".join(["id,T1,label", *ROWS]),
        *("dataset", 'cases.csv has the columns id, T1, label, but no column "case"', "add it"),
    ),
    "a case called ..": (
        "\n".join([HEADER, *ROWS, row("e", name="..")]),
        "dataset",
        'row 5 of cases.csv has the case "..", which is not a valid file name: it is a path',
        "give every case its own name",
    ),
    "a hidden case": (
        "\n".join([HEADER, *ROWS, row("e", name=".e")]),
        *(
            "dataset",
            'row 5 of cases.csv has the case ".e", which is not a valid file name',
            "give every case its own name",
        ),
    ),
    "an unclosed quote": (
        "\n".join([HEADER, ROWS[0], '"' + ROWS[1], *ROWS[2:]]),
        *("dataset", 'row 2 of cases.csv has the case "b,imagesTr/b_0000.nii.gz,', "give every case its own name"),
    ),
    "a zero byte": (
        "\n".join([HEADER, *ROWS, row("e", name="e\0")]),
        *(
            "dataset",
            'row 5 of cases.csv has the case "e\0", which is not a valid file name',
            "give every case its own name",
        ),
    ),
    "a mistyped set": (
        "\n".join([f"{HEADER},set", *(row(case, "training") for case in "abcd"), row("e", "tset")]),
        *("e", 'has "tset" in the column "set" of cases.csv', "write training or train or test"),
    ),
    "nothing but test cases": (
        "\n".join([f"{HEADER},set", *(row(case, "test") for case in "abcde")]),
        *("dataset", "{root} has no training case", "add images with labels"),
    ),
    "no weight at all": (
        "\n".join([f"{HEADER},weight", *(row(case, "0") for case in "abcde")]),
        *(
            "dataset",
            "fewer than two training cases have a weight above 0 in cases.csv",
            "give more cases a weight; every fold leaves some out",
        ),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_a_table_is_named(tmp_path: Path, fault: str) -> None:
    text, case, problem, action = FAULTS[fault]
    root = as_table(tmp_path, text)
    problems = check_dataset(root)
    told = [p for p in problems if p.case == case and p.problem.startswith(problem.format(root=root)) and p.fatal]
    assert len(told) == 1, problems
    assert told[0].action.startswith(action)
    with pytest.raises(DatasetError):
        open_dataset(root)


@pytest.mark.parametrize("text", ["\n".join([HEADER, *ROWS]).replace(",", ";"), "\r\n".join([HEADER, *ROWS, ""])])
def test_habits_of_spreadsheets_are_no_fault(tmp_path: Path, text: str) -> None:
    assert [case.id for case in open_dataset(as_table(tmp_path, "\ufeff" + text)).training] == list("abcd")


def test_a_folder_that_cannot_be_opened_is_one_problem(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 300), Path("~nobodys-home/data")):
        with pytest.raises(DatasetError, match=r"cannot be read|does not exist") as caught:
            open_dataset(path)
        assert len(caught.value.problems) == 1


def test_a_name_that_is_no_text_is_a_problem(tmp_path: Path) -> None:
    root = build(tmp_path, channels=1)
    for folder, suffix in (("imagesTr", b"_0000.nii.gz"), ("labelsTr", b".nii.gz")):
        inside = os.fsencode(root / folder)
        os.rename(os.path.join(inside, b"b" + suffix), os.path.join(inside, b"gr\xf6\xdfe" + suffix))  # noqa: PTH104, PTH118
    fatal = [problem for problem in check_dataset(root) if problem.fatal]
    assert [(p.case, p.problem) for p in fatal] == [
        ("gr\\udcf6\\udcdfe", "its name has control characters or is not UTF-8 text")
    ]
