"""Largest components, drawn by hand and against scipy's labelling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from segfit.connected_components import PostprocessingStep, apply_steps, keep_largest, strays


def test_the_small_component_is_removed_and_other_values_stay() -> None:
    labels = np.array(
        [
            [1, 1, 0, 0, 0],
            [1, 0, 0, 2, 1],
            [0, 0, 0, 2, 1],
        ],
        np.uint8,
    )
    kept = keep_largest(labels, (1,))
    assert kept.dtype == np.uint8
    assert kept.tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 2, 0], [0, 0, 0, 2, 0]]
    assert labels[1, 4] == 1  # the input is not changed
    assert keep_largest(labels, (1, 2)).tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 2, 1], [0, 0, 0, 2, 1]]


def test_voxels_that_share_a_corner_are_connected() -> None:
    volume = np.zeros((3, 3, 3), np.int16)
    volume[0, 0, 0] = volume[1, 1, 1] = volume[2, 2, 2] = 4
    assert keep_largest(volume, (4,)) is volume
    plane = np.eye(4, dtype=np.int16)
    assert keep_largest(plane, (1,)) is plane


def test_equally_large_components_are_all_kept() -> None:
    labels = np.array([[1, 1, 0, 1, 1, 0, 1]])
    assert keep_largest(labels, (1,)).tolist() == [[1, 1, 0, 1, 1, 0, 0]]
    tie = np.array([[1, 0, 1]])
    assert keep_largest(tie, (1,)) is tie


def test_nothing_to_look_at() -> None:
    empty = np.zeros((2, 3, 4), np.uint8)
    assert strays(empty, (1,)) is None
    assert strays(np.ones((2, 2), np.uint8), ()) is None
    assert keep_largest(empty, (1, 2)) is empty


def test_steps_are_applied_in_order() -> None:
    labels = np.array([[1, 2, 2, 0, 1, 1, 1]])
    both = PostprocessingStep(values=(1, 2), text="keep only the largest connected component of the foreground")
    one = PostprocessingStep(values=(1,), text="keep only the largest connected component of a")
    assert apply_steps(labels, ()) is labels
    assert apply_steps(labels, [both, one]).tolist() == [[0, 2, 2, 0, 1, 1, 1]]  # the tie of both keeps 3 and 3
    assert apply_steps(np.array([[1, 2, 2, 2, 0, 1, 1]]), [both, one]).tolist() == [[1, 2, 2, 2, 0, 0, 0]]
    assert apply_steps(np.array([[1, 2, 2, 2, 0, 1, 1]]), [one, both]).tolist() == [[0, 2, 2, 2, 0, 0, 0]]


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (1, 1, 7), (1, 7, 1), (7, 1, 1)])
def test_rows_of_a_single_voxel(shape: tuple[int, ...]) -> None:
    labels = np.zeros(max(shape), np.uint8)
    labels[[0, 3]] = 1
    assert keep_largest(labels.reshape(shape), (1,)).sum() == 2
    labels[2] = 1
    assert keep_largest(labels.reshape(shape), (1,)).reshape(-1).tolist()[:4] == [0, 0, 1, 1]


def largest_by_scipy(labels: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
    components, count = ndimage.label(np.isin(labels, values), np.ones((3,) * labels.ndim))
    sizes = [int((components == i).sum()) for i in range(1, count + 1)]
    result = labels.copy()
    for i, size in enumerate(sizes, 1):
        if size < max(sizes):
            result[components == i] = 0
    return result


@pytest.mark.parametrize("shape", [(5, 6, 7), (1, 8, 9), (12, 13), (1, 7, 1), (1, 9)])
@given(data=st.data())
def test_agrees_with_scipy(shape: tuple[int, ...], data: st.DataObject) -> None:
    labels = data.draw(arrays(np.uint8, shape, elements=st.sampled_from([0, 0, 0, 1, 2]), fill=st.just(0)))
    for values in ((1,), (1, 2)):
        np.testing.assert_array_equal(keep_largest(labels, values), largest_by_scipy(labels, values))
        fortran = np.asfortranarray(labels)
        np.testing.assert_array_equal(keep_largest(fortran, values), largest_by_scipy(labels, values))
