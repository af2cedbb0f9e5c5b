from __future__ import annotations

import numpy as np
import pytest

from segfit.planning.spacing import axis_order, median_shape, target_spacing


def test_target_is_the_median_where_voxels_are_about_equal() -> None:
    spacings = np.array([[1.0, 1.0, 1.0], [2.0, 1.5, 1.0], [3.0, 2.0, 1.0]])
    assert target_spacing(spacings, np.full((3, 3), 100.0)) == (2.0, 1.5, 1.0)


def test_a_coarse_axis_takes_its_tenth_percentile() -> None:
    spacings = np.array([[2.0 + i, 0.5, 0.5] for i in range(11)])  # 2 ... 12, median 7
    shapes = np.tile([20.0, 256.0, 256.0], (11, 1))
    assert target_spacing(spacings, shapes) == (3.0, 0.5, 0.5)


def test_a_coarse_axis_never_gets_finer_than_the_others() -> None:
    spacings = np.array([[0.1, 0.5, 0.4]] * 3 + [[5.0, 0.5, 0.4]] * 8)
    shapes = np.tile([20.0, 256.0, 256.0], (11, 1))
    assert target_spacing(spacings, shapes) == (0.5 + 1e-5, 0.5, 0.4)


def test_a_coarse_axis_with_many_voxels_keeps_its_median() -> None:
    spacings = np.array([[2.0 + i, 0.5, 0.5] for i in range(11)])
    assert target_spacing(spacings, np.tile([100.0, 256.0, 256.0], (11, 1))) == (7.0, 0.5, 0.5)


@pytest.mark.parametrize(
    ("spacing", "order"),
    [((1.0, 1.0, 1.0), (0, 1, 2)), ((1.0, 3.0, 1.0), (1, 0, 2)), ((0.5, 0.7, 0.9), (2, 0, 1))],
)
def test_the_coarsest_axis_comes_first(spacing: tuple[float, ...], order: tuple[int, ...]) -> None:
    assert axis_order(spacing) == order


def test_median_shape_rounds_half_to_even_and_may_end_in_a_half() -> None:
    spacings = np.array([[1.0, 1.0], [1.0, 1.0]])
    shapes = np.array([[5.0, 10.0], [7.0, 11.0]])
    # 5 / 2 and 7 / 2 round to 2 and 4
    assert median_shape(spacings, shapes, (2.0, 1.0)) == (3.0, 10.5)
