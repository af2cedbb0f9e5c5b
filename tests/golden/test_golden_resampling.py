"""Resampling against the reference's inputs and outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segfit.resampling import new_shape, resample_image, resample_labels, separate_axis
from segfit.specs import ResamplingSpec

pytestmark = pytest.mark.golden("resampling")


def _cases(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "resampling" / "cases.json").read_text())


def _resample(entry: dict[str, Any], array: np.ndarray) -> np.ndarray:
    settings = entry["settings"]
    arguments: dict[str, Any] = {
        "method": "spline" if entry["method"] == "default" else "torch",
        "order_separate_axis": settings.get("order_z") or 0,
        "force_separate": settings.get("force_separate_z"),
    }
    arguments["order"] = settings.get("order", 1 if entry["kind"] == "seg" else 3)
    spec = ResamplingSpec(**arguments)
    spacings = (entry["current_spacing"], entry["new_spacing"])
    if entry["kind"] != "seg":
        return resample_image(array, entry["new_shape"], *spacings, spec)
    labels = array.astype(np.int16)
    np.testing.assert_array_equal(labels, array)
    return np.stack([resample_labels(channel, entry["new_shape"], *spacings, spec) for channel in labels])


@pytest.mark.golden_each("resampling/*.npz")
def test_case(golden: Path, path: Path) -> None:
    entry = _cases(golden)[path.stem]
    with np.load(path) as arrays:
        source, expected = arrays["input"], arrays["output"]
    result = _resample(entry, source)
    assert result.shape == expected.shape
    if entry["kind"] == "seg":
        np.testing.assert_array_equal(result, expected)
        return
    assert result.dtype == expected.dtype
    error = np.abs(result.astype(np.float64) - expected.astype(np.float64))
    if expected.dtype == np.float16:  # one unit in the last place
        assert (error <= np.spacing(np.abs(expected)).astype(np.float64)).all()
    else:
        rounding = np.spacing(np.abs(expected).max())  # of float32, where values are far from 0
        assert error.max() <= max(1e-5 * np.ptp(source), rounding)


def test_decision_per_case(golden: Path) -> None:
    for name, entry in _cases(golden).items():
        axis = separate_axis(
            entry["current_spacing"], entry["new_spacing"], force=entry["settings"].get("force_separate_z")
        )
        assert (axis is not None, axis) == (entry["separate_z"], entry["axis"]), name


def test_rules(golden: Path) -> None:
    rules = json.loads((golden / "resampling" / "rules.json").read_text())
    for rule in rules["new_shape"]:
        expected = tuple(max(1, n) for n in rule["new_shape"])
        assert new_shape(rule["shape"], rule["current_spacing"], rule["new_spacing"]) == expected
    for rule in rules["separate_z"]:
        axis = separate_axis(rule["current_spacing"], rule["new_spacing"], force=rule["force_separate_z"])
        assert (axis is not None, axis) == (rule["separate_z"], rule["axis"]), rule
