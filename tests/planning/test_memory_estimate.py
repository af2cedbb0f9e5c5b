from __future__ import annotations

from typing import Literal

import pytest

from segfit.feature_maps import feature_map_elements
from segfit.planning.presets import RULES
from segfit.planning.topology import topology


@pytest.mark.parametrize(
    ("kind", "spacing", "patch", "heads", "expected"),
    [
        ("plain", (1, 1, 1), (128, 128, 128), 3, 452_796_416),
        ("plain", (1, 1, 1), (128, 128, 128), 15, 477_962_240),
        ("plain", (1, 1), (512, 512), 3, 82_886_656),
        ("residual", (1, 1, 1), (128, 128, 128), 3, 557_420_544),
        ("residual", (1, 1), (512, 512), 3, 129_703_936),
        ("plain", (1, 1, 1), (40, 56, 40), 3, 19_174_400),
        ("residual", (1, 1, 1), (40, 56, 40), 3, 23_609_600),
        ("plain", (10, 1.5625, 1.5625), (10, 256, 224), 4, 170_562_560),
    ],
)
def test_values_of_the_reference(
    kind: Literal["plain", "residual"], spacing: tuple[float, ...], patch: tuple[int, ...], heads: int, expected: int
) -> None:
    rules = RULES["stock" if kind == "plain" else "resenc-m"]
    shape = topology(spacing, patch)
    stages = len(shape.strides)
    encoder, decoder = rules.convs(stages)
    estimate = feature_map_elements(
        kind,
        patch,
        features=rules.features(len(patch), stages),
        strides=shape.strides,
        encoder_convs=encoder,
        decoder_convs=decoder,
        heads=heads,
    )
    assert shape.patch == patch
    assert estimate == expected


def test_a_single_stage_has_no_decoder_and_no_head() -> None:
    assert (
        feature_map_elements(
            "plain", (4, 4), features=[8], strides=[(1, 1)], encoder_convs=[2], decoder_convs=[], heads=5
        )
        == 2 * 8 * 16
    )


def test_deep_supervision_counts_every_head_but_the_bottlenecks() -> None:
    arguments = {
        "features": [1, 1, 1],
        "strides": [(1, 1), (2, 2), (2, 2)],
        "encoder_convs": [1, 1, 1],
        "decoder_convs": [1, 1],
    }
    one = feature_map_elements("plain", (16, 16), heads=2, **arguments)
    every = feature_map_elements("plain", (16, 16), heads=2, deep_supervision=True, **arguments)
    assert every - one == 2 * 8 * 8
