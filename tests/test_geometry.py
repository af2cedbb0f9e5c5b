"""Grids and axis maps: every voxel keeps its place in space, and every way has a way back."""

from __future__ import annotations

from itertools import permutations, product

import hypothesis.strategies as st
import nibabel
import numpy as np
import pytest
from hypothesis import given, settings

from segfit.geometry import AxisMap, CornerDistance, Grid, canonical_map, is_invertible

MAPS = [AxisMap(order, flip) for order in permutations(range(3)) for flip in product((False, True), repeat=3)]

maps = st.sampled_from(MAPS)
shapes = st.tuples(*[st.integers(1, 5)] * 3)
spacings = st.tuples(*[st.floats(0.2, 6.0)] * 3)
angles = st.tuples(*[st.floats(-0.4, 0.4)] * 3)  # radians: together clearly closer to the old axes than to others
origins = st.tuples(*[st.floats(-200, 200)] * 3)


def rotation(radians: tuple[float, float, float]) -> np.ndarray:
    result = np.eye(3)
    for axis, angle in enumerate(radians):
        i, j = [a for a in range(3) if a != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        result = result @ turn
    return result


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Grids close to canonical axes, oblique, with random spacing and origin."""
    spacing = draw(spacings)
    affine = np.eye(4)
    affine[:3, :3] = rotation(draw(angles)) * np.array(spacing[::-1])
    affine[:3, 3] = draw(origins)
    return Grid(draw(shapes), spacing, affine)


def positions(grid: Grid) -> np.ndarray:
    """World position of every voxel, (3, z, y, x)."""
    assert grid.affine is not None
    z, y, x = np.indices(grid.shape)
    homogeneous = np.stack([x, y, z, np.ones_like(x)]).astype(float)
    return np.tensordot(grid.affine, homogeneous, axes=1)[:3]


@settings(deadline=None)
@given(maps, shapes)
def test_inverse_brings_every_array_back(axes: AxisMap, shape: tuple[int, ...]) -> None:
    array = np.arange(2 * np.prod(shape)).reshape(2, *shape)
    assert np.array_equal(axes.inverse().apply(axes.apply(array)), array)
    assert np.array_equal(axes.apply(axes.inverse().apply(array)), array)
    assert axes.inverse().inverse() == axes


@settings(deadline=None)
@given(maps, grids())
def test_grid_follows_array_so_that_no_voxel_moves(axes: AxisMap, grid: Grid) -> None:
    mapped = axes.apply_grid(grid)
    np.testing.assert_allclose(positions(mapped), axes.apply(positions(grid)), atol=1e-9)
    assert mapped.shape == axes.apply(np.empty(grid.shape)).shape
    assert mapped.spacing_mm == axes.permute(grid.spacing_mm)


@settings(deadline=None)
@given(maps, grids())
def test_grid_comes_back(axes: AxisMap, grid: Grid) -> None:
    back = axes.inverse().apply_grid(axes.apply_grid(grid))
    assert (back.shape, back.spacing_mm) == (grid.shape, grid.spacing_mm)
    np.testing.assert_allclose(back.affine, grid.affine, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(grids())
def test_all_48_orientations_canonicalise_to_the_same_array(grid: Grid) -> None:
    assert canonical_map(grid).is_identity
    array = np.arange(np.prod(grid.shape)).reshape(1, *grid.shape)
    for axes in MAPS:
        stored, stored_grid = axes.apply(array), axes.apply_grid(grid)
        back = canonical_map(stored_grid)
        assert np.array_equal(back.apply(stored), array)
        np.testing.assert_allclose(back.apply_grid(stored_grid).affine, grid.affine, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(maps, grids())
def test_canonical_axes_are_those_of_nibabel(axes: AxisMap, grid: Grid) -> None:
    stored = axes.apply_grid(grid)
    array = np.arange(np.prod(grid.shape), dtype=np.int32).reshape(grid.shape)
    theirs = nibabel.as_closest_canonical(nibabel.Nifti1Image(axes.apply(array).T, stored.affine))
    assert np.array_equal(np.asarray(theirs.dataobj).T, canonical_map(stored).apply(axes.apply(array)))


def test_canonical_map_by_hand() -> None:
    # Voxel x runs to the left, voxel y up, voxel z to the front: only x is flipped, y and z are swapped.
    affine = np.array([[-1.0, 0, 0, 10], [0, 0, 2.0, 20], [0, 3.0, 0, 30], [0, 0, 0, 1]])
    grid = Grid((4, 5, 6), (2.0, 3.0, 1.0), affine)  # array axes: front, up, left
    axes = canonical_map(grid)
    assert axes == AxisMap((1, 0, 2), (False, False, True))
    mapped = axes.apply_grid(grid)
    assert mapped.shape == (5, 4, 6)
    assert mapped.spacing_mm == (3.0, 2.0, 1.0)
    np.testing.assert_allclose(mapped.affine, [[1, 0, 0, 5], [0, 2, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1]])


def test_canonical_map_looks_at_directions_not_at_lengths() -> None:
    # Spacing in the header disagrees with the affine by far; the axes still decide.
    grid = Grid((4, 5, 6), (100.0, 0.01, 1.0), np.diag([1.0, -1.0, 1.0, 1.0]))
    assert canonical_map(grid) == AxisMap((0, 1, 2), (False, True, False))


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6)])
def test_unknown_geometry_stays(shape: tuple[int, ...]) -> None:
    grid = Grid(shape, (1.0,) * len(shape))
    assert canonical_map(grid) == AxisMap.identity(len(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4,), (1.0,)), "2 or 3 axes"),
        (((4, 5), (1.0, 1.0, 1.0)), "2 or 3 axes"),
        (((4, 0), (1.0, 1.0)), "at least one voxel"),
        (((4, 5), (1.0, 0.0)), "positive and finite"),
        (((4, 5), (1.0, float("nan"))), "positive and finite"),
        (((4, 5), (1.0, 1.0), np.eye(4)), "belongs to 3 axes"),
        (((4, 5, 6), (1.0, 1.0, 1.0), np.eye(3)), "belongs to 3 axes"),
        (((4, 5, 6), (1.0, 1.0, 1.0), np.diag([1.0, 0, 1, 1])), "not invertible"),
        (((4, 5, 6), (1.0, 1.0, 1.0), np.diag([1.0, np.nan, 1, 1])), "not invertible"),
    ],
)
def test_impossible_grids_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(*arguments)  # type: ignore[arg-type]


def test_invertible_means_three_dimensions() -> None:
    assert is_invertible(np.diag([1e-3, 1e3, 1.0, 1.0]))
    flat = np.eye(4)
    flat[:3, 2] = flat[:3, 0] + flat[:3, 1]
    assert not is_invertible(flat)


def test_equal_grids_are_equal() -> None:
    grid = Grid((2, 3, 4), (1.0, 1.0, 2.0), np.eye(4), b"x")
    assert grid == Grid((2, 3, 4), (1.0, 1.0, 2.0), np.eye(4), b"x")
    assert grid != Grid((2, 3, 4), (1.0, 1.0, 2.0), 2 * np.eye(4), b"x")
    assert grid != Grid((2, 3, 4), (1.0, 1.0, 2.0), None, b"x")
    assert grid != Grid((2, 3, 4), (1.0, 1.0, 2.0), np.eye(4), b"y")


def moved(grid: Grid, mm: float) -> Grid:
    assert grid.affine is not None
    affine = grid.affine.copy()
    affine[0, 3] += mm
    return Grid(grid.shape, grid.spacing_mm, affine)


def test_corner_distance_by_hand() -> None:
    grid = Grid((5, 5, 11), (2.0, 2.0, 2.0), np.diag([2.0, 2.0, 2.0, 1.0]))
    assert grid.corner_distance(grid) == CornerDistance(0, 0)
    assert grid.corner_distance(moved(grid, 3.0)) == CornerDistance(pytest.approx(1.5), pytest.approx(3.0))
    # The volume begins half a voxel before the first voxel's centre and ends half a voxel behind the last one's.
    wider = Grid((5, 5, 11), (2.0, 2.0, 2.2), np.diag([2.2, 2.0, 2.0, 1.0]))
    assert grid.corner_distance(wider) == CornerDistance(pytest.approx(1.05), pytest.approx(2.1))
    # Each voxel axis is judged by itself: 1 mm is half a voxel of 2 mm, and a fifth of a slice of 5 mm.
    flat = Grid((4, 10, 10), (5.0, 2.0, 2.0), np.diag([2.0, 2.0, 5.0, 1.0]))
    shifted = flat.affine + np.array([[0, 0, 0, 1.0], [0] * 4, [0, 0, 0, 1.0], [0] * 4])  # type: ignore[operator]
    apart = flat.corner_distance(Grid(flat.shape, flat.spacing_mm, shifted))
    assert apart == CornerDistance(pytest.approx(0.5), pytest.approx(np.sqrt(2)))


def test_corner_distance_without_a_place() -> None:
    """Only the extents count: 11 voxels that are 10 % longer, laid on each other at the first corner."""
    for shape, spacing in (((5, 5, 11), (2.0, 2.0, 2.0)), ((5, 11), (2.0, 2.0))):
        grid = Grid(shape, spacing)
        wider = Grid(shape, (*spacing[:-1], 2.2))
        assert grid.corner_distance(wider) == CornerDistance(pytest.approx(1.1), pytest.approx(2.2))
        assert grid.mismatch(wider).startswith("its spacing is (2, ")
        close = Grid(shape, (*spacing[:-1], 2.02))
        assert (grid.mismatch(close), grid.snapped(close)) == ("", "0.11 voxels away (0.22 mm)")


OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = rotation((0.3, -0.2, 0.1)) * [0.8, 0.9, 3.0]  # x, y, z
OBLIQUE[:3, 3] = (-110.3, 84.2, -500.7)


def turned(radians: float) -> np.ndarray:
    """Turn the oblique axes about their first voxel."""
    result = OBLIQUE.copy()
    result[:3, :3] = rotation((radians, radians, radians)) @ OBLIQUE[:3, :3]
    return result


def shifted(*voxels: float) -> np.ndarray:
    """Shift the oblique axes by voxels (x, y, z)."""
    result = OBLIQUE.copy()
    result[:3, 3] += OBLIQUE[:3, :3] @ voxels
    return result


@pytest.mark.parametrize(
    ("shape", "affine", "mismatch", "snapped"),
    [
        ((40, 50, 60), OBLIQUE, "", ""),
        ((512, 512, 512), OBLIQUE.astype(np.float32).astype(np.float64), "", ""),
        ((512, 512, 512), turned(1e-9), "", ""),
        ((40, 50, 60), turned(1e-3), "", "0.19 voxels away (0.17 mm)"),
        ((40, 512, 512), turned(1e-3), "it lies 0.93 voxels away (1.1 mm)", ""),
        ((40, 50, 60), shifted(0.009, 0, 0), "", ""),
        ((40, 50, 60), shifted(0, 0.02, 0), "", "0.02 voxels away (0.018 mm)"),
        ((40, 50, 60), shifted(0.49, -0.49, 0.49), "", "0.49 voxels away (1.6 mm)"),
        ((40, 50, 60), shifted(0, 0, 0.51), "it lies 0.51 voxels away (1.5 mm)", ""),
        ((40, 50, 60), shifted(0, -100, 0), "it lies 100.0 voxels away (90 mm)", ""),
        ((40, 50, 60), OBLIQUE * [1, 1, 1.5, 1], "its spacing is (4.5, 0.9, 0.8) mm, expected (3, 0.9, 0.8) mm", ""),
        ((40, 50, 60), OBLIQUE * [-1, 1, 1, 1], "its axes point elsewhere", ""),
    ],
)
def test_verdicts_on_two_files_of_a_case(
    shape: tuple[int, int, int], affine: np.ndarray, mismatch: str, snapped: str
) -> None:
    grid = Grid(shape, (3.0, 0.9, 0.8), OBLIQUE)
    spacing = tuple(float(f"{n:.6g}") for n in np.linalg.norm(affine[:3, :3], axis=0)[::-1])
    other = Grid(shape, spacing, affine)
    assert (grid.mismatch(other), grid.snapped(other)) == (mismatch, snapped)


@settings(deadline=None)
@given(maps, grids(), st.tuples(*[st.floats(-0.6, 0.6)] * 3))
def test_the_verdict_does_not_depend_on_how_a_volume_is_stored(
    axes: AxisMap, grid: Grid, shift: tuple[float, float, float]
) -> None:
    assert grid.affine is not None
    affine = grid.affine.copy()
    affine[:3, 3] += grid.affine[:3, :3] @ shift
    other = Grid(grid.shape, grid.spacing_mm, affine)
    apart = grid.corner_distance(other)
    assert apart.voxels == pytest.approx(max(map(abs, shift)), abs=1e-6)
    stored = axes.apply_grid(grid).corner_distance(axes.apply_grid(other))
    assert stored.voxels == pytest.approx(apart.voxels, abs=1e-6)
    assert stored.mm == pytest.approx(apart.mm, abs=1e-6)


@settings(deadline=None)
@given(maps, maps, grids(), st.tuples(*[st.floats(-0.3, 0.3)] * 3))
def test_a_volume_is_turned_back_from_every_order_of_axes(
    first: AxisMap, second: AxisMap, grid: Grid, shift: tuple[float, float, float]
) -> None:
    assert grid.affine is not None
    affine = grid.affine.copy()
    affine[:3, 3] += grid.affine[:3, :3] @ shift
    other = second.apply_grid(Grid(grid.shape, grid.spacing_mm, affine))
    target = first.apply_grid(grid)
    way = target.turn(other)
    assert way is not None
    voxels = np.arange(np.prod(grid.shape)).reshape(grid.shape)
    assert np.array_equal(way.apply(second.apply(voxels)), first.apply(voxels))
    assert second.then(way) == first


def test_what_lies_elsewhere_or_nowhere_is_not_turned() -> None:
    grid = Grid((4, 10, 10), (3.0, 1.0, 1.0), np.diag([1.0, 1.0, 3.0, 1.0]))
    mirrored = Grid((4, 10, 10), (3.0, 1.0, 1.0), np.diag([-1.0, 1.0, 3.0, 1.0]))  # about the first voxel
    assert grid.turn(mirrored) is None
    assert grid.turn(Grid((10, 4, 10), (1.0, 3.0, 1.0))) is None
    assert grid.turn(grid) == AxisMap.identity(3)


def test_mismatch_says_what_differs() -> None:
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    grid = Grid((4, 10, 10), (3.0, 1.0, 1.0), affine)
    assert grid.mismatch(grid) == ""
    assert grid.mismatch(moved(grid, 0.4)) == ""
    assert grid.mismatch(Grid((4, 10, 10), (3.0, 1.0, 1.0))) == ""  # nothing to compare with but the spacing
    assert grid.mismatch(moved(grid, 7.5)) == "it lies 7.5 voxels away (7.5 mm)"
    assert grid.snapped(Grid((4, 10, 9), (3.0, 1.0, 1.0), affine)) == ""
    assert grid.mismatch(Grid((4, 10, 9), (3.0, 1.0, 1.0), affine)) == (
        "its shape is (4, 10, 9), expected (4, 10, 10) (array order)"
    )
    assert grid.mismatch(Grid((4, 10, 10), (5.0, 1.0, 1.0), np.diag([1.0, 1.0, 5.0, 1.0]))) == (
        "its spacing is (5, 1, 1) mm, expected (3, 1, 1) mm"
    )
    assert grid.mismatch(Grid((4, 10, 10), (3.0, 1.0, 1.0), np.diag([-1.0, 1.0, 3.0, 1.0]))) == (
        "its axes point elsewhere"
    )


def test_a_picture_is_not_turned_onto_a_volume() -> None:
    volume, picture = Grid((2, 3, 4), (1.0, 1.0, 1.0)), Grid((3, 4), (1.0, 1.0))
    assert volume.turn(picture) is None
    assert picture.turn(volume) is None


def test_a_picture_without_a_size_has_pixels() -> None:
    sizeless, sized = Grid((4, 5), (1.0, 1.0), spacing_known=False), Grid((4, 5), (0.25, 0.25))
    assert [grid.unit for grid in (sizeless, sized, Grid((3, 4, 5), (1.0,) * 3, spacing_known=False))] == [
        "px",
        "mm",
        "mm",
    ]
    assert sizeless.mismatch(sized) == "its spacing is (0.25, 0.25) mm, expected (1, 1) px"
