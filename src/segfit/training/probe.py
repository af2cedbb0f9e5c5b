"""What a training step and a tile of inference cost on this device, measured on random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from segfit.execution.memory import process_peak_bytes, reset_process_peak
from segfit.labels import LabelScheme
from segfit.planning.plan import Configuration, TrainingSpec
from segfit.training.learner import Learner, training_on
from segfit.training.sampler import stream

__all__ = ["PeakMemory", "StepCost", "probe_forward", "probe_step"]

_LONG_S = 10.0  # of probing: what takes longer is measured well enough by fewer repetitions


@dataclass(frozen=True, slots=True)
class StepCost:
    """The cost of one training step: augmentation, forward, backward, optimiser; not reading the data."""

    seconds_per_step: float
    peak_memory_gb: float  # of the device; on a CPU of the process


def probe_step(
    configuration: Configuration,
    recipe: TrainingSpec,
    labels: LabelScheme,
    device: torch.device,
    *,
    steps: int = 3,
    seed: int = 0,
) -> StepCost:
    """Run one step to warm up and `steps` more on random data; return their median time and the peak memory.

    Raises `StageError` when the configuration does not fit into the device's memory.
    """
    size = recipe.augmentation.sample_patch or configuration.patch_size
    generator = torch.Generator().manual_seed(seed)
    batch, channels = configuration.batch_size, configuration.network.in_channels
    image = torch.randn((batch, channels, *size), generator=generator)
    target = torch.randint(max(labels.all_values) + 1, (batch, 1, *size), generator=generator, dtype=torch.int16)
    with training_on(configuration, device):
        memory = PeakMemory(device)
        learner = Learner(configuration, recipe, labels, device, seed=seed)

        def step(index: int) -> None:
            learner.step(image, target, learning_rate=recipe.learning_rate, rng=stream(seed, "augmentation", index))

        seconds = _median_seconds(step, device, steps)
        return StepCost(seconds, memory.peak_gb())


def probe_forward(
    configuration: Configuration, recipe: TrainingSpec, labels: LabelScheme, device: torch.device, *, tiles: int = 3
) -> float:
    """Return the seconds that one tile takes through the network in prediction, the median of `tiles`.

    Raises `StageError` when the configuration does not fit into the device's memory.
    """
    with training_on(configuration, device):
        learner = Learner(configuration, recipe, labels, device, seed=0)
        tile = learner.to_device(torch.zeros((1, configuration.network.in_channels, *configuration.patch_size)))
        with learner.evaluating() as network, learner.precision():
            return _median_seconds(lambda _: network(tile), device, tiles)


class PeakMemory:
    """Peak memory since this was made: of the device, or of the process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            reset_process_peak()

    def peak_gb(self) -> float:
        """Return the peak in GiB."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device) / 2**30
        return process_peak_bytes() / 2**30


def _median_seconds(work: Callable[[int], object], device: torch.device, repeats: int) -> float:
    """Return the median time of `work(i)`; the first call warms up and does not count. Slow work is repeated less."""
    times: list[float] = []
    for index in range(repeats + 1):
        if index > 1 and sum(times) > _LONG_S:
            break
        started = perf_counter()
        work(index)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - started)
    return median(times[1:])
