"""Labels on another grid than their image: brought onto it by one function, or refused."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dataset_builder import build

from segfit.dataset.checks import check_dataset
from segfit.dataset.label_grid import on_image_grid
from segfit.dataset.layouts import open_dataset
from segfit.dataset.manifest import Case
from segfit.errors import InputError, Problem
from segfit.fingerprint.measure import measure
from segfit.geometry import AxisMap, Grid
from segfit.images.formats import read_label
from segfit.images.image import Image
from segfit.options import DatasetOptions

AFFINE = np.array([[0.9, 0.1, 0, 30], [-0.1, 0.9, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])
SHAPE = (4, 6, 8)


def labels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.int16)


def a_case(folder: Path, affine: np.ndarray = AFFINE, shape: tuple[int, ...] = SHAPE, **fields: bool) -> Case:
    """Write an image of zeros; the label is given by each test."""
    path = folder / "a_0000.nii.gz"
    image = nibabel.Nifti1Image(np.zeros(shape[::-1], np.int16), affine)
    image.set_qform(affine, 1)
    nibabel.save(image, path)
    return Case(id="a", images=(path,), label=folder / "a.nii.gz", **{"resample_label": True} | fields)


def a_label(array: np.ndarray, affine: np.ndarray | None) -> Image:
    spacing = (1.0,) * 3 if affine is None else tuple(np.linalg.norm(affine[:3, :3], axis=0)[::-1])
    return Image(array[None], Grid(array.shape, spacing, affine))


def test_every_other_order_of_axes_comes_back_exactly(tmp_path: Path) -> None:
    case, array = a_case(tmp_path, resample_label=False), labels()
    for order, flip in product(permutations(range(3)), product((False, True), repeat=3)):
        stored = a_label(array, AFFINE).reoriented(AxisMap(order, flip))
        placed = on_image_grid(case, stored)
        assert np.array_equal(placed.array, array[None])
        assert placed.array.dtype == np.int16


def test_finer_coarser_and_partial_labels(tmp_path: Path) -> None:
    case, array = a_case(tmp_path), labels()
    fine, coarse = np.diag([0.5, 0.5, 0.5, 1.0]), np.diag([2.0, 2.0, 2.0, 1.0])
    for scale in (fine, coarse):  # voxel centres of the finer grid lie a quarter of a coarse voxel off its centre
        scale[:3, 3] = (np.diag(scale)[:3] - 1) / 2
    halves = array.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    assert np.array_equal(on_image_grid(case, a_label(halves, AFFINE @ fine)).array[0], array)
    pairs = array[::2, ::2, ::2]
    expected = pairs.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    assert np.array_equal(on_image_grid(case, a_label(pairs, AFFINE @ coarse)).array[0], expected)
    step = np.eye(4)
    step[:3, 3] = (3, 2, 1)  # the label volume begins inside the image
    part = on_image_grid(case, a_label(array[1:, 2:5, 3:], AFFINE @ step)).array[0]
    expected = np.zeros_like(array)
    expected[1:, 2:5, 3:] = array[1:, 2:5, 3:]
    assert np.array_equal(part, expected)
    step[:3, 3] = (-0.4, 0.4, 0)  # no whole voxel: the same grid, snapped
    snapped = a_label(array, AFFINE @ step)
    assert on_image_grid(case, snapped) is snapped


def test_what_was_not_asked_for_is_left_alone(tmp_path: Path) -> None:
    label = a_label(labels()[::-1].copy(), AFFINE * [1, 1, -1, 1])
    assert on_image_grid(a_case(tmp_path, resample_label=False), label) is label


def test_labels_that_cannot_be_placed(tmp_path: Path) -> None:
    case = a_case(tmp_path)
    with pytest.raises(InputError, match=r"a\.nii\.gz does not fit a_0000\.nii\.gz \(its shape .* both say where"):
        on_image_grid(case, a_label(labels()[1:], None))
    away = AFFINE.copy()
    away[0, 3] += 500
    with pytest.raises(InputError, match=r"\(it lies .* voxels away \(.* mm\)\) .*: nothing that is labelled lies in"):
        on_image_grid(case, a_label(labels(), away))
    empty = on_image_grid(case, a_label(np.zeros(SHAPE, np.int16), away))  # nothing is lost
    assert not empty.array.any()


def spoil(root: Path) -> np.ndarray:
    """Store the label of case b with its first axis reversed and twice as long; return what it means."""
    array = np.zeros((2, 3, 4), np.int16)
    array[0, 1, 1:], array[1, 2, 0] = 1, 2
    affine = np.array([[-1.0, 0, 0, 3], [0, 0.5, 0, -0.25], [0, 0, 1, 0], [0, 0, 0, 1]])
    stored = array[:, :, ::-1].repeat(2, 1)
    nibabel.save(nibabel.Nifti1Image(stored.T, affine), root / "labelsTr" / "b.nii.gz")
    return array


def test_check_offers_and_tells_it(tmp_path: Path) -> None:
    root = build(tmp_path)
    spoil(root)
    problem = "b.nii.gz does not fit b_0000.nii.gz: its shape is (2, 6, 4), expected (2, 3, 4) (array order)"
    (refused,) = check_dataset(root)
    assert (refused.case, refused.problem, refused.fatal) == ("b", problem, True)
    assert refused.action.endswith("; or give --resample-labels")
    told = Problem("b", f"{problem}; its labels are resampled to that image", "check some of them in the report", False)
    assert check_dataset(open_dataset(root).taken(DatasetOptions(resample_labels=True))) == (told,)
    far = np.eye(4)
    far[2, 3] = 99
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 3, 2), np.uint8), far), root / "labelsTr" / "b.nii.gz")
    (lost,) = check_dataset(open_dataset(root).taken(DatasetOptions(resample_labels=True)))
    assert lost.fatal
    assert lost.problem.endswith("cannot be resampled: nothing that is labelled lies in the image")


def test_check_notes_what_is_snapped(tmp_path: Path) -> None:
    root = build(tmp_path)
    for name, shift in (("labelsTr/c.nii.gz", 0.3), ("imagesTr/d_0001.nii.gz", -0.02), ("labelsTr/e.nii.gz", 0.001)):
        image = nibabel.load(root / name)
        affine = image.affine.copy()
        affine[1, 3] += shift
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), affine), root / name)
    action = "resample it if the voxels do not correspond"
    near, nearer = "0.30 voxels away (0.3 mm)", "0.02 voxels away (0.02 mm)"
    assert check_dataset(root) == (
        Problem(
            "c", f"c.nii.gz is {near} from c_0000.nii.gz and is treated as aligned", action, False, code="grid_moved"
        ),
        Problem(
            "d",
            f"d_0001.nii.gz is {nearer} from d_0000.nii.gz and is treated as aligned",
            action,
            False,
            code="grid_moved",
        ),
    )


def test_measurements_are_of_the_resampled_labels(tmp_path: Path) -> None:
    root = build(tmp_path)
    meant = spoil(root)
    dataset = open_dataset(root).taken(DatasetOptions(resample_labels=True))
    cache = tmp_path / "cache"
    found = measure(dataset, "canonical", cache=cache)
    voxels = {case.case: case.label_voxels for case in found.cases}
    assert voxels["b"] == {0: int((meant == 0).sum()), 1: 3, 2: 1}
    with pytest.raises(InputError, match="case b: the label has shape"):  # nothing is recalled of the other way
        measure(open_dataset(root), "canonical", cache=cache)
    assert read_label(root / "labelsTr" / "b.nii.gz").array.shape == (1, 2, 6, 4)  # the file is as it was
