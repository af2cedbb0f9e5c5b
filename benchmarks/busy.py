"""What a training step costs beside busy processes, by how OpenMP's threads wait and how many there are.

    python benchmarks/busy.py [--rounds 3] [--busy 0,1,2]

Every measurement is a fresh process, since the policy is read once. The variants take turns, so that whatever else the
machine does meets them all; medians over the rounds. The last line of stdout is JSON, seconds per step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from statistics import median
from time import perf_counter

import torch

from economy import busy, numbers
from segfit.device import measure_hardware
from segfit.labels import LabelScheme
from segfit.specs import AugmentationSpec, Configuration, NetworkSpec, Normalization, PreprocessingSpec, TrainingSpec
from segfit.training.probe import best_threads, probe_step

POLICIES = ("unset", "passive")
SIZES = {"2d": (128, 128), "3d": (32, 32, 32)}
LABELS = LabelScheme.from_declaration({"background": 0, "class": 1})
CPU = torch.device("cpu")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", default="0,1,2", help="numbers of busy processes")
    parser.add_argument("--one", action="store_true", help="measure in this process and print that")
    arguments = parser.parse_args(given)
    if arguments.one:
        print(json.dumps(steps()))
        return
    beside = [int(number) for number in numbers(arguments.busy)]
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    for _, number, policy in product(range(arguments.rounds), beside, POLICIES):
        with busy(number):
            found.setdefault((number, policy), []).append(measured(policy))
    seconds = {
        f"{number} busy, {policy}, {name}": round(median(item[name] for item in items), 3)
        for (number, policy), items in found.items()
        for name in items[0]
    }
    for name, value in seconds.items():
        print(f"{value:8.3f}  {name}")
    machine = measure_hardware("cpu")
    versions = {"torch": torch.__version__, "processor": machine.name, "processors": machine.threads}
    print(json.dumps({**versions, "rounds": arguments.rounds, "load": os.getloadavg()[0], "seconds": seconds}))


def measured(policy: str) -> dict[str, float]:
    """Return what `steps` says in a fresh process."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if policy != "unset":
        environment["OMP_WAIT_POLICY"] = policy
    done = subprocess.run([sys.executable, __file__, "--one"], env=environment, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def steps() -> dict[str, float]:
    """Return seconds per step of a small network in 2D and 3D, with all threads and with one; the number chosen; the
    seconds that took.
    """
    most = torch.get_num_threads()
    told: dict[str, float] = {}
    for name, size in SIZES.items():
        configuration, recipe = small(size)
        for threads in sorted({most, 1}, reverse=True):
            torch.set_num_threads(threads)
            told[f"{name}, {threads} threads"] = probe_step(configuration, recipe, LABELS, CPU).seconds_per_step
        torch.set_num_threads(most)
        started = perf_counter()
        told[f"{name}, threads chosen"] = best_threads(configuration, recipe, LABELS, CPU)
        told[f"{name}, choosing"] = perf_counter() - started
    return told


def small(size: tuple[int, ...]) -> tuple[Configuration, TrainingSpec]:
    """Return a network of three stages and 12 features, batch 2, and its recipe."""
    ndim = len(size)
    configuration = Configuration(
        name=f"{ndim}d",
        ndim=ndim,
        patch_size=size,
        batch_size=2,
        spacing_mm=(1.0,) * ndim,
        median_shape=tuple(map(float, size)),
        batch_dice=True,
        preprocessing=PreprocessingSpec(
            orientation="stored",
            transpose=tuple(range(ndim)),
            spacing_mm=(1.0,) * ndim,
            normalization=(Normalization(scheme="none"),),
        ),
        network=NetworkSpec(
            kind="plain",
            ndim=ndim,
            in_channels=1,
            num_outputs=2,
            features=(12, 24, 48),
            strides=((1,) * ndim, (2,) * ndim, (2,) * ndim),
            kernels=((3,) * ndim,) * 3,
            encoder_convs=(2, 2, 2),
            decoder_convs=(2, 2),
        ),
        memory_estimate=0,
    )
    return configuration, TrainingSpec(augmentation=AugmentationSpec(sample_patch=size))


if __name__ == "__main__":
    main()
