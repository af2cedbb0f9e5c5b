"""Plan many datasets with all presets; print milliseconds per plan and how many agree with the reference.

    python benchmarks/planning.py --golden ../shared/golden

Each is planned twice: as the reference's plans file, and as a plan of segfit's with a reason for every value. The last
line of stdout is JSON. The reference's answers are read from ``plans.jsonl.gz``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from reference_datasets import fingerprint_of, labels_of, preset_and_memory, read_datasets
from segfit import nnunet
from segfit.errors import InputError
from segfit.options import Options
from segfit.planning.planner import derive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, default=Path("../shared/golden"))
    arguments = parser.parse_args()

    rows = read_datasets(arguments.golden)
    milliseconds, explained, agree = [], [], 0
    for row in rows:
        for planner, theirs in row["plans"].items():
            preset, memory_gb = preset_and_memory(planner)
            started = time.perf_counter()
            ours = nnunet.plans(row["dataset"], row["fingerprint"], preset, memory_gb)
            milliseconds.append(1000 * (time.perf_counter() - started))
            agree += same(ours["configurations"], theirs["configurations"])
            options = Options.model_validate({"preset": preset, "memory_gb": memory_gb})
            measured, labels = fingerprint_of(row["dataset"], row["fingerprint"]), labels_of(row["dataset"])
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
