"""Augmentation beside the reference's, the same transforms on one core: samples per second, in turn, in one run.

    python benchmarks/augmentation.py --reference-python PATH [--rounds 3]

`--reference-python` belongs to an environment with nnunetv2 2.8.1, which runs as a program of its own. Both programs
augment the same noise, with one ball within another as labels, by the same ranges and probabilities, all axes mirrored,
each with draws of its own; that both compute the same values is the matter of the golden tests. Start-up and the first
batch are not counted. Medians over the rounds; ratios are reference / segfit. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from math import prod, radians
from pathlib import Path
from statistics import median
from typing import Any

from segfit.planning.augmentation import augmentation_for

_VOXELS = 30_000_000
"""How many voxels of patches are augmented for one measurement."""


@dataclass(frozen=True)
class Work:
    """Samples of one kind of patch, in batches."""

    patch: tuple[int, ...]
    channels: int
    batch: int

    @property
    def batches(self) -> int:
        return max(2, round(_VOXELS / (prod(self.patch) * self.channels * self.batch)))


PATCHES = {
    "hippocampus, 40x56x40": Work((40, 56, 40), 1, 9),
    "CT, 128x128x128": Work((128, 128, 128), 1, 2),
    "prostate, 20x320x256, 2 channels": Work((20, 320, 256), 2, 2),
    "pictures, 512x512, RGB": Work((512, 512), 3, 12),
}

_TIMED = """
import json, resource, sys, time
import numpy as np, torch
work = json.loads(sys.argv[1])
torch.set_num_threads(1)
rng = np.random.default_rng(0)
sizes = (work["batch"], work["channels"], *work["sample_patch"])
image = torch.from_numpy(rng.standard_normal(sizes, dtype=np.float32))
axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in sizes[2:]), indexing="ij", sparse=True)
distance = sum(axis**2 for axis in axes)  # a ball within a ball
labels = torch.from_numpy(((distance < 0.5).astype(np.int16) + (distance < 0.2))[None, None].repeat(sizes[0], 0))
def timed(augment):
    augment(0)
    wall, cpu = time.perf_counter(), time.process_time()
    for number in range(work["batches"]):
        augment(1 + number)
    samples = work["batch"] * work["batches"]
    print(json.dumps({
        "wall_s": (time.perf_counter() - wall) / samples,
        "cpu_s": (time.process_time() - cpu) / samples,
        "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }))
"""

_SEGFIT = """
from segfit.augmentation.policy import apply, draw
from segfit.specs import AugmentationSpec
spec = AugmentationSpec.model_validate(work["spec"])
def augment(number):
    rng = np.random.default_rng(number)
    apply(draw(spec, work["patch"], work["batch"], work["channels"], rng), image, labels)
timed(augment)
"""

_REFERENCE = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
limit, patch = work["radians"], work["patch"]
transforms = nnUNetTrainer.get_training_transforms(
    patch, (-limit, limit), None, tuple(range(len(patch))), work["spec"]["dummy_2d"]
)
def augment(number):
    np.random.seed(number), torch.manual_seed(number)
    for sample in range(work["batch"]):
        transforms(image=image[sample].clone(), segmentation=labels[sample].clone())
timed(augment)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    figures = {name: compare(work, arguments) for name, work in PATCHES.items()}
    for name, ratios in figures.items():
        print(f"{name}: {ratios['reference_ms']} ms against {ratios['segfit_ms']} ms a sample, {ratios['wall_ratio']}")
    print(json.dumps(figures))


def compare(work: Work, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure both programs in turn on one kind of patch."""
    spec = augmentation_for(work.patch, range(len(work.patch)))
    given = asdict(work) | {"batches": work.batches, "sample_patch": spec.sample_patch, "spec": spec.model_dump()}
    task = json.dumps(given | {"radians": radians(spec.rotation_degrees)})
    programs = {"reference": (arguments.reference_python, _REFERENCE), "segfit": (Path(sys.executable), _SEGFIT)}
    costs: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for _ in range(arguments.rounds):
        for name, (python, program) in programs.items():
            costs[name].append(run(python, _TIMED + program, task))

    def ratio(key: str) -> float:
        theirs, ours = (median(cost[key] for cost in costs[name]) for name in programs)
        return round(theirs / ours, 2)

    milliseconds = {
        f"{name}_ms": round(1000 * median(cost["wall_s"] for cost in each), 2) for name, each in costs.items()
    }
    return milliseconds | {f"{what}_ratio": ratio(key) for what, key in _KEYS.items()}


_KEYS = {"wall": "wall_s", "cpu": "cpu_s", "memory": "memory_gb"}


def run(python: Path, program: str, task: str) -> dict[str, float]:
    """Run a program on one thread; return what it printed last."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([python, "-c", program, task], stdout=subprocess.PIPE, text=True, env=environment, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
