from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from segfit.cropping import bounding_box, nonzero_mask, slices


@given(st.integers(0, 10_000), st.tuples(*[st.integers(1, 9)] * 3), st.floats(0.3, 1.0))
@settings(max_examples=150, deadline=None)
def test_holes_are_filled_as_by_an_independent_filler(seed: int, shape: tuple[int, ...], density: float) -> None:
    array = (np.random.default_rng(seed).random((1, *shape)) < density).astype(np.float32)
    np.testing.assert_array_equal(nonzero_mask(array), ndimage.binary_fill_holes(array[0] != 0))


@pytest.mark.parametrize(
    ("shape", "index", "filled"), [((1, 7, 7), 0, False), ((5, 7, 7), 2, True), ((5, 7, 7), 0, False)]
)
def test_hole_at_the_border_stays(shape: tuple[int, ...], index: int, filled: bool) -> None:
    array = np.ones((1, *shape))
    array[0, index, 3, 3] = 0
    assert nonzero_mask(array)[index, 3, 3] == filled


def test_any_channel_counts_and_2d_is_not_filled() -> None:
    array = np.zeros((2, 6, 6))
    array[0, 1:5, 1:5] = 1
    array[0, 2, 2] = 0
    array[1, 0, 0] = -1
    mask = nonzero_mask(array)
    assert mask.sum() == 16
    assert not mask[2, 2]
    assert mask[0, 0]


def test_box_and_its_slices() -> None:
    mask = np.zeros((5, 6, 7), bool)
    mask[1, 2:4, 6] = True
    box = bounding_box(mask)
    assert box == ((1, 2), (2, 4), (6, 7))
    assert mask[slices(box)].all()
    assert bounding_box(np.zeros((2, 3), bool)) == ((0, 2), (0, 3))
