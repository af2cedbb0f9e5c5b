from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.transform import resize

from segfit import resampling
from segfit.errors import InputError
from segfit.interpolation import axis_operator
from segfit.resampling import new_shape, resample_image, resample_labels, separate_axis
from segfit.specs import ResamplingSpec

_ISOTROPIC = (1.0, 1.0, 1.0)


def _line(values: list[float], new: int, order: int) -> np.ndarray:
    array = np.array(values, dtype=np.float64)[None, None]
    return resample_image(array, (1, new), (1, 1), (1, 1), ResamplingSpec(order=order))[0, 0]


def _labels(values: list[int], new: int) -> list[int]:
    return resample_labels(np.array([values], dtype=np.int16), (1, new), (1, 1), (1, 1))[0].tolist()


@pytest.mark.parametrize(
    ("order", "values", "expected"),
    [
        (3, [0, 0, 1, 4, 2, 2], [0.001089, 0, 0.011365, 0.593868, 2.801443, 3.945661, 2.359360, 1.725481, 2.056594]),
        (3, [0, 0, 1, 4, 2, 2, 7, 1, 0, 3], [0, 3.927005, 6.496570, 0.739567]),
        (1, [0, 0, 1, 4, 2, 2], [0, 0, 0.166667, 0.833333, 2.5, 3.666667, 2.333333, 2, 2]),
    ],
)
def test_acceptance_vectors_of_images(order: int, values: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(_line(values, len(expected), order), expected, atol=1e-6)


def test_acceptance_vectors_of_labels() -> None:
    assert _labels([-1, 0, 0, 1, 2, 2, 0, 3], 4) == [0, 1, 2, 3]
    assert _labels([-1, 0, 0, 1, 2, 2, 0, 3], 11) == [-1, 0, 0, 0, 1, 2, 2, 2, 0, 0, 3]
    assert _labels([0, 1, 2, 3, 3, 2, 1, 0], 4) == [1, 3, 2, 0]
    square = np.array([[0, 1], [2, 3]], dtype=np.int16)
    assert resample_labels(square, (3, 3), (1, 1), (1, 1)).tolist() == [[0, 1, 1], [2, 3, 3], [2, 3, 3]]
    assert resample_labels(square, (1, 1), (1, 1), (1, 1)).tolist() == [[3]]


def test_acceptance_vectors_of_rules() -> None:
    assert axis_operator(8, 4, 0).starts.tolist() == [1, 3, 5, 7]
    assert axis_operator(4, 8, 0).starts.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert new_shape((65, 67, 9), (0.5, 0.5, 2), (1, 1, None)) == (32, 34, 9)
    assert new_shape((1,), (0.5,), (5,)) == (1,)
    assert separate_axis((5, 1, 1), (2, 1, 1)) == 0
    assert separate_axis((3, 1, 1), (3, 1, 1)) is None
    assert separate_axis((1, 1, 1), (4, 1, 1)) == 0
    assert separate_axis((0.24, 1.25, 1.25), (9, 1, 1)) is None
    assert separate_axis((5, 1), (5, 1)) is None
    assert separate_axis((2, 1, 1), (2, 1, 1), force=True) == 0
    assert separate_axis((9, 1, 1), (9, 1, 1), force=False) is None


@given(
    st.tuples(*[st.integers(1, 14)] * 3),
    st.tuples(*[st.integers(1, 20)] * 3),
    st.sampled_from([0, 1, 3]),
    st.booleans(),
)
@settings(max_examples=40)
def test_equals_an_independent_resize(shape: tuple[int, ...], new: tuple[int, ...], order: int, flat: bool) -> None:
    shape, new = (shape[1:], new[1:]) if flat else (shape, new)
    array = np.random.default_rng(sum(shape)).standard_normal(shape)
    expected = resize(array, new, order=order, mode="edge", anti_aliasing=False, clip=True, preserve_range=True)
    spacing = _ISOTROPIC[: len(shape)]
    double = resample_image(array[None], new, spacing, spacing, ResamplingSpec(order=order))[0]
    np.testing.assert_allclose(double, expected, atol=1e-8)
    single = resample_image(array[None].astype(np.float32), new, spacing, spacing, ResamplingSpec(order=order))[0]
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, atol=1e-5 * max(np.ptp(array), 1e-9))


