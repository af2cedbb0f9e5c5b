"""Label maps compared with references: pairs, and folders of files."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest

from segfit.dataset.object_numbers import as_classes
from segfit.errors import DatasetError, InputError, Problem
from segfit.evaluation.evaluate import evaluate, evaluate_folder
from segfit.evaluation.pairs import Pair
from segfit.evaluation.summary import Summary
from segfit.execution import pool
from segfit.execution.execution import Execution
from segfit.geometry import AxisMap, Grid
from segfit.images.formats import read_label, write_labels
from segfit.images.image import LabelMap
from segfit.labels import LabelScheme
from segfit.options import LabelUse
from segfit.progress import SILENT, KeptWarnings

TWO = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2})


def test_pairs_keep_their_order_and_load_lazily() -> None:
    ones, halves = np.ones((2, 2), int), np.array([[1, 1], [0, 0]])
    pairs = [Pair("b", lambda: ones, lambda: ones), Pair("a", lambda: halves, lambda: ones)]
    summary = evaluate(pairs, TWO, execution=Execution(workers=2))
    assert [(item.case, item.metrics["a"].dice) for item in summary.cases] == [("b", 1.0), ("a", 2 / 3)]


def codes(summary: Summary) -> list[str]:
    return [item.code for item in summary.warnings]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two predicted cases of which one is half right, and a hidden file."""
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    grid = grid_at(0.0)
    labels = np.zeros(grid.shape, np.uint8)
    labels[0] = 1
    for folder in (predictions, references):
        write_labels(folder / "case_a.nii.gz", LabelMap(labels, grid))
    write_labels(predictions / "case_b.nii.gz", LabelMap(labels, grid))
    labels[1] = 1
    write_labels(references / "case_b.nii.gz", LabelMap(labels, grid))
    (predictions / "._case_a.nii.gz").write_bytes(b"")
    return predictions, references


def grid_at(x: float) -> Grid:
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[0, 3] = x
    return Grid((2, 3, 4), (2.0, 1.0, 1.0), affine)


def test_a_folder_is_scored_file_by_file(folders: tuple[Path, Path]) -> None:
    notes = KeptWarnings(SILENT)
    summary = evaluate_folder(*folders, TWO, ending=".nii.gz", execution=Execution(progress=notes))
    assert [item.case for item in summary.cases] == ["case_a", "case_b"]
    assert [item.metrics["a"].dice for item in summary.cases] == [1.0, 2 / 3]
    assert summary.cases[0].prediction_file == (folders[0] / "case_a.nii.gz").as_posix()
    assert notes.warnings == []


