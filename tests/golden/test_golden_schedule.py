"""Learning rate, deep-supervision weights and oversampling against the reference."""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segfit.training.loss import deep_supervision_weights
from segfit.training.schedule import forced_foreground, poly_learning_rate

pytestmark = pytest.mark.golden("schedule")


def read(golden: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((golden / "schedule" / name).read_text())
    return rows


def test_learning_rate(golden: Path) -> None:
    with np.load(golden / "schedule" / "learning_rate.npz") as arrays:
        for key in arrays.files:
            base, epochs = float(key.split("_")[1]), len(arrays[key])
            ours = [poly_learning_rate(epoch / epochs, base) for epoch in range(epochs)]
            np.testing.assert_allclose(ours, arrays[key], rtol=1e-12)


def test_deep_supervision_weights(golden: Path) -> None:
    for row in read(golden, "deep_supervision.json"):
        assert len(row["scales"]) == len(row["strides"]) - 1
        weights = deep_supervision_weights(len(row["strides"]) - 1)
        if any(weight is None or isnan(weight) for weight in row["weights"]):
            assert weights == (1.0,)  # two stages: the reference has no usable weight
        else:
            assert weights == pytest.approx(row["weights"], rel=1e-12)


def test_forced_foreground(golden: Path) -> None:
    for row in read(golden, "oversampling.json"):
        ours = forced_foreground(row["batch_size"], row["oversample_foreground_percent"])
        assert list(ours) == row["forced_foreground"]
