from __future__ import annotations

import pytest

from segfit.planning.augmentation import augmentation_for


@pytest.mark.parametrize(
    ("patch", "degrees", "dummy_2d", "sample_patch"),
    [
        ((128, 128, 128), 30, False, (205, 205, 205)),
        ((64, 192, 160), 30, False, (178, 289, 200)),  # a ratio of exactly 3 is not flat
        ((16, 320, 320), 180, True, (16, 376, 376)),
        ((20, 256, 224), 180, True, (20, 301, 301)),
        ((512, 512), 180, False, (602, 602)),
        ((512, 256), 15, False, (659, 301)),
        ((96, 64), 180, False, (112, 112)),  # a ratio of exactly 1.5 may be turned all around
    ],
)
def test_rules(patch: tuple[int, ...], degrees: float, dummy_2d: bool, sample_patch: tuple[int, ...]) -> None:
    spec = augmentation_for(patch, mirror_axes=(0,), masked_channels=(1,))
    assert (spec.rotation_degrees, spec.dummy_2d, spec.sample_patch) == (degrees, dummy_2d, sample_patch)
    assert spec.mirror_axes == (0,)
    assert spec.masked_channels == (1,)


def test_angle_and_plane_can_be_given() -> None:
    given = augmentation_for((64, 64, 64), (0,), degrees=0)
    assert (given.rotation_degrees, given.dummy_2d, given.sample_patch) == (0, False, (75, 75, 75))
    flat = augmentation_for((64, 64, 64), (0,), dummy_2d=True)
    assert (flat.rotation_degrees, flat.dummy_2d, flat.sample_patch[0]) == (180, True, 64)
    assert not augmentation_for((16, 96, 96), (0,), dummy_2d=False).dummy_2d
    assert not augmentation_for((96, 96), (0,), dummy_2d=True).dummy_2d