@given(
    st.tuples(*[st.integers(1, 12)] * 3),
    st.tuples(*[st.integers(1, 17)] * 3),
    st.integers(1, 6),
    st.booleans(),
    st.tuples(*[st.tuples(st.integers(0, 6), st.integers(0, 6))] * 3),
)
@settings(max_examples=80)
def test_labels_equal_one_vote_per_indicator(
    shape: tuple[int, ...], new: tuple[int, ...], count: int, separate: bool, around: tuple[tuple[int, int], ...]
) -> None:
    rng = np.random.default_rng(sum(shape) + count)
    labels = np.pad(rng.integers(-1, count, shape).astype(np.int16), around)
    shape = labels.shape
    spacing = (5.0, 1.0, 1.0) if separate else _ISOTROPIC
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resampling, "_SLAB_BYTES", 1024)
        result = resample_labels(labels, new, spacing, spacing)
    assert result.dtype == labels.dtype
    if shape == new:
        assert result is labels
        return
    values = np.unique(labels)
    scores = np.stack(
        [
            resample_image((labels == v).astype(np.float64)[None], new, spacing, spacing, ResamplingSpec(order=1))[0]
            for v in values
        ]
    )
    chosen = np.take_along_axis(scores, np.searchsorted(values, result)[None], axis=0)[0]
    np.testing.assert_allclose(chosen, scores.max(axis=0), atol=1e-12)  # a winner everywhere, ties included
    clear = np.sort(scores, axis=0)[-1] - (np.sort(scores, axis=0)[-2] if len(values) > 1 else 0) > 1e-9
    np.testing.assert_array_equal(result[clear], values[scores.argmax(axis=0)][clear])


@pytest.mark.parametrize("method", ["spline", "torch"])
def test_constant_stays_constant_and_values_stay_in_range(method: str) -> None:
    rng = np.random.default_rng(0)
    array = np.stack([np.full((9, 14, 11), 7.25), rng.standard_normal((9, 14, 11))]).astype(np.float32)
    for spacing in (_ISOTROPIC, (4.0, 1.0, 1.0)):
        result = resample_image(array, (13, 10, 16), spacing, spacing, ResamplingSpec(method=method))
        np.testing.assert_allclose(result[0], 7.25, rtol=1e-6)
        assert result[1].min() >= array[1].min()
        assert result[1].max() <= array[1].max()


def test_equal_shape_and_method_none_return_the_input() -> None:
    array, labels = np.ones((1, 4, 5, 6), np.float32), np.ones((4, 5, 6), np.int16)
    assert resample_image(array, (4, 5, 6), _ISOTROPIC, _ISOTROPIC) is array
    assert resample_image(array, (9, 9, 9), _ISOTROPIC, _ISOTROPIC, ResamplingSpec(method="none")) is array
    assert resample_labels(labels, (4, 5, 6), _ISOTROPIC, _ISOTROPIC) is labels
    assert resample_labels(labels, (9, 9, 9), _ISOTROPIC, _ISOTROPIC, ResamplingSpec(method="none")) is labels


def test_separate_axis_repeats_slices_and_keeps_their_range() -> None:
    array = np.random.default_rng(1).standard_normal((1, 4, 6, 7)).astype(np.float32)
    result = resample_image(array, (8, 9, 10), (5, 1, 1), (2.5, 1, 1))
    np.testing.assert_array_equal(result[:, ::2], result[:, 1::2])
    for index in range(4):
        assert result[0, 2 * index].max() <= array[0, index].max()
        assert result[0, 2 * index].min() >= array[0, index].min()
    fewer = resample_image(array, (2, 9, 10), (5, 1, 1), (10, 1, 1))
    np.testing.assert_array_equal(fewer, result[:, [2, 6]])


def test_torch_labels_follow_the_plain_vote_away_from_ties() -> None:
    labels = np.kron(np.arange(8).reshape(2, 2, 2), np.ones((5, 5, 5))).astype(np.int16)
    plain = resample_labels(labels, (12, 16, 8), _ISOTROPIC, _ISOTROPIC)
    by_torch = ResamplingSpec(method="torch", order=1)
    np.testing.assert_array_equal(resample_labels(labels, (12, 16, 8), _ISOTROPIC, _ISOTROPIC, by_torch), plain)


def test_unknown_orders_are_refused() -> None:
    with pytest.raises(InputError, match="orders 0, 1 and 3, got 2"):
        axis_operator(4, 5, 2)
    with pytest.raises(InputError, match="labels are resampled"):
        resample_labels(np.zeros((2, 2), np.int16), (3, 3), (1, 1), (1, 1), ResamplingSpec(order=3))


@pytest.mark.parametrize(("offset", "scale"), [(-500.0, 1.0), (0.0, 1000.0), (20_000.0, 300.0)])
def test_raw_intensities_are_rounded_once(offset: float, scale: float) -> None:
    """Values that are not normalised are far from 0, where sums in float32 lose more than the last digit."""
    noise = np.random.default_rng(3).normal(offset, scale, (1, 9, 12, 10)).astype(np.float32)
    arguments = ((14, 9, 16), (1.0, 1.0, 1.0), (0.7, 1.3, 0.6))
    exact = resample_image(noise.astype(np.float64), *arguments)
    np.testing.assert_array_equal(resample_image(noise, *arguments), exact.astype(np.float32))
