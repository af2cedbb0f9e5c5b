"""Geometry of the augmentation against the reference."""

from __future__ import annotations

import json
from math import radians
from pathlib import Path

import pytest

from segfit.planning.augmentation import augmentation_for


@pytest.mark.golden("schedule/augmentation_geometry.json")
def test_geometry(golden: Path) -> None:
    for row in json.loads((golden / "schedule" / "augmentation_geometry.json").read_text()):
        spec = augmentation_for(row["patch_size"], row["mirror_axes"])
        assert list(spec.sample_patch) == row["initial_patch_size"]
        assert spec.dummy_2d == row["dummy_2d"]
        limit = radians(spec.rotation_degrees)
        assert [-limit, limit] == pytest.approx(row["rotation_radians"], rel=1e-12)
        assert list(spec.mirror_axes) == row["mirror_axes"]
