"""A training case in another unit, or with two exchanged classes, is told; no good case is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segfit.dataset.checks import check_dataset
from segfit.dataset.outliers import CaseSketch, exchanged_classes, odd_scales, sketch
from segfit.dataset.phantom import make_phantom
from segfit.execution.execution import Execution
from segfit.geometry import AxisMap, Grid
from segfit.images.formats import read_image, read_label
from segfit.images.nifti import write

ALONE = Execution(workers=1)


def told(folder: Path) -> list[tuple[str, str, bool]]:
    codes = ("odd_scale", "exchanged_classes")
    problems = check_dataset(folder, execution=ALONE)
    return [(item.case, item.code, item.fatal) for item in problems if item.code in codes]


@pytest.mark.parametrize("factor", [1000, 0.001])
def test_one_case_in_another_unit_is_told(tmp_path: Path, factor: float) -> None:
    folder = make_phantom(tmp_path / "Dataset001_A", cases=9, test_cases=0)
    assert told(folder) == []
    path = sorted((folder / "imagesTr").iterdir())[3]
    image = read_image(path)
    write(path, image.array[0].astype(np.float32) * np.float32(factor), image.grid)
    assert told(folder) == [(path.name.removesuffix("_0000.nii.gz"), "odd_scale", False)]


def test_two_exchanged_classes_of_one_case_are_told(tmp_path: Path) -> None:
    folder = make_phantom(tmp_path / "Dataset001_A", cases=12, test_cases=0, shape=(24, 64, 64))
    path = sorted((folder / "labelsTr").iterdir())[5]
    label = read_label(path)
    turned = np.choose(label.array[0], [0, 2, 1]).astype(np.uint8)
    write(path, turned, label.grid)
    assert told(folder) == [(path.name.removesuffix(".nii.gz"), "exchanged_classes", False)]


def volume(seed: int, shape: tuple[int, int, int] = (20, 30, 40)) -> tuple[np.ndarray, np.ndarray]:
    """Two boxes of unlike size, place and brightness."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, dtype=np.uint8)
    top, left = rng.integers(2, 5, 2)
    labels[top : top + 12, 5:18, left : left + 10] = 1
    labels[top + 2 : top + 9, 15:26, left + 20 : left + 28] = 2
    return rng.normal(0, 1, shape) + 3 * labels, labels


def sketches(number: int) -> list[CaseSketch | None]:
    found: list[CaseSketch | None] = []
    for seed in range(number):
        image, labels = volume(seed)
        found.append(sketch([image], labels, AxisMap.identity(3)))
    return found


def test_fewer_cases_than_eight_show_nothing() -> None:
    image, labels = volume(50)
    odd = sketch([1000 * image], np.choose(labels, [0, 2, 1]), AxisMap.identity(3))
    for number in (6, 7, 12):
        cases = [*sketches(number), None, odd]
        enough = number >= 7  # with the odd one
        assert [(n, channel, round(np.log10(factor))) for n, channel, factor in odd_scales(cases)] == [
            (number + 1, 0, 3)
        ] * enough
        assert list(exchanged_classes(cases)) == [(number + 1, 1, 2)] * enough


def test_the_order_of_stored_axes_does_not_matter() -> None:
    image, labels = volume(50)
    axes = AxisMap((2, 0, 1), (True, False, False))
    back = axes.inverse()
    assert sketch([back.apply(image)], back.apply(labels), axes) == sketch([image], labels, AxisMap.identity(3))


def test_scales_of_which_there_are_several_are_not_told() -> None:
    cases = sketches(10)
    for seed in range(2):
        image, labels = volume(100 + seed)
        cases.append(sketch([1000 * image], labels, AxisMap.identity(3)))
    assert list(odd_scales(cases)) == []


def test_constant_channels_and_empty_labels_are_sketched() -> None:
    empty = sketch([np.zeros((4, 4, 4))], np.zeros((4, 4, 4), np.uint8), AxisMap.identity(3))
    assert empty == CaseSketch((None,), {})
    assert list(odd_scales([empty] * 9)) == list(exchanged_classes([empty] * 9)) == []


def test_cases_of_other_axes_and_channels_are_left_out() -> None:
    image, labels = volume(50)
    flat = sketch([image[8]], labels[8], AxisMap.identity(2))
    several = sketch([image, image], labels, AxisMap.identity(3))
    odd = sketch([image], np.choose(labels, [0, 2, 1]), AxisMap.identity(3))
    assert list(exchanged_classes([flat, several, *sketches(9), odd])) == [(11, 1, 2)]
    assert list(exchanged_classes([flat, several])) == list(exchanged_classes([])) == []


@pytest.mark.real_data
@pytest.mark.parametrize(
    "name",
    [
        *("Dataset004_Hippocampus", "Dataset120_Nuclei", "Dataset201_FetalHead"),
        *("Dataset202_WhiteBloodCells", "Dataset203_Retina", "Dataset204_MouseBrain"),
    ],
)
def test_no_case_of_real_datasets_is_told(data: Path, name: str) -> None:
    assert told(data / name) == []


def test_grids_that_do_not_fit_are_not_compared(tmp_path: Path) -> None:
    folder = make_phantom(tmp_path / "Dataset001_A", cases=9, test_cases=0)
    path = sorted((folder / "labelsTr").iterdir())[0]
    label = read_label(path)
    write(path, label.array[0, 1:], Grid(label.array[0, 1:].shape, label.grid.spacing_mm))
    assert told(folder) == []