def test_processes_score_the_same(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate_folder(*folders, TWO, ending=".nii.gz")
    monkeypatch.setattr(pool, "_PROCESSES_FROM", 1)
    assert evaluate_folder(*folders, TWO, ending=".nii.gz", execution=Execution(workers=2)) == expected
    ones = np.ones((2, 2), int)  # label maps that are not in files stay here
    assert evaluate([Pair("a", lambda: ones, lambda: ones)], TWO).mean_dice == 1.0


def test_missing_counterparts_are_named(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    (predictions / "case_a.nii.gz").unlink()
    with pytest.raises(InputError, match=r"predictions has no prediction for case_a;"):
        evaluate_folder(*folders, TWO, ending=".nii.gz")
    notes = KeptWarnings(SILENT)
    part = evaluate_folder(*folders, TWO, ending=".nii.gz", require_all=False, execution=Execution(progress=notes))
    assert [item.case for item in part.cases] == ["case_b"]
    assert codes(part) == ["no_prediction"]
    assert "case_a of 2" in part.warnings[0].problem
    assert list(part.warnings) == notes.warnings
    (references / "case_b.nii.gz").unlink()
    with pytest.raises(InputError, match=r"references has no reference for case_b;"):
        evaluate_folder(*folders, TWO, ending=".nii.gz")


def test_empty_and_absent_folders_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no prediction that ends in \.png"):
        evaluate_folder(tmp_path / "empty", folders[1], TWO, ending=".png")
    with pytest.raises(InputError, match="is not a folder"):
        evaluate_folder(tmp_path / "nowhere", folders[1], TWO, ending=".nii.gz")


def test_label_files_with_another_ending_are_found_by_their_stem(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    expected = evaluate_folder(*folders, TWO, ending=".nii.gz")
    for path in references.iterdir():
        image = read_label(path)
        write_labels(path.with_name(path.name.removesuffix(".gz")), LabelMap(image.array[0], image.grid))
        path.unlink()
    found = evaluate_folder(*folders, TWO, ending=".nii.gz")
    assert [(item.case, item.metrics) for item in found.cases] == [(item.case, item.metrics) for item in expected.cases]
    (references / "case_a.nrrd").touch()
    with pytest.raises(InputError, match=r"has both case_a\.nii and case_a\.nrrd"):
        evaluate_folder(predictions, references, TWO, ending=".nii.gz")


def test_all_cases_that_cannot_be_scored_are_named(folders: tuple[Path, Path]) -> None:
    (folders[0] / "case_a.nii.gz").write_bytes(b"")
    write_labels(
        folders[0] / "case_b.nii.gz", LabelMap(np.zeros((1, 2, 2), np.uint8), Grid((1, 2, 2), (1.0, 1.0, 1.0)))
    )
    with pytest.raises(DatasetError) as caught:
        evaluate_folder(*folders, TWO, ending=".nii.gz")
    first, second = caught.value.problems
    assert (first.case, first.problem) == ("case_a", "case_a.nii.gz is empty")
    assert second == Problem(
        "case_b",
        "the prediction has shape (1, 2, 2) and its reference (2, 3, 4)",
        "predict on the grid of the reference",
    )
    assert caught.value.outcome == "nothing was evaluated"


def test_values_that_no_class_has_are_told(folders: tuple[Path, Path]) -> None:
    path = folders[0] / "case_b.nii.gz"
    labels = read_label(path)
    array = labels.array[0].copy()
    array.flat[0] = 77
    write_labels(path, LabelMap(array, labels.grid))
    notes = KeptWarnings(SILENT)
    summary = evaluate_folder(*folders, TWO, ending=".nii.gz", execution=Execution(progress=notes))
    assert codes(summary) == ["undeclared_values"]
    assert "the prediction of case_b has undeclared values (77)" in summary.warnings[0].problem
    assert list(summary.warnings) == notes.warnings


def test_pairs_that_lie_apart_in_space_are_refused(folders: tuple[Path, Path]) -> None:
    grid = grid_at(5.0)
    write_labels(folders[0] / "case_b.nii.gz", LabelMap(np.zeros(grid.shape, np.uint8), grid))
    with pytest.raises(DatasetError) as caught:
        evaluate_folder(*folders, TWO, ending=".nii.gz")
    action = "predict on the grid of the reference, or copy its header if the voxels correspond"
    problem = "case_b.nii.gz does not fit its reference: it lies 5.0 voxels away (5 mm)"
    file = str(folders[0] / "case_b.nii.gz")
    assert caught.value.problems == (Problem("case_b", problem, action, file=file),)


def test_pairs_within_half_a_voxel_are_the_same_grid(folders: tuple[Path, Path]) -> None:
    expected = evaluate_folder(*folders, TWO, ending=".nii.gz")
    labels = read_label(folders[0] / "case_b.nii.gz").array[0]
    write_labels(folders[0] / "case_b.nii.gz", LabelMap(labels, grid_at(0.4)))
    notes = KeptWarnings(SILENT)
    assert evaluate_folder(*folders, TWO, ending=".nii.gz", execution=Execution(progress=notes)) == expected
    assert notes.warnings == []


def test_files_without_a_place_are_compared_by_index(folders: tuple[Path, Path]) -> None:
    expected = evaluate_folder(*folders, TWO, ending=".nii.gz")
    labels = read_label(folders[0] / "case_b.nii.gz").array[0]
    write_labels(folders[0] / "case_b.nii.gz", LabelMap(labels, Grid(labels.shape, (1.0, 1.0, 1.0))))
    notes = KeptWarnings(SILENT)
    found = evaluate_folder(*folders, TWO, ending=".nii.gz", execution=Execution(progress=notes))
    assert found.model_copy(update={"warnings": ()}) == expected
    assert list(found.warnings) == notes.warnings
    assert codes(found) == ["compared_by_index"]
    assert "case_b" in found.warnings[0].problem


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_all_orders_of_axes_are_compared_in_space(tmp_path: Path, order: tuple[int, ...]) -> None:
    """Every voxel has a value of its own kind, so that any other way to lay them on each other would score less."""
    grid = grid_at(1.0)
    labels = np.random.default_rng(0).integers(0, 3, grid.shape).astype(np.uint8)
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    for number, flip in enumerate(product((False, True), repeat=3)):
        axes = AxisMap(order, flip)
        write_labels(references / f"{number}.nii.gz", LabelMap(labels, grid))
        write_labels(predictions / f"{number}.nii.gz", LabelMap(axes.apply(labels), axes.apply_grid(grid)))
    notes = KeptWarnings(SILENT)
    summary = evaluate_folder(predictions, references, TWO, ending=".nii.gz", execution=Execution(progress=notes))
    assert [[one.dice for one in case.metrics.values()] for case in summary.cases] == [[1.0, 1.0]] * 8
    turned = [f"{n}" for n in range(8) if n or order != (0, 1, 2)]
    assert codes(summary) == ["axes_turned"]
    assert f"{', '.join(turned[:5])} and {len(turned) - 5} more" in summary.warnings[0].problem
    assert list(summary.warnings) == notes.warnings


@pytest.mark.parametrize(("use", "dice"), [("objects-as-foreground", 1.0), ("classes", 0.0)])
def test_references_that_number_objects(tmp_path: Path, use: LabelUse, dice: float) -> None:
    numbers = np.zeros((1, 12, 12), np.uint8)
    for number in range(6):
        numbers[0, 2 * number, :5] = number + 7
    one = LabelScheme.from_declaration({"background": 0, "cell": 1})
    grid = Grid((12, 12), (1.0, 1.0))
    for folder, array in (("p", (numbers > 0).astype(np.uint8)), ("r", numbers)):
        (tmp_path / folder).mkdir()
        write_labels(tmp_path / folder / "a.png", LabelMap(array[0], grid))
    summary = evaluate_folder(tmp_path / "p", tmp_path / "r", one, ending=".png", label_use=use)
    assert summary.mean_dice == dice
    told = [item.action for item in summary.warnings if item.code == "undeclared_values"]
    assert [("objects-as-foreground" in action) for action in told] == ([True] if use == "classes" else [])


def test_interior_and_boundary_of_references(tmp_path: Path) -> None:
    numbers = np.zeros((1, 12, 12), np.uint8)
    numbers[0, 1:6, 1:6], numbers[0, 6:11, 1:6] = 3, 9
    two = LabelScheme.from_declaration({"background": 0, "interior": 1, "boundary": 2})
    grid = Grid((12, 12), (1.0, 1.0))
    for folder, array in (("p", as_classes(numbers, two, boundary=True).astype(np.uint8)), ("r", numbers)):
        (tmp_path / folder).mkdir()
        write_labels(tmp_path / folder / "a.png", LabelMap(array[0], grid))
    folders = tmp_path / "p", tmp_path / "r"
    summary = evaluate_folder(*folders, two, ending=".png", label_use="objects-as-boundary")
    assert {name: item.n_ref for name, item in summary.mean.items()} == {"interior": 18, "boundary": 32}
    assert summary.mean_dice == 1
    with pytest.raises(InputError):
        evaluate_folder(*folders, two, ending=".png", label_use="objects-as-foreground")
