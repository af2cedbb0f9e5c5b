"""The whole pipeline on real datasets, with trainings of a few steps: what is asserted is form, not quality."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segfit.dataset.checks import check_dataset
from segfit.dataset.layouts import open_dataset
from segfit.execution.execution import Execution
from segfit.fingerprint.measure import measure
from segfit.images.formats import read_grid, read_label
from segfit.options import Options
from segfit.planning.planner import derive
from segfit.project import Project

pytestmark = [pytest.mark.real_data, pytest.mark.slow]

SETTINGS = ["training.steps=15", "planning.base_features=4", "planning.batch_size=2", "planning.folds=0"]


def test_hippocampus(data: Path, tmp_path: Path) -> None:
    dataset = data / "Dataset004_Hippocampus"
    project = Project.create(tmp_path / "p", dataset, settings=SETTINGS)
    summary = project.run()
    assert summary is not None
    assert len(summary.cases) == len(project.dataset.test) == 20
    assert set(summary.mean) == {target.name for target in project.dataset.labels.classes}
    plan = project.plan()
    assert plan.configurations["3d_fullres"].patch_size == (40, 56, 40)
    assert plan.configurations["3d_fullres"].batch_dice is False
    for case in project.dataset.test:
        path = project.folder.predictions / f"{case.id}.nii.gz"
        image, prediction = nib.load(case.images[0]), nib.load(path)  # type: ignore[attr-defined]
        assert prediction.shape == image.shape
        np.testing.assert_array_equal(prediction.affine, image.affine)
        assert set(np.unique(np.asarray(prediction.dataobj))) <= {0, 1, 2}
    assert (project.folder.report).stat().st_size > 50_000


def test_nuclei(data: Path, tmp_path: Path) -> None:
    project = Project.create(tmp_path / "p", data / "Dataset120_Nuclei", settings=SETTINGS)
    assert project.run() is None  # there are no test images
    validation = project.splits().folds[0].validation
    assert len(validation) == 12
    for name in validation:
        path = project.findings().validated[name] / f"{name}.png"
        assert read_grid(path).shape == read_grid(project.dataset.case(name).images[0]).shape
        assert read_label(path).array.max() <= 2


def test_left_and_right_of_the_mouse_brain_change_places(data: Path) -> None:
    dataset = open_dataset(data / "Dataset204_MouseBrain")
    plan = derive(measure(dataset, "canonical", execution=Execution(workers=1)), dataset.labels, Options())
    values = {target.name: target.values[0] for target in dataset.labels.classes}
    sides = {name: name.replace("Left", "Right") for name in values}
    pairs = {(values[left], values[right]) for left, right in sides.items() if left != right and right in values}
    assert len(pairs) == 17
    recipe, transpose = plan.training["3d_fullres"], plan.configurations["3d_fullres"].preprocessing.transpose
    exchange = recipe.augmentation.exchange
    assert exchange is not None
    assert (recipe.augmentation.mirror_axes, transpose[exchange.axis]) == ((exchange.axis,), 2)
    assert set(exchange.pairs) == pairs
    told = {item.key: item for item in plan.decisions}
    assert told["mirror_axes"].value == [2]
    assert told["exchanged_labels"].inputs == {
        "pairs": 17,
        "on_both_sides_in_spite_of_their_names": ["Left External Capsule", "Left Ventricles", "Left Brain Stem"],
    }


def test_a_dataset_as_it_was_found_is_refused_with_all_its_problems(data: Path, tmp_path: Path) -> None:
    from segfit.errors import DatasetError

    with pytest.raises(DatasetError) as caught:
        Project.create(tmp_path / "p", data / "hippocampus_as_found")
    assert [(item.case, item.problem) for item in caught.value.problems] == [
        ("hippocampus_118", "its label labels/hippocampus_118 is missing")
    ]
    assert not (tmp_path / "p").exists()


def test_a_dataset_as_it_was_found_is_diagnosed_and_usable(data: Path, tmp_path: Path) -> None:
    root = data / "hippocampus_as_found"
    assert [(item.case, item.problem, item.fatal) for item in check_dataset(root)] == [
        ("hippocampus_118", "its label labels/hippocampus_118 is missing", True),
        ("hippocampus_010", "has a label in labels but no image in images", False),
        ("hippocampus_281", "has a label in labels but no image in images", False),
        ("dataset", "1 hidden file: images/.DS_Store", False),
    ]
    project = Project.create(tmp_path / "p", root, settings=[*SETTINGS, "dataset.skip_incomplete=true"])
    assert project.run() is None  # there are no test images
    assert [case.id[-3:] for case in project.dataset.training] == [
        "001",
        "003",
        "004",
        "006",
        "007",
        "008",
        "011",
        "014",
    ]
    assert project.fingerprint().num_training == 8
    for name in project.splits().folds[0].validation:
        path = project.findings().validated[name] / f"{name}.nii.gz"
        assert read_label(path).array.shape == read_label(root / "labels" / path.name).array.shape
