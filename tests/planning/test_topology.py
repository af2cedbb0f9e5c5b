from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from segfit.planning.topology import SMALLEST_MAP, kernels_for, topology


def test_isotropic_volume() -> None:
    found = topology((1.0, 1.0, 1.0), (128, 128, 128))
    assert found.strides == ((1, 1, 1), *[(2, 2, 2)] * 5)
    assert found.kernels == ((3, 3, 3),) * 6
    assert found.divisor == (32, 32, 32)
    assert found.patch == (128, 128, 128)


def test_thick_slices_are_pooled_and_convolved_later() -> None:
    found = topology((3.6, 0.625, 0.625), (20, 320, 256))
    assert found.kernels[:3] == ((1, 3, 3), (1, 3, 3), (3, 3, 3))
    assert found.kernels[-1] == (3, 3, 3)
    assert found.divisor == (4, 64, 64)
    assert found.patch == (20, 320, 256)


def test_a_single_axis_is_pooled_only_with_twelve_voxels() -> None:
    assert topology((1.0, 9.0), (11, 4)).strides == ((1, 1),)
    assert topology((1.0, 9.0), (12, 4)).strides == ((1, 1), (2, 1))


def test_fractional_shapes_are_padded_up() -> None:
    assert topology((1.0, 1.0), (32.5, 61.0)).patch == (40, 64)


@given(
    st.lists(st.floats(0.05, 20), min_size=2, max_size=3),
    st.lists(st.integers(1, 700), min_size=3, max_size=3),
)
def test_patch_and_strides_always_fit(spacing: list[float], shape: list[int]) -> None:
    found = topology(spacing, shape[: len(spacing)])
    assert len(found.strides) == len(found.kernels)
    for axis, size in enumerate(shape[: len(spacing)]):
        product = 1
        for stride in found.strides:
            product *= stride[axis]
        assert product == found.divisor[axis]
        assert found.patch[axis] % product == 0
        assert 0 <= found.patch[axis] - size < product
        assert product == 1 or found.patch[axis] // product >= SMALLEST_MAP


def test_kernels_never_shrink_again() -> None:
    kernels = topology((8.0, 1.0, 0.9), (40, 512, 512)).kernels
    for before, after in itertools.pairwise(kernels):
        assert all(a >= b for a, b in zip(after, before, strict=True))
    assert kernels[0] == (1, 3, 3)


@given(
    st.lists(st.floats(0.05, 20), min_size=2, max_size=3),
    st.lists(st.integers(1, 700), min_size=3, max_size=3),
)
def test_kernels_of_given_strides_follow_the_rule(spacing: list[float], shape: list[int]) -> None:
    found = topology(spacing, shape[: len(spacing)])
    assert kernels_for(spacing, found.strides) == found.kernels
