from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segfit.fingerprint.intensities import ChannelDistribution, Mixture


def _mixture(*cases: np.ndarray) -> Mixture:
    mixture = Mixture()
    for case in cases:
        mixture.add(ChannelDistribution.of(case.astype(np.float32)))
    return mixture


def test_cases_weigh_alike_whatever_their_size() -> None:
    statistics = _mixture(np.array([0.0, 2.0]), np.full(1000, 11.0)).statistics()
    assert statistics.mean == 6
    assert statistics.std == pytest.approx(np.sqrt((1 + 0) / 2 + 25))
    assert (statistics.min, statistics.max) == (0, 11)
    assert (statistics.percentile_00_5, statistics.percentile_99_5) == (0, 11)


@pytest.mark.parametrize(
    ("cases", "median"),
    [
        ([[0, 2], [11]], 6.5),  # as many draws below as above: between the cases
        ([[0, 2], [11], [12, 13]], 11),
        ([[0, 2], [11], [12, 13], [5, 6, 40]], 11),
        ([[3], [3]], 3),
    ],
)
def test_the_median_is_that_of_equal_draws_from_every_case(cases: list[list[float]], median: float) -> None:
    sample = np.concatenate([np.repeat(case, 60 // len(case)) for case in cases])
    assert np.median(sample) == median
    assert _mixture(*map(np.array, cases)).statistics().median == median


@given(st.integers(0, 1000), st.sampled_from(["integers", "normal", "heavy", "around zero"]))
@settings(max_examples=30)
def test_percentiles_are_those_of_the_values(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    size = 20_000
    values = {
        "integers": rng.integers(-1024, 3000, size),
        "normal": rng.normal(500, 80, size),
        "heavy": rng.lognormal(3, 2, size),
        "around zero": rng.normal(0, 1e-3, size),
    }[kind].astype(np.float32)
    statistics = _mixture(values).statistics()
    for share, found in (
        (0.005, statistics.percentile_00_5),
        (0.5, statistics.median),
        (0.995, statistics.percentile_99_5),
    ):
        exact = float(np.quantile(np.repeat(values.astype(np.float64), 100), share))  # of many draws
        assert found == pytest.approx(exact, rel=1e-12 if kind == "integers" else 7e-5)
    assert statistics.mean == pytest.approx(values.mean(dtype=np.float64), rel=1e-12)
    assert statistics.std == pytest.approx(values.std(dtype=np.float64), rel=1e-12)
    assert (statistics.min, statistics.max) == (values.min(), values.max())


def test_memory_does_not_grow_with_the_number_of_cases() -> None:
    rng = np.random.default_rng(0)
    mixture = _mixture(*[rng.uniform(64, 128, 3000) for _ in range(40)])
    assert mixture._bins.size <= 8193  # one octave
    assert len(mixture) == 40


def test_zeros_of_both_signs_are_one_value() -> None:
    assert ChannelDistribution.of(np.array([0.0, -0.0, 0.0], np.float32)).counts.tolist() == [3]
