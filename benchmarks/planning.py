"""Plan many datasets with all presets; print milliseconds per plan and how many agree with the reference.

    python benchmarks/planning.py --golden ../shared/golden

The last line of stdout is JSON. The reference's answers are read from ``plans.jsonl.gz``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from segfit import nnunet

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
    milliseconds, agree = [], 0
    for row in rows:
        for planner, theirs in row["plans"].items():
            name, _, memory = planner.partition("@")
            memory_gb = float(memory.removesuffix("GB")) if memory else None
            started = time.perf_counter()
            ours = nnunet.plans(row["dataset"], row["fingerprint"], _PRESETS[name], memory_gb)
            milliseconds.append(1000 * (time.perf_counter() - started))
            agree += same(ours["configurations"], theirs["configurations"])
    figures = {
        "datasets": len(rows),
        "plans": len(milliseconds),
        "agree": agree,
        "median_ms": round(median(milliseconds), 2),
        "slowest_ms": round(max(milliseconds), 2),
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
