"""Remarks on the data that a person should read before training."""

from __future__ import annotations

from math import prod

import numpy as np

from segfit.fingerprint.fingerprint import Fingerprint
from segfit.labels import LabelScheme
from segfit.planning.mirroring import value_names

__all__ = ["dataset_notes"]

FEW_CASES = 10
RARE_SHARE = 1e-4
SPACING_RATIO = 3.0


def dataset_notes(fingerprint: Fingerprint, labels: LabelScheme) -> tuple[str, ...]:
    """Return remarks: few cases, labels that are absent or rare, spacings that vary strongly."""
    cases = fingerprint.cases
    notes: list[str] = []
    if len(cases) < FEW_CASES:
        notes.append(f"only {len(cases)} training cases: expect results to differ much from case to case")
    voxels = sum(prod(case.shape_after_crop) for case in cases)
    for value, name in sorted(value_names(labels).items()):
        counts = [case.label_voxels.get(value, 0) for case in cases]
        present = sum(count > 0 for count in counts)
        if present == 0:
            notes.append(f'label "{name}" ({value}) occurs in no case: it cannot be learned')
        elif present < len(cases) / 2:
            notes.append(f'label "{name}" ({value}) is absent in {len(cases) - present} of {len(cases)} cases')
        if present and sum(counts) < RARE_SHARE * voxels:
            notes.append(f'label "{name}" ({value}) is rare: {sum(counts) / voxels:.1g} of all voxels')
    spacings = np.array([case.spacing_mm for case in cases])
    for axis, (low, high) in enumerate(zip(spacings.min(0), spacings.max(0), strict=True)):
        if high > SPACING_RATIO * low:
            name = "zyx"[-fingerprint.ndim :][axis]
            notes.append(f"spacing along {name} varies from {low:.3g} to {high:.3g} mm between cases")
    return tuple(notes)
