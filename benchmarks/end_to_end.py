"""Run a whole dataset by the command a user types; print seconds, CPU seconds, peak memory and scores.

    python benchmarks/end_to_end.py DATASET --time 20m --out DIR [--unseen DIR]

`--unseen` names a folder with `images/` and `labels/` of cases that are not in the dataset; the finished model predicts
them too. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--time", default="20m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--unseen", type=Path)
    arguments = parser.parse_args()

    segfit = [sys.executable, "-m", "segfit"]
    command = [*segfit, "run", str(arguments.dataset), "--out", str(arguments.out), "--time", arguments.time, "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    wall = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = json.loads(done.stdout)
    figures = {
        "dataset": arguments.dataset.name,
        "time": arguments.time,
        "cores": len(os.sched_getaffinity(0)),
        "wall_s": round(wall, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_gb": round(usage.ru_maxrss / 2**20, 2),
        "dice": result["dice"],
    }
    if arguments.unseen is not None:
        figures["dice"]["unseen"] = unseen(segfit, result["model"], arguments)
    print(json.dumps(figures))


def unseen(segfit: list[str], model: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Predict and score the unseen cases."""
    predictions = arguments.out / "unseen"
    images, labels = arguments.unseen / "images", arguments.unseen / "labels"
    predict = [*segfit, "predict", "--model", model, "-i", str(images), "-o", str(predictions), "--overwrite"]
    subprocess.run(predict, stdout=subprocess.DEVNULL, check=True)
    evaluate = [*segfit, "evaluate", str(arguments.dataset), "-p", str(predictions), "-r", str(labels), "--json"]
    done = subprocess.run(evaluate, stdout=subprocess.PIPE, text=True, check=True)
    summary = json.loads(done.stdout)
    return {name: scores["dice"] for name, scores in summary["mean"].items()} | {"mean": summary["mean_dice"]}


if __name__ == "__main__":
    main()
