"""What a training step and a tile of inference cost on this device, measured on random data."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from statistics import median
from time import perf_counter

import torch

from segfit.errors import MemoryShortageError, Problem
from segfit.execution.memory import PeakWatch, limit_growth, process_bytes
from segfit.execution.processors import available_workers
from segfit.inference.predictor import default_batch
from segfit.labels import LabelScheme
from segfit.specs import Acceleration, Configuration, TrainingSpec
from segfit.text import gigabytes
from segfit.training.batch import Batch
from segfit.training.learner import Learner, training_on
from segfit.training.sampler import stream
from segfit.training.threads import kept_threads

__all__ = [
    "PeakMemory",
    "StepCost",
    "TileCost",
    "best_threads",
    "fastest_threads",
    "memory_limited",
    "probe_forward",
    "probe_step",
]

_SAMPLED_S = 0.005  # between two looks at the memory
_LEAST_GROWTH = 64 << 20  # bytes without which the interpreter itself could not go on
_STACK = 8 << 20  # bytes that the system counts for a new thread, although hardly any are used
_THREADS_S = 1.2  # of comparing numbers of threads, after which no further round begins
_THREADS_ROUNDS = (3, 7)  # are begun even so, and at most; one odd time among three changes no median,
_THREADS_LIMIT_S = 4.0  # but after this none is
_THREADS_GAIN = 0.1  # of the time: below that the default stays
_LONG_S = 10.0  # of probing: what takes longer is measured well enough by fewer repetitions


@dataclass(frozen=True, slots=True)
class StepCost:
    """The cost of one training step: augmentation, forward, backward, optimiser; not reading the data."""

    seconds_per_step: float
    peak_memory_gb: float  # of the device; on a CPU of the process
    state_gb: float = 0.0  # weights and optimiser, as they are saved
    setup_s: float = 0.0  # until steps are run as they were asked to be


@dataclass(frozen=True, slots=True)
class TileCost:
    """The cost of one tile of prediction, a batch of them at a time as the predictor takes them."""

    seconds: float
    peak_memory_gb: float  # of the device; on a CPU of the process


def probe_step(
    configuration: Configuration,
    recipe: TrainingSpec,
    labels: LabelScheme,
    device: torch.device,
    *,
    steps: int = 3,
    acceleration: Acceleration | None = None,
    tell: Callable[[Problem], None] = lambda _: None,
) -> StepCost:
    """Run one step to warm up and `steps` more on random data; return their median time and the peak memory.

    A step takes forever where the device cannot run it in the way of `acceleration`, and `tell` is told why.

    Raises `MemoryShortageError` when the configuration does not fit into the device's memory.
    """
    with training_on(configuration, recipe, device), PeakMemory(device, _SAMPLED_S) as memory:
        learner, step = _learning(configuration, recipe, labels, device)
        started = perf_counter()
        possible = learner.gradients.accelerate(acceleration, tell)
        setup = perf_counter() - started
        seconds = _median_seconds(step, device, steps) if possible else inf
        learner.gradients.accelerate(None)
        state = sum(tensor.nbytes for tensor in learner.tensors().values()) / 2**30
        return StepCost(seconds, memory.peak_gb(), state, setup)


def best_threads(configuration: Configuration, recipe: TrainingSpec, labels: LabelScheme, device: torch.device) -> int:
    """Return the number of threads with which a training step is fastest on this machine as busy as it is now.

    It is meant for `torch.set_num_threads`, which is left as it was. The default is torch's own number within the
    processors of this process. On a CPU it is compared with one less and with half; see `fastest_threads`. This takes
    about two seconds if a step takes a fifth of one, so a small patch should be given.

    Raises `MemoryShortageError` when the configuration does not fit into memory.
    """
    default = min(torch.get_num_threads(), available_workers())
    if device.type != "cpu" or default == 1:
        return default
    with training_on(configuration, recipe, device):
        _, step = _learning(configuration, recipe, labels, device)
        return fastest_threads(step, (default, default - 1, default // 2))


def fastest_threads(work: Callable[[int], object], numbers: Sequence[int]) -> int:
    """Return which number of threads does `work(i)` fastest; the first one unless another takes a tenth less time.

    Medians of three rounds or more over all numbers, so that what disturbs one disturbs all, after one that warms up;
    where a round takes seconds there are fewer.
    """
    times: dict[int, list[float]] = {number: [] for number in numbers}
    least, most = _THREADS_ROUNDS
    began = perf_counter()
    with kept_threads():
        for index in range(1 + most):
            if index and perf_counter() - began > (_THREADS_S if index > least else _THREADS_LIMIT_S):
                break
            for number, taken in times.items():
                torch.set_num_threads(number)
                started = perf_counter()
                work(index)
                taken.append(perf_counter() - started)
    seconds = {number: median(taken[1:] or taken) for number, taken in times.items()}
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] <= (1 - _THREADS_GAIN) * seconds[numbers[0]] else numbers[0]


def probe_forward(
    configuration: Configuration, recipe: TrainingSpec, labels: LabelScheme, device: torch.device
) -> TileCost:
    """Return what one tile costs in prediction, its time the median of three.

    Raises `MemoryShortageError` when the configuration does not fit into the device's memory.
    """
    with training_on(configuration, recipe, device), PeakMemory(device, _SAMPLED_S) as memory:
        learner = Learner(configuration, recipe, labels, device, seed=0)
        batch = default_batch(configuration, device)
        tile = learner.gradients.to_device(
            torch.zeros((batch, configuration.network.in_channels, *configuration.patch_size))
        )
        with learner.evaluating() as network, learner.gradients.precision():
            seconds = _median_seconds(lambda _: network(tile), device, 3)
        return TileCost(seconds / batch, memory.peak_gb())


@contextmanager
def memory_limited(device: torch.device, gb: float) -> Iterator[None]:
    """Let what is done here on a device fail with `MemoryShortageError` where it would take more than `gb` GiB.

    `gb` is all that this process takes: of the RAM on a CPU (Linux only), of the device's memory on CUDA.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        gc.collect()  # with the first optimiser of a process torch leaves a cycle that holds the network
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, gb * 2**30 / total), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    elif device.type == "cpu":
        growth = gb * 2**30 - process_bytes()
        if growth < _LEAST_GROWTH:
            raise MemoryShortageError(
                f"this process holds {gigabytes(process_bytes() / 2**30)} already, of {gigabytes(gb)}"
            )
        with limit_growth(growth + available_workers() * _STACK):
            yield
    else:
        yield


