"""Training steps of segfit, timed: whole ones, and those of the same network fed ready tensors.

    python benchmarks/steps.py PROJECT CONFIGURATION [--device cpu] [--steps 4] [--cases memory|disk|device]

A whole step draws, reads and augments samples as a training does: in turn on a processor; on a GPU beside the steps,
read by four threads, with the host at most two steps ahead. Ready tensors are of patch size, on the device and not
augmented. On a processor every step is timed and the first one left out; on a GPU all steps together, after some that
choose kernels. `data_wait` is what a step stood still for want of samples. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import torch

from segfit import Project
from segfit.labels import LabelScheme
from segfit.preprocessing.store import CaseStore
from segfit.specs import AugmentationSpec, Configuration, TrainingSpec
from segfit.training.batch import Batch
from segfit.training.device_cases import DeviceCase
from segfit.training.learner import Learner, training_on
from segfit.training.sampler import Batches, PatchSampler, TrainingCase, keep_in_memory, stream

AHEAD = 2  # steps that the host is ahead of a GPU
SETTLING = 8  # steps until a GPU has chosen its kernels
THREADS = 4  # that read for a GPU
RATE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("configuration")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cases", choices=("memory", "disk", "device"), default="memory")
    arguments = parser.parse_args()
    project, name = Project.open(arguments.project), arguments.configuration
    plan, labels = project.plan(), project.dataset.labels
    store = CaseStore(project.folder.cases)
    cases = [store.open(key) for key in project.preprocess()[name].values()]
    measured = steps_of(
        plan.configurations[name],
        plan.training[name],
        labels,
        cases,
        torch.device(arguments.device),
        steps=arguments.steps,
        where=arguments.cases,
    )
    print(json.dumps(measured))


def steps_of(
    configuration: Configuration,
    recipe: TrainingSpec,
    labels: LabelScheme,
    cases: Sequence[TrainingCase],
    device: torch.device,
    *,
    steps: int,
    where: str = "memory",
    limit_s: float = 60.0,
    made: Callable[[Learner], object] = id,
) -> dict[str, Any]:
    """Time whole steps and those fed ready tensors; each kind takes no longer than the limit by much.

    `made` is told each learner before its first step.
    """
    if where == "memory":
        cases = keep_in_memory(cases, channels=configuration.image_channels, limit_gb=4.0)
    task = configuration, recipe, labels, cases, device
    whole = whole_steps(*task, steps=steps, on_device=where == "device", limit_s=limit_s, made=made)
    return {
        "step": whole,
        "ready": ready_steps(*task, steps=steps, limit_s=limit_s, made=made),
        "batch": configuration.batch_size,
        "data_wait_s": whole.pop("data_wait_s"),
    }


def whole_steps(
    configuration: Configuration,
    recipe: TrainingSpec,
    labels: LabelScheme,
    cases: Sequence[TrainingCase],
    device: torch.device,
    *,
    steps: int,
    on_device: bool,
    limit_s: float,
    made: Callable[[Learner], object],
) -> dict[str, Any]:
    """Time steps as a training does them."""
    learner = Learner(configuration, recipe, labels, device, seed=0)
    sampler = PatchSampler.for_training(cases, configuration, recipe, labels, seed=0)
    if on_device:
        sampler = sampler.on_device([DeviceCase(case, device) for case in cases], device)
    on_gpu = device.type == "cuda"
    batches = Batches(sampler, threads=THREADS if on_gpu else 0, pin_memory=on_gpu, reading=learner.beside.working)
    stalls = []
    made(learner)

    def step() -> torch.Tensor:
        stall = learner.beside.stall()
        batch = next(batches)
        stall.end(read=True)
        stalls.append(stall)
        return learner.step(batch, learning_rate=RATE, rng=stream(0, "augmentation", batch.step))

    with training_on(configuration, recipe, device), batches:
        result = timed(steps, step, device, limit_s)
    return result | {"data_wait_s": fmean(stall.seconds() for stall in stalls[-result["steps"] :])}


def ready_steps(
    configuration: Configuration,
    recipe: TrainingSpec,
    labels: LabelScheme,
    cases: Sequence[TrainingCase],
    device: torch.device,
    *,
    steps: int,
    limit_s: float,
    made: Callable[[Learner], object],
) -> dict[str, Any]:
    """Time steps of the same network with one batch of patch size, without augmentation."""
    none = AugmentationSpec(
        sample_patch=configuration.patch_size,
        **{field: 0.0 for field in AugmentationSpec.model_fields if field.endswith("_probability")},
    )
    recipe = recipe.model_copy(update={"augmentation": none})
    raw = PatchSampler.for_training(cases, configuration, recipe, labels, seed=0).batch(0)
    batch = Batch(raw.image.to(device), raw.labels.to(device))
    learner = Learner(configuration, recipe, labels, device, seed=0)
    made(learner)
    synchronize(device)

    def step() -> torch.Tensor:
        return learner.step(batch, learning_rate=RATE, rng=stream(0, "augmentation", 0))

    with training_on(configuration, recipe, device):
        return timed(steps, step, device, limit_s)


def timed(steps: int, step: Callable[[], torch.Tensor], device: torch.device, limit_s: float) -> dict[str, Any]:
    """Return seconds of steps, how many there were, and the peak memory."""
    if device.type == "cuda":
        return _timed_on_gpu(steps, step, device, limit_s)
    step()
    seconds: list[float] = []
    while len(seconds) < steps and sum(seconds) < limit_s:
        started = perf_counter()
        step().tolist()
        seconds.append(perf_counter() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "steps": len(seconds), "memory_gb": memory}


def _timed_on_gpu(steps: int, step: Callable[[], torch.Tensor], device: torch.device, limit_s: float) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats(device)
    pending: deque[torch.cuda.Event] = deque()

    def run(number: int) -> int:
        began, done = perf_counter(), 0
        while done < number and perf_counter() - began < limit_s:
            step()
            pending.append(torch.cuda.current_stream(device).record_event())
            done += 1
            if len(pending) > AHEAD:
                pending.popleft().synchronize()
        synchronize(device)
        return done

    run(SETTLING)
    started = perf_counter()
    done = run(steps)
    passed = perf_counter() - started
    memory = torch.cuda.max_memory_reserved(device) / 2**30
    return {"seconds": [passed / done], "steps": done, "memory_gb": memory}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
