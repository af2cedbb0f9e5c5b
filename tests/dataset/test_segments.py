"""Names, values, layers and places that label files tell themselves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from segfit.dataset.annotation import read_labels
from segfit.dataset.checks import OBJECTS, OVERLAP, check_dataset
from segfit.dataset.contents import FileHashes
from segfit.dataset.label_grid import uncropped
from segfit.dataset.layouts import describe, inspect_dataset, open_dataset
from segfit.dataset.layouts.segments import LABEL_NAMES
from segfit.errors import Problem
from segfit.images.formats import read_grid, read_image, read_label, segments_of
from segfit.options import DatasetOptions

SHAPE = (6, 8, 10)
_ORGANS = {"liver": (1, 0), "spleen": (2, 0)}
_LAYERS = {"liver": (1, 0), "tumour": (1, 1)}


def a_map() -> NDArray[np.uint8]:
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:4, 1:6, 1:6] = 1
    labels[4:, 6:, 7:] = 2
    return labels


def layers() -> NDArray[np.uint8]:
    """Return a liver, and a tumour at its rim, as (z, y, x, layers)."""
    liver, tumour = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    liver[1:5, 1:6, 1:6] = 1
    tumour[4:, 5:7, 5:7] = 1
    return np.stack([liver, tumour], -1)


def written(
    path: Path, array: NDArray[Any], texts: Mapping[str, str] | None = None, start: Sequence[float] = (0, 0, 0)
) -> Path:
    """Write a NRRD file as 3D Slicer does: with keys, and beginning at a voxel (z, y, x) of the grid of an image."""
    image = sitk.GetImageFromArray(array, isVector=array.ndim == 4)
    image.SetSpacing((0.5, 1.0, 2.0))
    image.SetDirection((1, 0, 0, 0, 0, -1, 0, 1, 0))
    spacing, turned = np.array((0.5, 1.0, 2.0)), np.array(image.GetDirection()).reshape(3, 3)
    image.SetOrigin((np.array((7.0, -3.0, 20.0)) + turned @ (spacing * np.array(start)[::-1])).tolist())
    for key, value in (texts or {}).items():
        image.SetMetaData(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), True)
    return path


def texts_of(segments: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    texts = {"Segmentation_ReferenceImageExtentOffset": "0 0 0"}
    for number, (name, (value, layer)) in enumerate(segments.items()):
        texts |= {f"Segment{number}_Name": name, f"Segment{number}_LabelValue": str(value)}
        texts |= {f"Segment{number}_Layer": str(layer)}
    return texts


def dataset(root: Path, array: NDArray[Any], *segments: Mapping[str, tuple[int, int]], **declared: Any) -> Path:
    """Write five cases in paired folders; the last of the segments are those of all further cases."""
    for number in range(5):
        image = np.random.default_rng(number).integers(0, 1000, SHAPE).astype(np.int16)
        written(root / f"images/c{number}.nrrd", image)
        named = segments[min(number, len(segments) - 1)]
        written(root / f"labels/c{number}.seg.nrrd", array, texts_of(named))
    if declared:
        (root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, **declared}}))
    return root


def classes_of(root: Path) -> dict[str, int]:
    scheme = open_dataset(root).labels
    return {one.name: scheme.stored_values[one.values[0]] for one in scheme.classes}


def checked(root: Path) -> list[Problem]:
    """All cases of these datasets are labelled alike."""
    return [problem for problem in check_dataset(root) if problem.code != "same_label"]


def codes(root: Path) -> list[tuple[str, str, bool]]:
    return [(problem.case, problem.code, problem.fatal) for problem in checked(root)]


def test_segments_name_the_values(tmp_path: Path) -> None:
    root = dataset(tmp_path, a_map(), _ORGANS)
    assert classes_of(root) == {"liver": 1, "spleen": 2}
    assert codes(root) == []
    assert describe(open_dataset(root))[0] == "paired folders: 5 training cases, 0 test cases"


def test_values_without_a_name_of_their_own_keep_their_number(tmp_path: Path) -> None:
    names = {"Segment_1": (1, 0), "spleen": (2, 0), "absent": (3, 0)}
    assert classes_of(dataset(tmp_path, a_map(), names)) == {"label 1": 1, "spleen": 2}


@pytest.mark.parametrize(
    "other", [{"spleen": (1, 0), "liver": (2, 0)}, {"liver": (1, 0), "milt": (2, 0)}, {"liver": (2, 0)}]
)
def test_contradictions_between_cases_are_refused(tmp_path: Path, other: Mapping[str, tuple[int, int]]) -> None:
    root = dataset(tmp_path, a_map(), _ORGANS, other, _ORGANS)
    _, problems = inspect_dataset(root)
    assert {(problem.case, problem.code, problem.fatal) for problem in problems} == {("c1", LABEL_NAMES, True)}


def test_what_is_declared_names_the_values(tmp_path: Path) -> None:
    root = dataset(tmp_path / "a", a_map(), _ORGANS, {"liver": (1, 0), "milt": (2, 0)}, liver=1, Spleen=2)
    assert classes_of(root) == {"liver": 1, "Spleen": 2}
    assert codes(root) == []
    root = dataset(tmp_path / "b", a_map(), _ORGANS, {"spleen": (1, 0), "liver": (2, 0)}, _ORGANS, liver=1, spleen=2)
    assert codes(root) == [("c1", LABEL_NAMES, False)]  # and c1 is taken by its names
    opened = open_dataset(root)
    exchanged = np.array([0, 2, 1])[a_map()]
    assert np.array_equal(read_labels(opened.case("c1"), opened.labels).array[0], exchanged)
    assert np.array_equal(read_labels(opened.case("c2"), opened.labels).array[0], a_map())


def test_layers_are_merged_by_names_and_counted_where_they_overlap(tmp_path: Path) -> None:
    exchanged = {"tumour": (1, 1), "liver": (1, 0)}
    root = dataset(tmp_path, layers(), _LAYERS, exchanged)
    assert classes_of(root) == {"liver": 1, "tumour": 2}
    (told,) = checked(root)
    assert (told.code, told.fatal) == (OVERLAP, False)
    assert 'cover 5 voxels of "liver" (1.00% of all, 1% in c4)' in told.problem
    opened = open_dataset(root)
    assert "segments taken by name" in describe(opened)[0]
    expected = np.where(layers()[..., 1], 2, layers()[..., 0])
    for case in opened.training:
        assert np.array_equal(read_labels(case, opened.labels).array[0], expected)
    hashes = FileHashes()
    masks = case.masks
    changed = case.model_copy(update={"masks": (masks[0].model_copy(update={"layer": 1}), masks[1])})
    assert hashes.case(case) != hashes.case(changed)
    assert len(case.label_files) == 1


def test_layers_follow_what_is_declared(tmp_path: Path) -> None:
    root = dataset(tmp_path, layers(), _LAYERS, tumour=7, liver=9)
    opened = open_dataset(root)
    inner = read_labels(opened.case("c0"), opened.labels).array[0]
    assert [(one.name, one.values) for one in opened.labels.classes] == [("tumour", (1,)), ("liver", (2,))]
    assert np.array_equal(inner, np.where(layers()[..., 0], 2, layers()[..., 1]))
    (root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1}}))
    _, problems = inspect_dataset(root)
    assert {problem.case for problem in problems if problem.fatal} == {f"c{number}" for number in range(5)}
    assert 'the segment "tumour"' in problems[0].problem


def test_layers_need_names_in_every_file(tmp_path: Path) -> None:
    root = dataset(tmp_path, layers(), _LAYERS)
    written(root / "labels/c2.seg.nrrd", a_map())
    assert [problem.case for problem in inspect_dataset(root)[1] if problem.fatal] == ["c2"]


def test_a_layer_that_is_not_there_is_told(tmp_path: Path) -> None:
    root = dataset(tmp_path, layers(), {"liver": (1, 0), "tumour": (1, 5)})
    assert all("segment in layer 5" in problem.problem for problem in check_dataset(root))


def test_old_segmentations_have_a_layer_per_segment(tmp_path: Path) -> None:
    path = written(tmp_path / "old.seg.nrrd", layers(), {"Segment0_Name": "liver", "Segment1_ID": "tumour"})
    assert segments_of(path) == (("liver", 1, 0), ("tumour", 1, 1))


def test_segments_may_number_objects(tmp_path: Path) -> None:
    root = dataset(tmp_path, a_map(), _ORGANS)
    for number in range(5):
        labels = np.zeros(SHAPE, np.uint8)
        labels[0, 0, : number + 2] = np.arange(1, number + 3)
        names = {f"Segment_{value}": (value, 0) for value in range(1, number + 3)}
        written(root / f"labels/c{number}.seg.nrrd", labels, texts_of(names))
    assert codes(root) == [("dataset", OBJECTS, True)]


def test_a_cropped_segmentation_is_set_into_its_image(tmp_path: Path) -> None:
    root = dataset(tmp_path, a_map(), _ORGANS)
    cropped = a_map()[1:, 1:, 1:]
    written(root / "labels/c1.seg.nrrd", cropped, texts_of(_ORGANS), start=(1, 1, 1))
    assert codes(root) == []
    opened = open_dataset(root)
    assert np.array_equal(read_labels(opened.case("c1"), opened.labels).array[0], a_map())
    merged = opened.taken(DatasetOptions(labels="objects-as-foreground"))
    assert np.array_equal(read_labels(merged.case("c1"), merged.labels).array[0], a_map() > 0)


@pytest.mark.parametrize(
    ("start", "texts"),
    [((1, 1, 1), {}), ((2, 1, 1), texts_of(_ORGANS))],
    ids=["no segmentation", "labels outside"],
)
def test_other_parts_of_an_image_do_not_fit(tmp_path: Path, start: Sequence[float], texts: Mapping[str, str]) -> None:
    image = written(tmp_path / "image.nrrd", np.zeros(SHAPE, np.int16))
    label = written(tmp_path / "label.nrrd", a_map()[1:, 1:, 1:], texts, start=start)
    grid, read = read_grid(image), read_label(label)
    assert uncropped(read, grid) is read
    assert grid.mismatch(read.grid)


def test_a_cropped_segmentation_between_voxels_is_told_as_any_label(tmp_path: Path) -> None:
    root = dataset(tmp_path, a_map(), _ORGANS)
    written(root / "labels/c1.seg.nrrd", a_map()[1:, 1:, 1:], texts_of(_ORGANS), start=(1, 1.4, 1))
    (told,) = checked(root)
    assert (told.case, told.fatal) == ("c1", False)
    assert "0.40 voxels away" in told.problem


def test_a_larger_segmentation_is_cut_where_nothing_is_labelled(tmp_path: Path) -> None:
    image = written(tmp_path / "image.nrrd", np.zeros(SHAPE, np.int16))
    label = written(tmp_path / "label.nrrd", np.pad(a_map(), 2), texts_of(_ORGANS), start=(-2, -2, -2))
    found = uncropped(read_label(label), read_grid(image))
    assert np.array_equal(found.array[0], a_map())
    assert read_image(image).grid.mismatch(found.grid) == ""


def test_tables_of_labels_in_nifti_name_the_values(tmp_path: Path) -> None:
    table = (
        '<?xml version="1.0"?><CaretExtension><VolumeInformation Index="0"><LabelTable>'
        '<Label Key="0" Red="0">Unknown</Label><Label Key="1" Red="0.2" Alpha="1"><![CDATA[liver]]></Label>'
        '<Label Key="2" Red="1">spleen &amp; splenule</Label><Label Key="9">absent</Label>'
        "</LabelTable></VolumeInformation></CaretExtension>"
    )
    for number in range(5):
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
        voxels = np.random.default_rng(number).integers(0, 1000, SHAPE).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / f"images/c{number}.nii.gz")
        label = nibabel.Nifti1Image(a_map(), np.eye(4))
        if number:
            label.header.extensions.append(nibabel.nifti1.Nifti1Extension(0, table.encode()))
        nibabel.save(label, tmp_path / f"labels/c{number}.nii.gz")
    assert segments_of(tmp_path / "labels/c0.nii.gz") == ()
    assert classes_of(tmp_path) == {"liver": 1, "spleen & splenule": 2}
    assert codes(tmp_path) == []