class PeakMemory:
    """Peak memory between ``with`` and its end: of the device, or of the process on a CPU."""

    def __init__(self, device: torch.device, interval_s: float = 0.1) -> None:
        self._device = device
        self._watch = None if device.type == "cuda" else PeakWatch(interval_s)

    def __enter__(self) -> PeakMemory:
        if self._watch is None:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._watch.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._watch is not None:
            self._watch.__exit__()

    def peak_gb(self) -> float:
        """Return the peak so far in GiB."""
        taken = torch.cuda.max_memory_reserved(self._device) if self._watch is None else self._watch.peak_bytes()
        return taken / 2**30


def _learning(
    configuration: Configuration, recipe: TrainingSpec, labels: LabelScheme, device: torch.device
) -> tuple[Learner, Callable[[int], object]]:
    """Return a learner and what does its step i, on one batch of random data."""
    size = recipe.augmentation.sample_patch or configuration.patch_size
    generator = torch.Generator().manual_seed(0)
    number, channels = configuration.batch_size, configuration.image_channels
    maps = 1 if configuration.previous_stage is None else 2
    image = torch.randn((number, channels, *size), generator=generator)
    target = torch.randint(max(labels.all_values) + 1, (number, maps, *size), generator=generator, dtype=torch.int16)
    batch = Batch(image, target)
    learner = Learner(configuration, recipe, labels, device, seed=0)

    def step(index: int) -> None:
        learner.step(batch, learning_rate=recipe.learning_rate, rng=stream(0, "augmentation", index))

    return learner, step


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
