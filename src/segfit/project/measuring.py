"""What a step and a tile of a configuration cost on this machine, in time and in memory."""

from __future__ import annotations

from dataclasses import replace
from math import inf, prod
from typing import Any

import torch

from segfit.device import measure_hardware
from segfit.errors import InputError, MemoryShortageError
from segfit.execution.memory import process_bytes
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.inference.tiles import mirror_subsets, tile_starts
from segfit.labels import LabelScheme
from segfit.options import Options
from segfit.planning.augmentation import augmentation_for
from segfit.planning.budget import NARROW, candidates, reductions, shrunk
from segfit.progress import Progress
from segfit.project.acceleration import fastest_acceleration
from segfit.project.candidate import Candidate, configuration_words
from segfit.project.forecast import CASE_SECONDS_PER_MEGAVOXEL
from segfit.specs import Acceleration, AugmentationSpec, Configuration, TrainingSpec
from segfit.text import duration, listing
from segfit.training.probe import StepCost, best_threads, memory_limited, probe_forward, probe_step
from segfit.training.threads import kept_threads

__all__ = ["Measurer", "smallest"]

_FREE_SHARE = 0.9  # of the free memory may be taken
_PROBED_VOXELS = 2**15  # of the patch are enough to compare precisions and memory layouts


class Measurer:
    """Measures configurations, as large as they fit into memory, with the arithmetic and threads that are fastest."""

    def __init__(
        self,
        fingerprint: Fingerprint,
        labels: LabelScheme,
        options: Options,
        device: torch.device,
        progress: Progress,
        processes: int = 1,
    ) -> None:
        """Where each of several `processes` has a GPU of its own, the steps that are measured are of one's samples."""
        self._fingerprint = fingerprint
        self._devices = processes if device.type == "cuda" else 1  # on a CPU they share the cores
        self._labels = labels
        self._options = options
        self._device = device
        self._progress = progress
        self._arithmetic: dict[int, tuple[TrainingSpec, float]] = {}  # by axes: a recipe, seconds per voxel
        self._threads: int | None = None  # that are fastest beside what else runs; None: not yet known
        self.peak_gb = 0.0  # of everything that was measured

    def available_gb(self) -> float:
        """Return the memory that this process may hold: nine tenths of what is free, and no more than was asked for.

        The memory target of a named preset belongs to its rules and limits nothing here.
        """
        hardware = measure_hardware(str(self._device))
        mine = torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else process_bytes()
        free = mine / 2**30 + _FREE_SHARE * hardware.free_memory_gb
        asked = self._options.memory_gb if self._options.preset == "auto" else None
        return free if asked is None else min(free, asked)

    def measure(self, configuration: Configuration, recipe: TrainingSpec) -> Candidate:
        """Run a few steps and tiles; raise `MemoryShortageError` where they take more memory than there is."""
        recipe = self._adapted(recipe, configuration)
        with (
            self._progress.task(f"measuring {self._words(configuration)}", 2) as task,
            memory_limited(self._device, self.available_gb()),
            kept_threads(self._threads),
        ):
            samples = -(-configuration.batch_size // self._devices)
            own = configuration.model_copy(update={"batch_size": samples})
            step = probe_step(own, recipe, self._labels, self._device)
            task.advance(1, "steps of training")
            tile = probe_forward(configuration, recipe, self._labels, self._device)
            task.advance(1, "tiles of prediction")
        self.peak_gb = max(self.peak_gb, step.peak_memory_gb)
        tiles = _tiles(configuration, self._fingerprint, self._options.inference.tile_step)
        voxels = prod(_typical_shape(self._fingerprint)) / 1e6
        export = voxels * CASE_SECONDS_PER_MEGAVOXEL * configuration.network.num_outputs / 2
        mirrors = self._options.inference.mirror is not False
        views = len(mirror_subsets(recipe.augmentation.mirror_axes if mirrors else ()))
        found = Candidate(
            configuration=configuration,
            recipe=recipe,
            step=step,
            tile=tile,
            case_seconds=tiles * tile.seconds + export / views,
            views=views,
            unit=self._fingerprint.unit,
        )
        self._progress.note(f"{found.words}: {duration(step.seconds_per_step)} per step, {step.peak_memory_gb:.2f} GB")
        return found

    def _words(self, configuration: Configuration) -> str:
        return configuration_words(configuration, self._fingerprint.unit)

    def accelerated(self, candidate: Candidate, seconds: float) -> Candidate:
        """Return a candidate whose steps are run on a GPU in the way that gives most of them in so many seconds."""

        def cost(how: Acceleration) -> StepCost:
            try:
                with memory_limited(self._device, self.available_gb()), kept_threads(self._threads):
                    found = probe_step(
                        candidate.configuration,
                        candidate.recipe,
                        self._labels,
                        self._device,
                        acceleration=how,
                        tell=lambda item: self._progress.note(item.problem),
                    )
            except MemoryShortageError:
                return StepCost(inf, 0.0)
            self.peak_gb = max(self.peak_gb, found.peak_memory_gb)
            return found

        with self._progress.task(f"looking for faster ways to run steps of {candidate.words}", 1) as task:
            best, factor = fastest_acceleration(cost, self._options.training, seconds)
            task.advance()
        if best != Acceleration():
            ways = listing([name for name, taken in best if taken])
            self._progress.note(f"{candidate.words}: steps are run as {ways}, a step takes {factor:.2f} of a plain one")
        step = replace(candidate.step, seconds_per_step=factor * candidate.step.seconds_per_step)
        return candidate.model_copy(update={"acceleration": best, "step": step})

    def fitting(self, configuration: Configuration, recipe: TrainingSpec) -> Candidate:
        """Measure a configuration, or the largest reduction of it that fits into memory, found by bisection.

        Raises `InputError` if none does.
        """
        limit = self.available_gb()  # asked for before: what fails holds memory as long as it is dealt with
        try:
            return self.measure(configuration, recipe)
        except MemoryShortageError:
            self._progress.note(f"{self._words(configuration)}: does not fit into {limit:.1f} GB")
        smaller = reductions(configuration, self._options)
        best: Candidate | None = None
        low, high = 0, len(smaller)  # the first that fits is among them
        while low < high:
            middle = (low + high) // 2
            item = smaller[middle]
            try:
                tried = self.measure(item, recipe)
            except MemoryShortageError:
                self._progress.note(f"{self._words(item)}: does not fit into {limit:.1f} GB")
                low = middle + 1
            else:
                best, high = tried, middle
        if best is None:
            least = self._words(smaller[-1] if smaller else configuration)
            raise InputError(
                f"not even {least} fits into {limit:.1f} GB of memory",
                "free memory, raise --memory, or leave "
                "planning.patch_size, planning.batch_size and planning.base_features to the planner",
            )
        return best.model_copy(update={"memory_gb": limit})

    def _adapted(self, recipe: TrainingSpec, configuration: Configuration) -> TrainingSpec:
        """Return the recipe for another patch."""
        augmentation = _augmentation(recipe, configuration, self._options)
        return recipe.model_copy(update={"augmentation": augmentation})

    def arithmetic(self, configuration: Configuration, recipe: TrainingSpec) -> TrainingSpec:
        """Return the recipe with the fastest arithmetic and memory layout, measured; what the user set stays.

        The gain hardly depends on the size of patch and network, so small ones do, once for 2D and once for 3D.
        """
        found = {name: values[0] for name, values in self._choices().items()}
        if any(len(values) > 1 for values in self._choices().values()):
            fastest, _ = self.cheapest(configuration, recipe)
            found = {name: getattr(fastest, name) for name in found}
        return recipe.model_copy(update=found)

    def _choices(self) -> dict[str, list[Any]]:
        """Return the arithmetics and memory layouts that come into question, by the name of the value."""
        fast, asked = measure_hardware(str(self._device)).fast_bf16, self._options.training
        half = ["bf16"] if fast else (["fp16"] if self._device.type == "cuda" else [])
        found = {
            "precision": [*half, "fp32"] if asked.precision is None else [asked.precision],
            "channels_last": [bool(half), not half] if asked.channels_last is None else [asked.channels_last],
        }
        # What is measured is not the same every time.
        return {name: values[:1] for name, values in found.items()} if asked.deterministic else found

    def cheapest(self, configuration: Configuration, recipe: TrainingSpec) -> tuple[TrainingSpec, float]:
        """Return a recipe with the fastest arithmetic, and seconds per voxel of a step of a narrow network.

        The first time, the number of threads is found that is fastest beside what else runs.
        """
        if configuration.ndim in self._arithmetic:
            return self._arithmetic[configuration.ndim]
        ladder = candidates(configuration, self._options)
        small = next((item for item in ladder if item.network.features[0] >= NARROW), ladder[0])
        voxels = small.batch_size * prod(small.patch_size)
        small = shrunk(small, _PROBED_VOXELS * small.batch_size / voxels) or smallest(small)

        if not self._arithmetic:
            self._threads = best_threads(small, self._adapted(recipe, small), self._labels, self._device)

        def seconds(item: TrainingSpec) -> float:
            try:
                with memory_limited(self._device, self.available_gb()), kept_threads(self._threads):
                    cost = probe_step(small, self._adapted(item, small), self._labels, self._device, steps=2)
            except MemoryShortageError:
                return inf  # the patch will be reduced further
            self.peak_gb = max(self.peak_gb, cost.peak_memory_gb)
            return cost.seconds_per_step

        best, least = recipe, inf
        for name, values in self._choices().items():  # one after the other: they hardly depend on each other
            tried = [best.model_copy(update={name: value}) for value in values]
            costs = [least if item == best and least < inf else seconds(item) for item in tried]
            least = min(costs)
            best = tried[costs.index(least)]
        result = best, least / (small.batch_size * prod(small.patch_size) * self._devices)
        self._arithmetic[configuration.ndim] = result
        return result

    def planned(self, configuration: Configuration, recipe: TrainingSpec) -> Candidate:
        """Return the planned configuration, reduced only where memory demands it."""
        return self.fitting(configuration, self.arithmetic(configuration, recipe))


def smallest(configuration: Configuration) -> Configuration:
    """Return the configuration with the smallest patch that `shrunk` gives."""
    while (smaller := shrunk(configuration, 0.9)) is not None:
        configuration = smaller
    return configuration


def _augmentation(recipe: TrainingSpec, configuration: Configuration, options: Options) -> AugmentationSpec:
    """Return the augmentation of another patch; what was switched off stays off, what was set stays."""
    before, asked = recipe.augmentation, options.augmentation
    after = augmentation_for(
        configuration.patch_size,
        before.mirror_axes,
        before.masked_channels,
        dummy_2d=asked.dummy_2d,
        degrees=asked.rotation_degrees,
    )
    geometry = {"rotation_degrees", "dummy_2d", "sample_patch"}
    if before.rotation_probability == before.scaling_probability == 0:
        return before.model_copy(update={"sample_patch": configuration.patch_size})
    return before.model_copy(update={name: getattr(after, name) for name in geometry})


def _typical_shape(fingerprint: Fingerprint) -> tuple[int, ...]:
    """Return the median size per axis of the cropped cases, in voxels as stored."""
    columns = zip(*(case.shape_after_crop for case in fingerprint.cases), strict=True)
    return tuple(sorted(column)[len(column) // 2] for column in columns)


def _tiles(configuration: Configuration, fingerprint: Fingerprint, tile_step: float) -> int:
    """Return the tiles of a typical case, slices counted where a 2D network sees volumes."""
    sizes = [max(round(n), p) for n, p in zip(configuration.median_shape, configuration.patch_size, strict=True)]
    starts = [len(tile_starts(n, p, tile_step)) for n, p in zip(sizes, configuration.patch_size, strict=True)]
    slices = 1
    if configuration.preprocessing.image_ndim > configuration.ndim:
        slices = _typical_shape(fingerprint)[configuration.preprocessing.transpose[0]]
    return prod(starts) * slices
