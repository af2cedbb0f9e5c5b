"""Warnings about the data that a person should read before training: what is odd, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from segfit.errors import Problem, warning
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.labels import LabelScheme
from segfit.planning.mirroring import value_names
from segfit.specs import Normalization
from segfit.text import listing

__all__ = ["data_warnings"]

FEW_CASES = 10
RARE_SHARE = 1e-4
"""Labels with a smaller share of all voxels are rare."""
TINY_VOXELS = 50
"""Labels whose median size is below this are tiny."""
SPACING_RATIO = 3.0
EXTENT_RATIO = 3.0
OUTLIER = 8.0
"""Cases whose mean foreground intensity is further from the median than this many robust deviations are odd,"""
ODD_SHARE = 0.1
"""unless there are more of them than this."""


def data_warnings(
    fingerprint: Fingerprint, labels: LabelScheme, normalization: Sequence[Normalization]
) -> tuple[Problem, ...]:
    """Return warnings about few cases, absent, rare and tiny labels, and cases that differ much, with what follows."""
    return (
        *_amount(fingerprint),
        *_labels(fingerprint, labels),
        *_sizes(fingerprint),
        *_intensities(fingerprint, normalization),
    )


def _amount(fingerprint: Fingerprint) -> Iterator[Problem]:
    cases = fingerprint.cases
    if len(cases) < FEW_CASES:
        yield warning(
            "few_cases",
            f"only {len(cases)} training cases: results differ much from case to case, and cross-validation tells "
            "little about new ones",
        )
    counted = [case for case in cases if case.label_voxels]
    empty = [case.case for case in counted if not any(n for value, n in case.label_voxels.items() if value > 0)]
    if empty:
        yield warning(
            "no_foreground",
            f"{len(empty)} of {len(cases)} cases have no foreground ({listing(empty)}): they teach background only, "
            "and have a Dice only where something is predicted",
        )


def _labels(fingerprint: Fingerprint, labels: LabelScheme) -> Iterator[Problem]:
    cases = [case for case in fingerprint.cases if case.label_voxels]  # where nothing was counted, nothing is known
    if not cases:
        return
    voxels = sum(prod(case.shape_after_crop) for case in cases)
    for value, name in sorted(value_names(labels).items()):
        counts = [case.label_voxels.get(value, 0) for case in cases]
        present = [count for count in counts if count > 0]
        label = f'label "{name}" ({labels.stored_values[value]})'
        if not present:
            yield warning("absent_label", f"{label} occurs in no case: it cannot be learned")
            continue
        if len(present) < len(cases) / 2:
            yield warning(
                "label_in_few_cases",
                f"{label} is absent in {len(cases) - len(present)} of {len(cases)} cases: it is learned from the other "
                f"{len(present)} alone",
            )
        if np.median(present) < TINY_VOXELS:
            yield warning(
                "tiny_label",
                f"{label} is tiny, {np.median(present):g} voxels in the median case that has it: a few voxels decide "
                "its Dice, and a coarser spacing may lose it",
            )
        if sum(counts) < RARE_SHARE * voxels:
            yield warning(
                "rare_label",
                f"{label} is rare, {sum(counts) / voxels:.1g} of all voxels: it is sampled mainly by foreground "
                "oversampling (33 % of patches), and needs longer training",
            )


def _sizes(fingerprint: Fingerprint) -> Iterator[Problem]:
    cases, axes = fingerprint.cases, "zyx"[-fingerprint.ndim :]
    spacings = np.array([case.spacing_mm for case in cases])
    unit = fingerprint.unit
    for name, low, high in zip(axes, spacings.min(0), spacings.max(0), strict=True):
        if high > SPACING_RATIO * low:
            yield warning(
                "spacing_varies",
                f"spacing along {name} varies from {low:.3g} to {high:.3g} {unit} between cases: fine ones lose "
                "detail, coarse ones are interpolated",
            )
    extents = spacings * np.array([case.shape_after_crop for case in cases])
    for name, low, high in zip(axes, extents.min(0), extents.max(0), strict=True):
        if high > EXTENT_RATIO * low:
            yield warning(
                "extent_varies",
                f"the extent along {name} varies from {low:.4g} to {high:.4g} {unit} between cases: a patch sees all "
                "of some cases and little of others",
            )


def _intensities(fingerprint: Fingerprint, normalization: Sequence[Normalization]) -> Iterator[Problem]:
    """Name the few cases whose foreground is far brighter or darker than that of the others.

    Z-scored channels may have any scale in any case; elsewhere a case with another one is a mistake.
    """
    for channel, (name, how) in enumerate(zip(fingerprint.channel_names, normalization, strict=True)):
        if how.scheme == "zscore":
            continue
        measured = [(case.case, case.channels[channel]) for case in fingerprint.cases if len(case.channels) > channel]
        known = {case: item.foreground_mean for case, item in measured if item.foreground_mean is not None}
        if len(known) < FEW_CASES:
            continue
        values = np.array(list(known.values()))
        centre = np.median(values)
        deviation = 1.4826 * np.median(np.abs(values - centre))
        odd = [case for case, mean in known.items() if deviation > 0 and abs(mean - centre) > OUTLIER * deviation]
        if 0 < len(odd) <= ODD_SHARE * len(known):
            yield warning(
                "odd_intensity",
                f'channel "{name}": the foreground of {listing(odd)} is far from the usual {centre:.4g} ± '
                f"{deviation:.3g}: look at {'it' if len(odd) == 1 else 'them'}, wrong units or labels look like that",
            )
