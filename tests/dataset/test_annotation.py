"""Label maps as numbers."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from segfit.dataset import annotation
from segfit.dataset.annotation import count_values

_DTYPES = st.sampled_from([np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64])


@given(_DTYPES.flatmap(lambda dtype: arrays(dtype, array_shapes(min_dims=2, max_dims=3, max_side=6))), st.booleans())
def test_values_are_counted_as_by_sorting(array: NDArray[np.integer[Any]], turned: bool) -> None:
    values, counts = np.unique(array, return_counts=True)
    assert count_values(array.T if turned else array) == dict(zip(values.tolist(), counts.tolist(), strict=True))


def test_values_are_counted_across_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotation, "_PART", 4)
    array = np.array([[-128, -128, -128, -128, 127, -128], [3, 3, 3, 0, 0, 0]], dtype=np.int8)
    assert count_values(array) == {-128: 5, 0: 3, 3: 3, 127: 1}
    assert list(count_values(array)) == [-128, 0, 3, 127]
    assert count_values(array[:, ::2]) == {-128: 2, 0: 1, 3: 2, 127: 1}
