"""The datasets in ``plans.jsonl.gz`` of the golden data, as segfit sees them: for benchmarks and golden tests."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from segfit.fingerprint.fingerprint import CaseFingerprint, Fingerprint
from segfit.labels import LabelClass, LabelScheme
from segfit.planning.presets import RULES
from segfit.specs import IntensityStatistics

__all__ = ["PRESETS", "fingerprint_of", "labels_of", "preset_and_memory", "read_datasets"]

PRESETS = {rules.planner: rules.name for rules in RULES.values()}
"""Our presets by the names of the reference's planners."""


def read_datasets(golden: Path) -> list[dict[str, Any]]:
    """Return a row a dataset: "dataset" and "fingerprint" as the reference's files hold them, "plans" by planner."""
    with gzip.open(golden / "plans.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


def preset_and_memory(planner: str) -> tuple[str, float | None]:
    """Return preset and memory target in GB of a planner like ``nnUNetPlannerResEncM@16GB``; None: the preset's own."""
    name, _, memory = planner.partition("@")
    return PRESETS[name], float(memory.removesuffix("GB")) if memory else None


def labels_of(dataset: dict[str, Any]) -> LabelScheme:
    """Return the labels of a ``dataset.json`` unchecked: the made-up datasets hold an ignore value too high."""
    labels = dict(dataset["labels"])
    ignore = labels.pop("ignore", None)
    targets = [
        LabelClass(name=name, values=tuple(value) if isinstance(value, list) else (value,))
        for name, value in labels.items()
    ]
    order = dataset.get("regions_class_order")
    return LabelScheme(labels=tuple(targets), region_order=order, ignore_value=ignore)


def fingerprint_of(dataset: dict[str, Any], measured: dict[str, Any]) -> Fingerprint:
    """Return the reference's fingerprint as ours; 2D images lose the axis of one slice."""
    shapes, spacings = measured["shapes_after_crop"], measured["spacings"]
    flat = all(shape[0] == 1 and spacing[0] == 999 for shape, spacing in zip(shapes, spacings, strict=True))
    axes = slice(1, None) if flat else slice(None)
    intensities = measured["foreground_intensity_properties_per_channel"]
    return Fingerprint(
        dataset="Dataset001_X",
        ndim=2 if flat else 3,
        orientation="stored",
        channel_names=tuple(dataset["channel_names"].values()),
        num_training=dataset["numTraining"],
        cases=tuple(
            CaseFingerprint(
                case=f"case_{index}",
                content="",
                shape=shape[axes],
                spacing_mm=spacing[axes],
                shape_after_crop=shape[axes],
                relative_size_after_crop=1.0,
                label_voxels={},
                label_centroids={},
            )
            for index, (shape, spacing) in enumerate(zip(shapes, spacings, strict=True))
        ),
        median_relative_size_after_crop=measured["median_relative_size_after_cropping"],
        intensities=tuple(IntensityStatistics.model_validate(intensities[str(n)]) for n in range(len(intensities))),
    )
