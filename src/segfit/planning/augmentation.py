"""How far a patch may be rotated, and how large the patch that is cut out for it must be.

The rules are nnU-Net's (2.8.1). They look at the patch, not at the spacing: a flat patch stands for
anisotropic voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, pi, radians, sin
from typing import Any

from segfit.specs import AugmentationSpec

__all__ = ["STRENGTHS", "augmentation_for"]

STRENGTHS: dict[str, dict[str, Any]] = {
    "weak": {
        f"{name}_probability": 0.0
        for name in ("noise", "blur", "brightness", "contrast", "low_resolution", "inverted_gamma", "gamma")
    },
    "strong": {
        "rotation_probability": 0.4,
        "scaling_range": (0.7, 1.43),
        "blur_sigma_range": (0.3, 1.5),
        "brightness_probability": 0.0,
        "contrast_probability": 0.2,
        "contrast_range": (0.5, 2.0),
        "low_resolution_probability": 0.15,
        "low_resolution_range": (0.25, 1.0),
        "gamma_probability": 0.1,
        "quarter_turn_probability": 0.5,
        "axis_swap_probability": 0.5,
        "offset_probability": 0.1,
        "blank_probability": 0.4,
        "shading_probability": 0.3,
        "local_gamma_probability": 0.3,
        "sharpening_probability": 0.2,
    },
}
"""What of the augmentation is another than nnU-Net's, by strength: geometry alone; that of its `nnUNetTrainerDA5`."""

_FLAT_3D = 3.0  # beyond this ratio of sizes transforms stay in the plane
_FLAT_2D = 1.5  # beyond this ratio of sizes a 2D patch is turned only a little
_MARGIN = 0.85  # the patch that is cut out is larger by 1 / 0.85 for the zooming out


def augmentation_for(
    patch: Sequence[int],
    mirror_axes: Sequence[int],
    masked_channels: Sequence[int] = (),
    *,
    dummy_2d: bool | None = None,
    degrees: float | None = None,
) -> AugmentationSpec:
    """Return nnU-Net's augmentation of a patch.

    Parameters
    ----------
    patch : size the network sees, per axis
    mirror_axes : axes that may be flipped
    masked_channels : image channels that are zero outside the non-zero mask (normalised with `use_mask`)
    dummy_2d, degrees : in place of what the rule gives: volumes in their plane only, and the largest angle
    """
    dummy_2d = len(patch) == 3 and (max(patch) / patch[0] > _FLAT_3D if dummy_2d is None else dummy_2d)
    if degrees is None and len(patch) == 2:
        degrees = 15.0 if max(patch) / min(patch) > _FLAT_2D else 180.0
    elif degrees is None:
        degrees = 180.0 if dummy_2d else 30.0
    enlarged = _enlarged(patch, min(radians(degrees), pi / 2))
    return AugmentationSpec(
        rotation_degrees=degrees,
        dummy_2d=dummy_2d,
        sample_patch=(patch[0], *enlarged[1:]) if dummy_2d else enlarged,
        mirror_axes=tuple(mirror_axes),
        masked_channels=tuple(masked_channels),
    )


def _enlarged(patch: Sequence[int], angle: float) -> tuple[int, ...]:
    """Return a patch that covers the rotated one. Not symmetric in the axes; nnU-Net's plans depend on it."""
    c, s = cos(angle), sin(angle)
    if len(patch) == 2:
        x, y = patch
        corners: tuple[tuple[float, ...], ...] = ((x, x * c + y * s), (y, y * c - x * s))
    else:
        x, y, z = patch
        corners = (
            (x, x * c - z * s, x * c + y * s),
            (y, y * c + z * s, y * c - x * s),
            (z, z * c - y * s, z * c + x * s),
        )
    return tuple(int(max(abs(value) for value in axis) / _MARGIN) for axis in corners)
