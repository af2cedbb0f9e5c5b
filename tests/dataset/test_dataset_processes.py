"""Checks, label values and export give in processes what they give in threads, and survive the loss of a process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import check_tasks
import numpy as np
import pytest
from dataset_builder import SHAPE, a_label, build, write_volume

from segfit.dataset import checks
from segfit.dataset.checks import check_dataset
from segfit.dataset.layouts import common, leave_out, open_dataset
from segfit.dataset.manifest import Case
from segfit.errors import InputError
from segfit.nnunet import dataset_export
from segfit.nnunet.dataset_export import export_nnunet


def spoilt(folder: Path) -> Path:
    """A dataset with something wrong in the image, the label and the file of a case each."""
    root = build(folder)
    write_volume(root / "imagesTr" / "a_0000.nii.gz", np.full(SHAPE, 7, np.int16))
    write_volume(root / "labelsTr" / "b.nii.gz", a_label(1, 5))
    (root / "imagesTr" / "c_0001.nii.gz").write_bytes(b"\x1f\x8b no gzip")
    for channel in range(2):
        write_volume(root / "imagesTs" / f"t_000{channel}.nii.gz", shift=4.0 * channel)
    return root


def paired(folder: Path) -> Path:
    """Images and labels whose values nobody declares."""
    for number, case in enumerate("abc"):
        write_volume(folder / "images" / f"{case}.nii.gz", np.arange(24, dtype=np.int16).reshape(SHAPE) + number)
        write_volume(folder / "labels" / f"{case}.nii.gz", a_label(number + 1))
    return folder


def test_processes_find_what_threads_find(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = spoilt(tmp_path)
    by_threads = check_dataset(root)
    assert [problem.case for problem in by_threads if problem.fatal] == ["b", "c"]
    cases = request.getfixturevalue("done_by_processes")
    assert check_dataset(root) == by_threads
    assert sorted(cases) == ["a", "b", "c", "d", "e", "t"]


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (check_tasks.check_or_be_killed, r"worker killed by signal 9 \(Killed\) at [\d.]+ [MG]B"),
        (check_tasks.check_or_run_out, r"worker ran out of memory( at [\d.]+ [MG]B)?"),
    ],
)
@pytest.mark.usefixtures("done_by_processes")
def test_a_case_that_no_worker_survives_is_a_problem(
    work: object, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = build(tmp_path)
    write_volume(root / "labelsTr" / "d.nii.gz", a_label(1, 5))
    write_volume(root / "imagesTs" / "b_0000.nii.gz")
    write_volume(root / "imagesTs" / "b_0001.nii.gz")
    monkeypatch.setattr(checks, "_check_item", work)
    lost, wrong, test_case = check_dataset(root)
    assert (lost.case, lost.fatal, lost.transient) == ("b", True, True)
    assert re.fullmatch(
        f"reading failed: {told}, also when run alone; the largest is b_\\S+ with 24 voxels", lost.problem
    )
    assert lost.action == "check again with more free memory or on a larger machine, or remove the case"
    assert (wrong.case, wrong.fatal, wrong.transient) == ("d", True, False)  # the others are checked all the same
    assert (test_case.case, test_case.fatal) == ("b", False)
    assert test_case.problem.startswith("test case: reading failed: worker ")
    kept, _ = leave_out(open_dataset(root), (lost, wrong, test_case))
    assert [case.id for case in kept.training] == ["a", "c", "e"]


def test_processes_read_the_label_values_that_threads_read(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = paired(tmp_path / "set")
    by_threads = open_dataset(root)
    assert [target.name for target in by_threads.labels.classes] == ["label 1", "label 2", "label 3"]
    cases = request.getfixturevalue("done_by_processes")
    assert open_dataset(root) == by_threads
    assert sorted(cases) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]


def test_a_case_too_large_for_threads_is_a_problem_and_the_others_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_case = checks.check_case

    def check_or_run_out(case: Case, *details: Any, **named: Any) -> object:
        if case.id == "b":
            raise MemoryError
        return check_case(case, *details, **named)

    monkeypatch.setattr(checks, "check_case", check_or_run_out)
    (lost,) = check_dataset(build(tmp_path))
    assert (lost.case, lost.fatal, lost.transient) == ("b", True, True)
    assert lost.problem.startswith("reading failed: worker ran out of memory, also when run alone")


@pytest.mark.usefixtures("done_by_processes")
def test_a_label_that_no_worker_survives_says_nothing_and_the_check_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = paired(tmp_path / "set")
    monkeypatch.setattr(common, "_values_of", check_tasks.values_or_be_killed)
    monkeypatch.setattr(checks, "_check_item", check_tasks.check_or_be_killed)
    assert [target.name for target in open_dataset(root).labels.classes] == ["label 1", "label 3"]
    assert [problem.case for problem in check_dataset(root) if problem.fatal] == ["b"]


def test_processes_write_the_files_that_threads_write(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    dataset = open_dataset(build(tmp_path))
    by_threads = export_nnunet(dataset, tmp_path / "Dataset002_Threads")
    cases = request.getfixturevalue("done_by_processes")
    by_processes = export_nnunet(dataset, tmp_path / "Dataset003_Processes")
    assert sorted(cases) == ["a", "b", "c", "d", "e"]
    files = {path.relative_to(by_threads) for path in by_threads.rglob("*")}
    assert files == {path.relative_to(by_processes) for path in by_processes.rglob("*")}
    for file in files:
        if (by_threads / file).is_file():
            assert (by_threads / file).read_bytes() == (by_processes / file).read_bytes(), file


@pytest.mark.usefixtures("done_by_processes")
def test_a_killed_writer_costs_no_case_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(build(tmp_path))
    expected = export_nnunet(dataset, tmp_path / "Dataset002_Copy")
    monkeypatch.setattr(dataset_export, "_write_case", check_tasks.write_or_be_killed_once)
    again = export_nnunet(dataset, tmp_path / "Dataset003_Again")
    assert (tmp_path / "was-killed").exists()
    assert {path.relative_to(expected) for path in expected.rglob("*")} == {
        path.relative_to(again) for path in again.rglob("*")
    }


def test_errors_of_files_cross_processes(tmp_path: Path, done_by_processes: list[str]) -> None:
    root = spoilt(tmp_path)
    with pytest.raises(InputError, match=r"c_0001\.nii\.gz cannot be read \(.*\); copy or export it again"):
        export_nnunet(open_dataset(root), tmp_path / "Dataset002_Copy")
    assert "c" in done_by_processes
    assert not (tmp_path / "Dataset002_Copy").exists()
