"""Values as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from segfit.text import name_in_words, value_in_words


@pytest.mark.parametrize(
    ("value", "name", "words"),
    [
        ((40, 56, 40), "patch_size", "40x56x40"),
        ([1.0, 0.75, 0.75], "3d_fullres.spacing_mm", "1x0.75x0.75"),
        ([[1, 1, 1], [2, 2, 2]], "network.strides", "1x1x1, 2x2x2"),
        ([32, 64, 128], "network.features", "32, 64, 128"),
        ([0, 2], "mirror_axes", "0, 2"),
        ([], "mirror_axes", "none"),
        ([0.7, 1.4], "scaling_range", "0.7 to 1.4"),
        ([True, False], "use_mask", "yes, no"),
        ([{"mean": 50.0, "std": 60}, None], "statistics", "mean 50; std 60, not given"),
        (250_000, "steps", "250,000"),
        ("auto", "force_separate", "auto"),
    ],
)
def test_values_are_written_as_people_do(value: Any, name: str, words: str) -> None:
    assert value_in_words(value, name) == words


def test_names_tell_their_unit() -> None:
    names = ("memory_gb", "spacing_mm", "dataset_voxels", "percentile_10_mm")
    assert name_in_words("target_spacing_mm", "px") == "target spacing (px)"
    assert [name_in_words(name) for name in names] == [
        "memory (GB)",
        "spacing (mm)",
        "dataset voxels",
        "10th percentile (mm)",
    ]
