"""Learning rate, moving averages, deep-supervision weights and oversampling against the reference."""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segfit.training.loss import deep_supervision_weights
from segfit.training.schedule import forced_foreground, moving_average, poly_learning_rate, pseudo_dice

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


def test_moving_average(golden: Path) -> None:
    for row in read(golden, "ema_pseudo_dice.json"):
        average: float | None = None
        tolerance = 1e-12 if row["dtype"] == "float64" else 1e-6
        for value, expected in zip(row["mean_fg_dice"], row["ema_fg_dice"], strict=True):
            average = moving_average(average, value)
            assert average == pytest.approx(expected, rel=tolerance, nan_ok=True)


def test_pseudo_dice(golden: Path) -> None:
    for row in read(golden, "epoch_pseudo_dice.json"):
        counts = sum(np.array([batch["tp_hard"], batch["fp_hard"], batch["fn_hard"]]) for batch in row["batches"])
        dice, mean = pseudo_dice(counts)
        np.testing.assert_allclose(dice, row["dice_per_class_or_region"], rtol=1e-6)
        assert mean == pytest.approx(row["mean_fg_dice"], rel=1e-6, nan_ok=True)


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
