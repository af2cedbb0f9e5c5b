from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from segfit.inference.tiles import (
    axis_coverage,
    axis_importance,
    importance_map,
    mirror_subsets,
    padding,
    tile_corners,
    tile_starts,
)


@pytest.mark.parametrize(
    ("size", "patch", "starts"),
    [
        (110, 64, (0, 23, 46)),
        (129, 64, (0, 22, 43, 65)),
        (100, 45, (0, 18, 37, 55)),
        (64, 64, (0,)),
        (65, 64, (0, 1)),
        (3, 1, (0, 1, 2)),
    ],
)
def test_starts(size: int, patch: int, starts: tuple[int, ...]) -> None:
    assert tile_starts(size, patch, 0.5) == starts


@given(st.integers(1, 60), st.integers(0, 200), st.floats(0.05, 1.0))
def test_tiles_cover_every_voxel(patch: int, more: int, step: float) -> None:
    starts = tile_starts(patch + more, patch, step)
    assert starts[0] == 0
    assert starts[-1] == more
    assert all(0 < b - a <= max(1, np.ceil(patch * step)) for a, b in pairwise(starts))
    assert (axis_coverage(patch + more, starts, axis_importance(patch)) > 0).all()


def test_padding_puts_the_odd_voxel_behind() -> None:
    assert padding((11, 15, 40), (16, 20, 32)) == ((2, 3), (2, 3), (0, 0))


def test_last_axis_runs_fastest() -> None:
    assert list(tile_corners([(0, 4), (0,), (0, 5)])) == [(0, 0, 0), (0, 0, 5), (4, 0, 0), (4, 0, 5)]


@pytest.mark.parametrize("patch", [(8, 12), (5, 24, 20), (33, 40)])
def test_importance_is_a_filtered_impulse(patch: tuple[int, ...]) -> None:
    impulse = np.zeros(patch)
    impulse[tuple(n // 2 for n in patch)] = 1
    expected = ndimage.gaussian_filter(impulse, [n / 8 for n in patch], mode="constant")
    result = importance_map(patch)
    assert result.dtype == np.float32
    assert result.max() == 1
    np.testing.assert_allclose(result, expected / expected.max(), rtol=1e-6)


def test_importance_is_nowhere_zero() -> None:
    assert importance_map((128, 128, 128)).min() > 3e-11


def test_coverage_is_the_product_over_the_axes() -> None:
    shape, patch = (20, 33), (16, 12)
    starts = [tile_starts(n, p, 0.5) for n, p in zip(shape, patch, strict=True)]
    total = np.zeros(shape)
    for y, x in tile_corners(starts):
        total[y : y + 16, x : x + 12] += np.outer(axis_importance(16), axis_importance(12))
    factors = [axis_coverage(n, begin, axis_importance(p)) for n, begin, p in zip(shape, starts, patch, strict=True)]
    np.testing.assert_allclose(np.outer(*factors), total, rtol=1e-12)


def test_mirror_subsets() -> None:
    assert mirror_subsets(()) == ((),)
    assert mirror_subsets((0, 2)) == ((), (0,), (2,), (0, 2))
    assert len(mirror_subsets((0, 1, 2))) == 8
