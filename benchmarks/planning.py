"""Plan many datasets with all presets; print milliseconds per plan and how many agree with the reference.

    python benchmarks/planning.py --golden ../shared/golden

Each is planned twice: as the reference's plans file, and as a plan of segfit's with a reason for every value. The last
line of stdout is JSON. The reference's answers are read from ``plans.jsonl.gz``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from segfit import nnunet
from segfit.errors import InputError
from segfit.fingerprint.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics
from segfit.labels import LabelScheme, Target
from segfit.options import Options
from segfit.planning.planner import derive

_PRESETS = {
    "ExperimentPlanner": "stock",
    "nnUNetPlannerResEncM": "resenc-m",
    "nnUNetPlannerResEncL": "resenc-l",
    "nnUNetPlannerResEncXL": "resenc-xl",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, default=Path("../shared/golden"))
    arguments = parser.parse_args()

    with gzip.open(arguments.golden / "plans.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    milliseconds, explained, agree = [], [], 0
    for row in rows:
        for planner, theirs in row["plans"].items():
            name, _, memory = planner.partition("@")
            memory_gb = float(memory.removesuffix("GB")) if memory else None
            started = time.perf_counter()
            ours = nnunet.plans(row["dataset"], row["fingerprint"], _PRESETS[name], memory_gb)
            milliseconds.append(1000 * (time.perf_counter() - started))
            agree += same(ours["configurations"], theirs["configurations"])
            options = Options.model_validate({"preset": _PRESETS[name], "memory_gb": memory_gb})
            measured, labels = fingerprint(row["dataset"], row["fingerprint"]), scheme(row["dataset"])
            started = time.perf_counter()
            with suppress(InputError):  # the reference plans networks of one stage, too
                derive(measured, labels, options)
            explained.append(1000 * (time.perf_counter() - started))
    figures = {
        "datasets": len(rows),
        "plans": len(milliseconds),
        "agree": agree,
        "median_ms": round(median(milliseconds), 2),
        "slowest_ms": round(max(milliseconds), 2),
        "explained_median_ms": round(median(explained), 2),
        "explained_slowest_ms": round(max(explained), 2),
        "torch_loaded": "torch" in sys.modules,
    }
    print(json.dumps(figures))


def fingerprint(dataset: dict[str, Any], theirs: dict[str, Any]) -> Fingerprint:
    """Return the reference's fingerprint as ours; 2D images lose their axis of one slice."""
    shapes, spacings = theirs["shapes_after_crop"], theirs["spacings"]
    flat = all(shape[0] == 1 and spacing[0] == 999 for shape, spacing in zip(shapes, spacings, strict=True))
    axes = slice(1, None) if flat else slice(None)
    intensities = theirs["foreground_intensity_properties_per_channel"]
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
        median_relative_size_after_crop=theirs["median_relative_size_after_cropping"],
        intensities=tuple(IntensityStatistics.model_validate(intensities[str(n)]) for n in range(len(intensities))),
    )


def scheme(dataset: dict[str, Any]) -> LabelScheme:
    """Return the labels of a ``dataset.json``."""
    labels = dict(dataset["labels"])
    ignore = labels.pop("ignore", None)
    targets = [
        Target(name=name, values=tuple(value) if isinstance(value, list) else (value,))
        for name, value in labels.items()
    ]
    order = dataset.get("regions_class_order")
    return LabelScheme(labels=tuple(targets), region_order=order, ignore_value=ignore)


def same(ours: Any, theirs: Any) -> bool:
    """Whether two JSON values are equal, numbers to 1e-9 of themselves."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(theirs, float):
        return abs(ours - theirs) <= 1e-9 * abs(theirs)
    return bool(ours == theirs)


if __name__ == "__main__":
    main()
