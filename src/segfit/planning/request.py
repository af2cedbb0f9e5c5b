"""The designs of a dataset, each with what was asked of it: the request in the terms of the rules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from segfit.fingerprint.fingerprint import Fingerprint
from segfit.options import ConfigurationOptions, PlanningOptions
from segfit.planning.design import Budget, DatasetDesign, Design, Wish, design_dataset
from segfit.planning.presets import rules_of_kind

__all__ = ["SLICE_SPACING_MM", "designed", "designs_of"]

SLICE_SPACING_MM = 999.0
"""Spacing of the single slice that 2D images get while the rules, which know three axes, are evaluated."""


def designed(fingerprint: Fingerprint, budget: Budget, asked: PlanningOptions) -> DatasetDesign:
    """Return the design of all configurations, each with what was asked of it.

    Here, and only here, 2D images become volumes of one slice, thicker than any pixel.
    """
    spacings = np.array([case.spacing_mm for case in fingerprint.cases], dtype=np.float64)
    shapes = np.array([case.shape_after_crop for case in fingerprint.cases], dtype=np.float64)
    targets = [one.target_spacing_mm or () for one in (asked, *asked.by_configuration.values())]
    thickness = SLICE_SPACING_MM * max(1.0, float(spacings.max()), *(mm for target in targets for mm in target))
    if fingerprint.ndim == 2:
        slices = np.ones((len(shapes), 1))
        spacings, shapes = np.hstack([thickness * slices, spacings]), np.hstack([slices, shapes])

    def wish(values: ConfigurationOptions) -> Wish:
        rules = budget.rules if values.kind is None else rules_of_kind(budget.rules, values.kind)
        rules = replace(rules, base_features=values.base_features or rules.base_features)
        target = values.target_spacing_mm
        if target is not None and fingerprint.ndim == 2:
            target = (thickness, *target)
        return Wish(
            budget=replace(budget, rules=rules),
            target_mm=target,
            patch_size=values.patch_size,
            transpose=values.transpose,
        )

    own: dict[str, Wish] = {name: wish(asked.of(name)) for name in asked.by_configuration}
    lowres = asked.by_configuration.get("3d_lowres")
    if lowres is not None and lowres.target_spacing_mm is None:  # that of all belongs to the full resolution
        own["3d_lowres"] = replace(own["3d_lowres"], target_mm=None)
    common = wish(asked)
    return design_dataset(
        spacings,
        shapes,
        fingerprint.num_training,
        common.budget,
        target_mm=common.target_mm,
        patch_size=common.patch_size,
        transpose=common.transpose,
        own=own,
    )


def designs_of(dataset: DatasetDesign) -> dict[str, Design]:
    """Return the design behind every configuration the rules ask for, in the order of the plan."""
    by_name = {
        "2d": dataset.plane,
        "3d_lowres": dataset.lowres,
        "3d_fullres": dataset.fullres,
        "3d_cascade_fullres": dataset.cascade,
    }
    return {name: item for name, item in by_name.items() if item is not None}
