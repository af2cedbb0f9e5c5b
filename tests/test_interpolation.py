from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segfit.interpolation import axis_operator


@given(st.integers(1, 60), st.integers(1, 90), st.sampled_from([0, 1, 3]))
@settings(max_examples=60)
def test_operator_rows_sum_to_one_and_stay_inside(old: int, new: int, order: int) -> None:
    operator = axis_operator(old, new, order)
    matrix = operator.dense()
    assert matrix.shape == (new, old)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
    assert (np.diff(operator.starts) >= 0).all()
    if old == new:
        np.testing.assert_allclose(matrix, np.eye(old), atol=1e-9)
    signal = np.random.default_rng(old).standard_normal((3, old, 2))
    if old != new:
        np.testing.assert_allclose(operator.apply(signal, 1), np.einsum("ij,ajb->aib", matrix, signal), atol=1e-12)
    low, high, rows = operator.rows(new // 2, new)
    np.testing.assert_array_equal(rows, matrix[new // 2 :, low:high])


def test_operators_are_shared_and_read_only() -> None:
    operator = axis_operator(20, 30, 3)
    assert axis_operator(20, 30, 3) is operator
    with pytest.raises(ValueError, match="read-only"):
        operator.weights[0] = 0
