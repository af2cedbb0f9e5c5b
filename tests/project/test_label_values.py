"""Labels of any values, masks per class and incomplete cases, from the files to the predictions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segfit.bundle.bundle import card
from segfit.dataset.layouts import open_dataset
from segfit.errors import DatasetError
from segfit.evaluation.evaluate import evaluate
from segfit.evaluation.pairs import Pair
from segfit.files import read_json, write_json
from segfit.images.formats import read_grid, read_label, write_labels
from segfit.images.image import LabelMap
from segfit.inference.model import load_model
from segfit.project import Project

STORED = {"background": 0, "lesion": 7, "organ": 500}


def relabelled(source: Path, folder: Path) -> Path:
    """Copy a phantom with labels 1 (organ) and 2 (lesion) as 500 and 7."""
    shutil.copytree(source, folder)
    write_json(folder / "dataset.json", read_json(source / "dataset.json") | {"labels": STORED})
    table = np.array([0, 500, 7], np.uint16)
    for path in (*folder.glob("labelsTr/*"), *folder.glob("labelsTs/*")):
        write_labels(path, LabelMap(table[read_label(path).array[0]], read_grid(path)))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, volumes: Path) -> Project:
    folder = tmp_path_factory.mktemp("labels")
    settings = ["training.steps=150", "planning.base_features=8", "planning.batch_size=2", "planning.folds=0"]
    project = Project.create(folder / "p", relabelled(volumes, folder / "Dataset003_Far"), settings=settings)
    project.run()
    return project


def test_predictions_have_the_values_of_the_dataset(finished: Project) -> None:
    scheme = finished.dataset.labels
    assert scheme.stored_values == (0, 7, 500)
    fold = finished.splits().folds[0]
    paths = [finished.findings().validated[case] / f"{case}.nii.gz" for case in fold.validation]
    paths += [finished.folder.predictions / f"{case.id}.nii.gz" for case in finished.dataset.test]
    seen: set[int] = set()
    for path in paths:
        stored = nib.load(path)  # type: ignore[attr-defined]
        assert stored.get_data_dtype() == (np.uint16 if np.asarray(stored.dataobj).max() >= 255 else np.uint8)
        seen |= set(np.unique(np.asarray(stored.dataobj)).tolist())
    assert seen <= {0, 7, 500}
    assert 500 in seen


def test_scores_are_those_of_the_values(finished: Project) -> None:
    summary = finished.evaluate()
    assert summary is not None
    assert set(summary.mean) == {"organ", "lesion"}
    assert summary.mean["organ"].dice is not None
    assert summary.mean["organ"].dice > 0.3
    case = finished.dataset.test[0]
    prediction = np.asarray(nib.load(finished.folder.predictions / f"{case.id}.nii.gz").dataobj)  # type: ignore[attr-defined]
    reference = np.asarray(nib.load(case.label).dataobj)  # type: ignore[attr-defined,arg-type]
    common = np.count_nonzero((prediction == 500) & (reference == 500))
    expected = 2 * common / (np.count_nonzero(prediction == 500) + np.count_nonzero(reference == 500))
    found = next(item for item in summary.cases if item.case == case.id).metrics["organ"].dice
    assert found == pytest.approx(expected)


def test_a_reference_scores_one_against_itself(finished: Project) -> None:
    cases = [case for case in finished.dataset.test if case.label is not None]
    pairs = [Pair.of_case(case, case.label, finished.dataset.labels) for case in cases if case.label is not None]
    summary = evaluate(pairs, finished.dataset.labels)
    assert [summary.mean[name].dice for name in ("organ", "lesion")] == [1.0, 1.0]


def test_the_fingerprint_and_the_store_see_consecutive_values(finished: Project) -> None:
    from segfit.preprocessing.store import CaseStore

    case = finished.dataset.training[0]
    assert case.label is not None
    counts = dict(zip(*np.unique(read_label(case.label).array, return_counts=True), strict=True))
    record = finished.fingerprint().cases[0]
    assert record.label_voxels[1] == counts[7]
    assert record.label_voxels[2] == counts[500]
    stored = CaseStore(finished.folder.cases).open(finished.preprocess()["3d_fullres"][case.id]).labels()
    assert stored is not None
    assert set(np.unique(stored)) <= {-1, 0, 1, 2}
    assert {1, 2} <= set(np.unique(stored))


def test_the_model_answers_in_the_values_of_the_dataset(finished: Project, tmp_path: Path) -> None:
    model = load_model(finished.folder.model, "cpu")
    case = finished.dataset.test[0]
    result = model.predict(case.images[0])
    assert result.labels.dtype == np.uint16
    assert set(np.unique(result.labels)) <= {0, 7, 500}
    result.save(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(read_label(tmp_path / "x.nii.gz").array[0], result.labels)
    described = card(model.manifest).splitlines()
    assert any("organ" in line and "500" in line for line in described), described


def test_masks_per_structure_give_the_same_preprocessed_cases(volumes: Path, tmp_path: Path, tiny: list[str]) -> None:
    source = open_dataset(volumes)
    root = tmp_path / "masks"
    for case in source.training:
        (root / "images").mkdir(parents=True, exist_ok=True)
        shutil.copy(case.images[0], root / "images" / f"{case.id}.nii.gz")
        assert case.label is not None
        label = read_label(case.label)
        (root / "labels" / case.id).mkdir(parents=True)
        for name, value in (("organ", 1), ("lesion", 2)):  # the organ goes on beneath the lesion
            mask = label.array[0] >= value if name == "organ" else label.array[0] == value
            write_labels(root / "labels" / case.id / f"{name}.nii.gz", LabelMap(mask.astype(np.uint8), label.grid))
    names = {"background": 0, "organ": 1, "lesion": 2}
    (root / "dataset.json").write_text(json.dumps({"labels": names, "channel_names": {"0": "MRI"}}))
    with pytest.raises(DatasetError, match="--labels exclusive"):
        Project.create(tmp_path / "p", root, settings=tiny).fingerprint()
    merged = Project.open(tmp_path / "p", settings=["dataset.labels=exclusive"]).fingerprint()
    expected = Project.create(tmp_path / "q", volumes, settings=tiny).fingerprint()
    for one, two in zip(merged.cases, expected.cases, strict=True):
        assert (one.label_voxels, one.label_centroids) == (two.label_voxels, two.label_centroids)
    assert merged.intensities == expected.intensities


def test_incomplete_cases_are_left_out_of_a_project(volumes: Path, tmp_path: Path, tiny: list[str]) -> None:
    root = tmp_path / "data"
    shutil.copytree(volumes, root)
    cases = [case.id for case in open_dataset(root).training]
    (root / "labelsTr" / f"{cases[0]}.nii.gz").unlink()
    (root / "imagesTr" / f"{cases[3]}_0000.nii.gz").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"its label .* is missing"):
        Project.create(tmp_path / "p", root, settings=tiny)
    settings = [*tiny, "dataset.skip_incomplete=true"]
    project = Project.create(tmp_path / "p", root, settings=settings)
    left = [cases[1], cases[2], cases[4]]
    assert [case.case for case in project.fingerprint().cases] == left
    assert project.fingerprint().num_training == 3
    assert {case for fold in project.splits().folds for case in fold.validation} == set(left)
    told = {item.case: item.problem for item in project.check()}
    assert told[cases[0]].startswith("left out: its label")
    assert told[cases[3]].startswith("left out: ")
    again = Project.open(tmp_path / "p")  # the option is remembered, and the check is not repeated
    assert again.check() == project.check()
    assert [case.id for case in again.dataset.training] == left
    with pytest.raises(DatasetError):
        Project.open(tmp_path / "p", settings=["dataset.skip_incomplete=false"])
