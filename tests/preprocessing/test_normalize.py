from __future__ import annotations

import numpy as np
import pytest

from segfit.errors import InputError
from segfit.preprocessing.normalize import normalize
from segfit.specs import IntensityStatistics, Normalization

_STATISTICS = IntensityStatistics(mean=10, median=9, std=4, min=-50, max=90, percentile_00_5=2, percentile_99_5=30)


def _one(values: list[float], scheme: Normalization, labels: list[int] | None = None) -> np.ndarray:
    image = np.array([[values]], dtype=np.float32)
    before = image.copy()
    marked = np.array([labels or [0] * len(values)], dtype=np.int16)
    result = normalize(image, marked, (scheme,))
    np.testing.assert_array_equal(image, before)
    assert result.dtype == np.float32
    return result[0, 0]


def test_zscore() -> None:
    np.testing.assert_allclose(_one([1, 3], Normalization(scheme="zscore")), [-1, 1])
    np.testing.assert_array_equal(_one([5, 5], Normalization(scheme="zscore")), [0, 0])


def test_masked_zscore_leaves_the_outside() -> None:
    masked = Normalization(scheme="zscore", use_mask=True)
    np.testing.assert_allclose(_one([1, 3, 7, 0], masked, [0, 2, -1, -1]), [-1, 1, 7, 0])
    np.testing.assert_array_equal(_one([0, 0], masked, [-1, -1]), [0, 0])


def test_ct_clips_and_uses_the_statistics_of_the_dataset() -> None:
    result = _one([-100, 2, 10, 30, 500], Normalization(scheme="ct", statistics=_STATISTICS))
    np.testing.assert_allclose(result, [-2, -2, 0, 5, 5])


def test_ranges() -> None:
    np.testing.assert_allclose(_one([2, 4, 10], Normalization(scheme="rescale_to_0_1")), [0, 0.25, 1])
    np.testing.assert_array_equal(_one([3, 3], Normalization(scheme="rescale_to_0_1")), [0, 0])
    np.testing.assert_allclose(_one([0, 51, 255], Normalization(scheme="rgb_to_0_1")), [0, 0.2, 1])
    np.testing.assert_array_equal(_one([-7, 900], Normalization(scheme="none")), [-7, 900])
    with pytest.raises(InputError, match="must hold 0 to 255, got 0 to 256"):
        _one([0, 256], Normalization(scheme="rgb_to_0_1"))
