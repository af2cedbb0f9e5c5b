"""Means over cases, the reference's form, and folders of label files."""

from __future__ import annotations

import math
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest

from segfit.errors import DatasetError, InputError, Problem, warning
from segfit.evaluation.metrics import Metrics
from segfit.evaluation.summary import CaseMetrics, Pair, Summary, evaluate, evaluate_folder, summarize
from segfit.execution import pool
from segfit.execution.execution import Execution
from segfit.geometry import AxisMap, Grid
from segfit.images.formats import read_label, write_labels
from segfit.images.image import LabelMap
from segfit.labels import LabelClass, LabelScheme
from segfit.progress import SILENT, KeptWarnings

TWO = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2})
REGIONS = LabelScheme.from_declaration({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])


def case(name: str, **metrics: Metrics) -> CaseMetrics:
    return CaseMetrics(case=name, prediction_file=f"p/{name}.nii", reference_file=f"r/{name}.nii", metrics=metrics)


HALF = Metrics.from_counts(tp=1, fp=1, fn=1, tn=7)  # Dice 1/2, IoU 1/3
FULL = Metrics.from_counts(tp=4, fp=0, fn=0, tn=6)
NOTHING = Metrics.from_counts(tp=0, fp=0, fn=0, tn=10)


def test_means_skip_cases_without_a_value() -> None:
    summary = summarize([case("x", a=HALF, b=FULL), case("y", a=NOTHING, b=HALF)], TWO.classes)
    assert summary.mean["a"].dice == 0.5
    assert summary.mean["a"].tp == 0.5
    assert summary.mean["b"].dice == 0.75
    assert summary.mean["b"].n_ref == 3.0
    assert summary.foreground_mean.dice == summary.mean_dice == 0.625
    assert summary.foreground_mean.tp == 1.5


def test_a_structure_that_never_occurs() -> None:
    summary = summarize([case("x", a=HALF, b=NOTHING)], TWO.classes)
    assert summary.mean["b"].dice is None
    assert summary.foreground_mean.dice is None
    assert summary.foreground_mean.tn == 8.5
    assert summary.mean_dice == 0.5
    nowhere = summarize([case("x", a=NOTHING, b=NOTHING)], TWO.classes)
    assert nowhere.mean_dice is None


def test_what_a_summary_looks_like() -> None:
    summary = summarize([case("x", a=HALF, b=FULL), case("<y>", a=NOTHING, b=HALF)], TWO.classes)
    assert repr(summary) == str(summary) == "Summary(2 cases, mean Dice 0.625: a 0.500, b 0.750)"
    html = summary.model_copy(update={"warnings": (warning("", "odd"),)})._repr_html_()
    for part in ("mean Dice 0.625", "<th>a</th>", "<td>&lt;y&gt;</td><td>–</td><td>0.500</td>", "<p>odd</p>"):
        assert part in html


def test_a_subset_has_means_of_its_own() -> None:
    summary = summarize([case("x", a=HALF, b=FULL), case("y", a=FULL, b=FULL)], TWO.classes)
    assert summary.subset(["y"]).mean_dice == 1.0
    assert [item.case for item in summary.subset(["y"]).cases] == ["y"]


def test_no_case_and_a_case_twice_are_refused() -> None:
    with pytest.raises(InputError, match="no case"):
        summarize([], TWO.classes)
    with pytest.raises(InputError, match="x occurs twice"):
        summarize([case("x", a=HALF, b=FULL)] * 2, TWO.classes)


def test_a_summary_survives_its_file(tmp_path: Path) -> None:
    summary = summarize([case("x", a=HALF, b=NOTHING)], TWO.classes)
    summary.save(tmp_path / "summary.json")
    assert Summary.load(tmp_path / "summary.json") == summary


def test_the_form_of_the_reference() -> None:
    targets = (LabelClass(name="core", values=(2,)), LabelClass(name="whole", values=(1, 2)))
    form = summarize([case("x", core=NOTHING, whole=HALF)], targets).to_nnunet()
    assert list(form) == ["foreground_mean", "mean", "metric_per_case"]
    assert list(form["mean"]) == ["(1, 2)", "2"]
    assert list(form["mean"]["2"]) == ["Dice", "FN", "FP", "IoU", "TN", "TP", "n_pred", "n_ref"]
    assert math.isnan(form["mean"]["2"]["Dice"])
    assert math.isnan(form["foreground_mean"]["Dice"])
    (first,) = form["metric_per_case"]
    assert (first["prediction_file"], first["reference_file"]) == ("p/x.nii", "r/x.nii")
    assert first["metrics"]["(1, 2)"] == {
        "Dice": 0.5,
        "FN": 1,
        "FP": 1,
        "IoU": 1 / 3,
        "TN": 7,
        "TP": 1,
        "n_pred": 2,
        "n_ref": 2,
    }


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


def test_summaries_of_earlier_versions_are_read() -> None:
    one = case("a", a=HALF)
    content = one.model_dump()
    content["scores"] = content.pop("metrics")
    assert CaseMetrics.model_validate(content) == one
    summary = summarize([case("x", a=HALF, b=FULL)], TWO.classes)
    content = summary.model_dump()
    content["targets"] = content.pop("classes")
    assert Summary.model_validate(content) == summary
