"""Measurements against closed forms, and margins that hold as often as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from segfit.evaluation.measurement import Margin, Measurement, measure, outline_of
from segfit.geometry import Grid
from segfit.labels import LabelScheme

ONE = LabelScheme.from_declaration({"background": 0, "a": 1})


def ellipse(shape: tuple[int, int], semi: tuple[float, float], angle: float = 0.0) -> np.ndarray:
    y, x = (np.arange(n) - (n - 1) / 2 for n in shape)
    yy, xx = np.meshgrid(y, x, indexing="ij")
    u, v = math.cos(angle) * yy + math.sin(angle) * xx, math.cos(angle) * xx - math.sin(angle) * yy
    return (u / semi[0]) ** 2 + (v / semi[1]) ** 2 <= 1


@pytest.mark.parametrize(("semi", "angle"), [((40.0, 40.0), 0.0), ((60.0, 30.0), 0.6), ((20.0, 75.0), -1.0)])
def test_the_outline_of_an_ellipse(semi: tuple[float, float], angle: float) -> None:
    found = outline_of(ellipse((181, 191), semi, angle), (0.5, 0.5))
    assert found is not None
    steps = np.linspace(0, 2 * math.pi, 100001)
    exact = np.hypot(np.diff(semi[0] * np.cos(steps)), np.diff(semi[1] * np.sin(steps))).sum()
    assert found["circumference"] == pytest.approx(exact / 2, rel=4e-3)
    assert found["diameter"] == pytest.approx(max(semi), rel=4e-3)


def test_elongated_pixels() -> None:
    circle = ellipse((201, 101), (80.0, 40.0))  # pixels twice as wide as high
    found = outline_of(circle, (1.0, 2.0))
    assert found is not None
    assert found == pytest.approx({"diameter": 160.0, "circumference": 160 * math.pi}, rel=2e-3)


def test_what_has_no_outline() -> None:
    two = np.zeros((30, 30), bool)
    two[2:9, 2:9] = two[20:28, 20:28] = True
    bent = np.zeros((30, 30), bool)
    bent[2:28, 2:6] = bent[24:28, 2:28] = True
    line = np.zeros((30, 30), bool)
    line[3] = True
    for mask in (two, bent, line, np.zeros((30, 30), bool)):
        assert outline_of(mask, (1.0, 1.0)) is None


def test_volumes_and_their_intervals() -> None:
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[2:4, 2:7, 2:7] = 1
    margin = Margin(groups=9, factor_90=1.25, factor_95=None)
    (found,) = measure(labels, Grid((10, 10, 10), (3.0, 2.0, 2.0)), ONE.classes, {"a": {"volume": margin}})
    assert found == Measurement(name="a", kind="volume", unit="ml", value=0.6, low=0.48, high=0.75, confidence=0.9)
    (bare,) = measure(labels, Grid((10, 10, 10), (1.0, 1.0, 1.0), spacing_known=False), ONE.classes)
    assert (bare.unit, bare.value, bare.low, bare.confidence) == ("voxels", 50, None, None)
    (none,) = measure(
        np.zeros_like(labels), Grid((10, 10, 10), (3.0, 2.0, 2.0)), ONE.classes, {"a": {"volume": margin}}
    )
    assert (none.value, none.low) == (0, None)


def test_circumference_is_measured_where_the_class_is_convex() -> None:
    labels = ellipse((101, 101), (40.0, 30.0)).astype(np.uint8)
    margin = Margin(groups=19, factor_90=1.1, factor_95=1.2)
    margins = {"a": {"area": margin, "diameter": margin, "circumference": margin}}
    found = {item.kind: item for item in measure(labels, Grid((101, 101), (0.2, 0.2)), ONE.classes, margins)}  # type: ignore[arg-type]
    assert found["area"].value == pytest.approx(math.pi * 1200 * 0.04, rel=5e-3)
    assert found["diameter"].value == pytest.approx(16, rel=5e-3)
    assert found["circumference"].confidence == 0.95
    assert found["circumference"].high == pytest.approx(found["circumference"].value * 1.2)
    assert [item.kind for item in measure(labels, Grid((101, 101), (0.2, 0.2)), ONE.classes)] == ["area"]


@pytest.mark.parametrize(
    ("groups", "factors"), [(8, (None, None)), (9, (True, None)), (18, (True, None)), (19, (True, True))]
)
def test_how_many_groups_an_interval_needs(groups: int, factors: tuple[bool | None, bool | None]) -> None:
    margin = Margin.of({f"c{i}": (10.0 + i, 10.0) for i in range(groups)}, {})
    assert (margin.factor_90 and True, margin.factor_95 and True) == factors
    assert margin.groups == groups
    many = Margin.of({f"c{i}": (10.0 + i, 10.0) for i in range(40)}, {f"c{i}": f"g{i % 8}" for i in range(40)})
    assert (many.groups, many.factor_90) == (8, None)


def test_missed_structures_leave_no_bound() -> None:
    pairs = {f"c{i}": (0.0 if i < 4 else 10.0, 11.0) for i in range(30)}
    assert Margin.of(pairs, {}) == Margin(groups=30, factor_90=None, factor_95=None)
    pairs = {f"c{i}": (0.0 if i < 2 else 10.0, 11.0) for i in range(30)}  # 2 of 31 may be anything
    assert Margin.of(pairs, {}).factor_90 == pytest.approx(1.1)
    empty = {f"e{i}": (0.0, 0.0) for i in range(30)}  # say nothing
    assert Margin.of(empty, {}).groups == 0


@pytest.mark.parametrize("per_group", [1, 4])
@pytest.mark.parametrize(("confidence", "name"), [(0.9, "factor_90"), (0.95, "factor_95")])
def test_intervals_hold_as_often_as_they_say(confidence: float, name: str, per_group: int) -> None:
    """For a new case of a new group: over many draws of 24 groups, never less often than said, nor always."""
    rng, inside, tries = np.random.default_rng(5), 0, 2000
    for _ in range(tries):
        errors = rng.normal(0, 0.2, (25, 1)) + rng.normal(0, 0.1, (25, per_group))
        pairs = {f"{g}-{i}": (math.exp(errors[g, i]), 1.0) for g in range(24) for i in range(per_group)}
        factor = getattr(Margin.of(pairs, {case: case.split("-")[0] for case in pairs}), name)
        inside += abs(errors[24, 0]) <= math.log(factor)
    assert confidence - 0.02 < inside / tries < min(0.995, confidence + 0.05)
