"""What can be said against a request before it is planned: fingerprints and options that contradict each other."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from segfit.errors import InputError
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.options import ConfigurationOptions, Options
from segfit.planning.presets import orientation_of
from segfit.specs import LARGEST_MM, MOST_PATCH_VOXELS, SMALLEST_MM

__all__ = ["check_request"]


def check_request(fingerprint: Fingerprint, options: Options) -> None:
    """Refuse fingerprints and options that contradict each other or themselves."""
    ndim, asked = fingerprint.ndim, options.planning
    if not fingerprint.cases:
        raise InputError(f"the fingerprint of {fingerprint.dataset} holds no case", "add training cases with labels")
    for case in fingerprint.cases:
        lengths = {len(case.shape), len(case.spacing_mm), len(case.shape_after_crop)}
        if lengths != {ndim} or min(case.spacing_mm) <= 0 or min(case.shape_after_crop) < 1:
            raise InputError(
                f"{case.case}: expected {ndim} positive spacings and sizes, got spacing {case.spacing_mm} and "
                f"shape {case.shape_after_crop}",
                "measure the fingerprint anew",
            )
    if len(fingerprint.intensities) != len(fingerprint.channel_names) or fingerprint.num_training < 1:
        raise InputError(
            f"the fingerprint of {fingerprint.dataset} has statistics of {len(fingerprint.intensities)} channels for "
            f"{len(fingerprint.channel_names)} names and {fingerprint.num_training} cases",
            "measure it anew",
        )
    if ndim == 3 and fingerprint.orientation != orientation_of(options):
        raise InputError(
            f"these options plan on {orientation_of(options)} axes, the fingerprint was measured on "
            f"{fingerprint.orientation} ones",
            "measure it anew",
        )
    _check_values("planning", asked, options, ndim, (2, 3) if ndim == 3 else (2,))
    _check_kind("planning", asked, options.preset)
    for name, own in asked.by_configuration.items():
        _check_values(f"planning.{name}", own, options, ndim, (2,) if name == "2d" else (3,))
        _check_kind(f"planning.{name}", asked.of(name), options.preset)


def _check_values(
    prefix: str, asked: ConfigurationOptions, options: Options, ndim: int, patch_axes: tuple[int, ...]
) -> None:
    if asked.target_spacing_mm is not None:
        _check_length(f"{prefix}.target_spacing_mm", asked.target_spacing_mm, (ndim,))
        if not all(SMALLEST_MM <= size <= LARGEST_MM for size in asked.target_spacing_mm):
            raise InputError(
                f"{prefix}.target_spacing_mm must be above zero, {SMALLEST_MM:g} to {LARGEST_MM:g} mm, "
                f"got {list(asked.target_spacing_mm)}"
            )
    if asked.patch_size is not None:
        _check_length(f"{prefix}.patch_size", asked.patch_size, patch_axes)
        if min(asked.patch_size) < 1:
            raise InputError(f"{prefix}.patch_size must be above zero, got {list(asked.patch_size)}")
        if prod(asked.patch_size) > MOST_PATCH_VOXELS:
            raise InputError(f"{prefix}.patch_size has more than {MOST_PATCH_VOXELS} voxels: {list(asked.patch_size)}")
    if asked.transpose is not None and (ndim == 2 or sorted(asked.transpose) != [0, 1, 2]):
        raise InputError(f"{prefix}.transpose is an order of the axes 0,1,2 of volumes, got {list(asked.transpose)}")
    for axis in asked.mirror_axes or ():
        if not 0 <= axis < ndim:
            raise InputError(f"{prefix}.mirror_axes are numbered 0 to {ndim - 1} in array order, got {axis}")
    if options.augmentation.strength == "none" and asked.mirror_axes:
        raise InputError(
            f"{prefix}.mirror_axes is {','.join(map(str, asked.mirror_axes))}, but augmentation.strength=none flips "
            "nothing in training, and a network that never saw a flipped image is worse on it",
            "leave one of them out",
        )


def _check_kind(prefix: str, asked: ConfigurationOptions, preset: str) -> None:
    if asked.kind == "mednext" and preset != "auto":
        raise InputError(
            f"{prefix}.kind is mednext, which no preset of nnU-Net has, and the preset is {preset}",
            "use preset auto",
        )
    if asked.expansion is not None and asked.kind != "mednext":
        raise InputError(f"{prefix}.expansion is of MedNeXt's blocks", f"set {prefix}.kind=mednext, or leave it out")


def _check_length(key: str, values: Sequence[float], lengths: tuple[int, ...]) -> None:
    if len(values) not in lengths:
        wanted = " or ".join(str(n) for n in lengths)
        raise InputError(f"{key} needs {wanted} values for this dataset, in array order, got {list(values)}")
