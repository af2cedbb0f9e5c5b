"""From a plan and a clock to what is trained: candidates are measured on this machine, the written rules choose.

`segfit.planning.budget` holds the rules; here they meet the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from math import ceil, inf, prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from segfit.device import measure_hardware
from segfit.errors import InputError, MemoryShortageError
from segfit.execution.memory import process_bytes
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.inference.tiles import mirror_subsets, tile_starts
from segfit.labels import LabelScheme
from segfit.options import Options
from segfit.planning.augmentation import augmentation_for
from segfit.planning.budget import (
    ENOUGH_STEPS,
    FEWEST_STEPS,
    MANY_STEPS,
    NARROW,
    TOLERABLE_STEPS,
    WANTED_STEPS,
    WIDE_STEPS,
    candidates,
    coarser,
    reductions,
    short_recipe,
    shrunk,
)
from segfit.preprocessing.coarsening import kept_dice, mean_kept_dice
from segfit.progress import Progress
from segfit.project.acceleration import fastest_acceleration
from segfit.project.candidate import SLACK, Candidate, ValidationCost, Workload, configuration_words
from segfit.project.forecast import CASE_SECONDS_PER_MEGAVOXEL
from segfit.specs import Acceleration, AugmentationSpec, Configuration, TrainingSpec
from segfit.text import duration, listing
from segfit.training.probe import StepCost, best_threads, memory_limited, probe_forward, probe_step
from segfit.training.threads import kept_threads

__all__ = ["Sizer"]

_SPARE = 1.25  # on top of the smallest budget that a refusal names
_FREE_SHARE = 0.9  # of the free memory may be taken
_VALIDATION_SHARE = 0.1  # of all time may go into predicting validation cases, in `auto`
_COARSE_ENOUGH = ((WANTED_STEPS, 0.95), (MANY_STEPS, 0.99))
"""So many steps are worth a coarser spacing that leaves so much Dice of the labels (docs/decisions/time-budget.md)."""
_COARSENINGS = (2, 4, 8, 16, 32, 64, 128)  # times larger voxels
_COST_BY_WIDTH = {8: 0.7, 16: 1.0, 24: 1.5, 32: 2.2}  # of a step, in that of 16 features; a first guess only
_NEARLY = 0.8  # of the steps that are wanted are enough for what was measured: clocks differ by as much
_MOST_GROWTHS = 3  # of a patch that was guessed far too small
_PROBED_VOXELS = 2**15  # of the patch are enough to compare precisions and memory layouts


class Sizer:
    """Measures candidates on this machine."""

    def __init__(
        self,
        fingerprint: Fingerprint,
        labels: LabelScheme,
        options: Options,
        device: torch.device,
        workload: Workload,
        progress: Progress,
        *,
        budget: float,
        shares: int,
        processes: int = 1,
    ) -> None:
        """`budget` is all the time there is in seconds, divided among `shares` trainings that were asked for.

        Where each of several `processes` has a GPU of its own, the steps that are measured are of one's samples.
        """
        self._fingerprint = fingerprint
        self._labels = labels
        self._options = options
        self._device = device
        self._workload = workload
        self._progress = progress
        self._budget, self._shares = budget, shares
        self._devices = processes if device.type == "cuda" else 1  # on a CPU they share the cores
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
        views = len(mirror_subsets(recipe.augmentation.mirror_axes if self.mirrors else ()))
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

    @property
    def mirrors(self) -> bool:
        """Whether predictions are mirrored."""
        return self._options.inference.mirror is not False

    def arithmetic(self, configuration: Configuration, recipe: TrainingSpec) -> TrainingSpec:
        """Return the recipe with the fastest arithmetic and memory layout, measured; what the user set stays.

        The gain hardly depends on the size of patch and network, so small ones do, once for 2D and once for 3D.
        """
        found = {name: values[0] for name, values in self._choices().items()}
        if any(len(values) > 1 for values in self._choices().values()):
            fastest, _ = self._cheapest(configuration, recipe)
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

    def _cheapest(self, configuration: Configuration, recipe: TrainingSpec) -> tuple[TrainingSpec, float]:
        """Return a recipe with the fastest arithmetic, and seconds per voxel of a step of a narrow network.

        The first time, the number of threads is found that is fastest beside what else runs.
        """
        if configuration.ndim in self._arithmetic:
            return self._arithmetic[configuration.ndim]
        ladder = candidates(configuration, self._options)
        small = next((item for item in ladder if item.network.features[0] >= NARROW), ladder[0])
        voxels = small.batch_size * prod(small.patch_size)
        small = shrunk(small, _PROBED_VOXELS * small.batch_size / voxels) or _smallest(small)

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

    def best(self, planned: Configuration, recipe: TrainingSpec, seconds: float) -> Candidate:
        """Return the largest version of a configuration that still gets enough steps in `seconds`.

        What a step costs is guessed from a small one first, so that nothing is run that is far too slow.
        """
        options = self._options
        if options.preset != "auto":
            return self.planned(planned, recipe)
        ladder = candidates(planned, options)
        recipe = self.arithmetic(planned, short_recipe(recipe, options))
        _, per_voxel = self._cheapest(planned, recipe)
        free = options.planning.of(planned.name).patch_size is None

        def guess(item: Configuration) -> float:
            """Return the steps that are probably possible."""
            width = item.network.features[0]
            near = min(_COST_BY_WIDTH, key=lambda known: abs(known - width))
            cost = per_voxel * _COST_BY_WIDTH[near] * item.batch_size * prod(item.patch_size)
            return seconds / (cost * SLACK)

        wanted = [WANTED_STEPS]
        for smaller, larger in pairwise(ladder):
            wider = larger.network.features[0] > smaller.network.features[0]
            wanted.append(WIDE_STEPS if wider else MANY_STEPS)
        lowest = next((rung for rung, item in enumerate(ladder) if item.network.features[0] >= NARROW), len(ladder) - 1)
        rungs = range(lowest, len(ladder))
        begin = next((rung for rung in reversed(rungs) if guess(ladder[rung]) >= wanted[rung]), lowest)
        start = ladder[begin]
        if free and guess(start) < TOLERABLE_STEPS:
            start = shrunk(start, guess(start) / TOLERABLE_STEPS) or _smallest(start)
        best = self.grown(self.fitting(start, recipe), ladder[begin], seconds)
        if best.configuration.patch_size != planned.patch_size or self.steps(best, seconds) < TOLERABLE_STEPS:
            return self._reduced(best, ladder[0], seconds, shrink=free)
        if begin > lowest and self.steps(best, seconds) < _NEARLY * wanted[begin]:  # more was guessed
            return self._lowered(best, ladder[lowest:begin], wanted[lowest:begin], seconds)
        for rung in range(begin + 1, len(ladder)):
            if self.steps(best, seconds) < wanted[rung] * 1.2:
                break
            limit = self.available_gb()
            try:
                tried = self.measure(ladder[rung], recipe)
            except MemoryShortageError:
                return best.model_copy(update={"memory_gb": limit})
            if self.steps(tried, seconds) < wanted[rung]:
                break
            best = tried
        return best

    def _lowered(
        self, best: Candidate, cheaper: Sequence[Configuration], wanted: Sequence[int], seconds: float
    ) -> Candidate:
        """Return the costliest of the `cheaper` versions that gets the steps `wanted` of it, else the cheapest."""
        for configuration, least in zip(reversed(cheaper), reversed(wanted), strict=True):
            best = self.measure(configuration, best.recipe).model_copy(update={"memory_gb": best.memory_gb})
            if self.steps(best, seconds) >= _NEARLY * least:
                break
        return best

    def grown(self, best: Candidate, whole: Configuration, seconds: float) -> Candidate:
        """Return a version with a larger patch, at most that of `whole`, where the guess was far too low."""
        for _ in range(_MOST_GROWTHS):
            patch, steps = best.configuration.patch_size, self.steps(best, seconds)
            if best.memory_gb is not None or patch == whole.patch_size or steps < 2 * TOLERABLE_STEPS:
                break
            share = prod(patch) / prod(whole.patch_size) * steps / (1.3 * TOLERABLE_STEPS)
            larger = whole if share >= 1 else shrunk(whole, share)
            if larger is None or prod(larger.patch_size) <= prod(patch):
                break
            try:
                tried = self.measure(larger, best.recipe)
            except MemoryShortageError:
                break
            if self.steps(tried, seconds) < TOLERABLE_STEPS:
                break
            best = tried
        return best

    def _reduced(self, best: Candidate, narrowest: Configuration, seconds: float, *, shrink: bool) -> Candidate:
        """Return a version with enough steps if there is one: a smaller patch, then a narrower network."""
        while (steps := self.steps(best, seconds)) < _NEARLY * TOLERABLE_STEPS:
            configuration = best.configuration
            smaller = shrunk(configuration, max(0.3, min(0.9, steps / TOLERABLE_STEPS))) if shrink else None
            network = configuration.network  # which lost stages with the patch
            narrow = network.model_copy(update={"features": narrowest.network.features[: network.num_stages]})
            if smaller is None and network != narrow:
                smaller = configuration.model_copy(update={"network": narrow, "batch_size": narrowest.batch_size})
            if smaller is None:
                break
            tried = self.measure(smaller, best.recipe).model_copy(update={"memory_gb": best.memory_gb})
            if self.steps(tried, seconds) <= steps:
                break  # smaller patches mean more tiles to predict
            best = tried
        return best

    def coarser(
        self, configuration: Configuration, recipe: TrainingSpec, seconds: float, labels: Sequence[NDArray[np.int16]]
    ) -> tuple[float, ...]:
        """Return a spacing at which a patch with enough steps sees the whole image; () if none is sensible.

        Parameters
        ----------
        labels : of some cases at the spacing of the configuration, to see how much of them a coarser grid keeps
        """
        _, per_voxel = self._cheapest(configuration, recipe)
        voxels = prod(configuration.median_shape) * min(2, configuration.batch_size)

        @cache
        def kept(times: int) -> float:
            target = coarser(configuration.spacing_mm, times)
            return mean_kept_dice(kept_dice(array, _grid(array, configuration, target)) for array in labels)

        chosen = 1
        for steps, least in _COARSE_ENOUGH:
            affordable = seconds / (steps * SLACK * per_voxel)
            for times in _COARSENINGS:
                if kept(times) < least:
                    break
                chosen = max(chosen, times)
                if voxels / times <= affordable:
                    break
        return coarser(configuration.spacing_mm, chosen) if chosen > 1 else ()

    def enough(self, candidate: Candidate, seconds: float) -> bool:
        """Whether as much training is possible as the rules plan; then nothing needs to be tried."""
        return self.steps(candidate, seconds) >= ENOUGH_STEPS

    def sees(self, candidate: Candidate) -> float:
        """Return the share of the median image that the patch sees, at most 1."""
        configuration = candidate.configuration
        return prod(min(1.0, p / n) for p, n in zip(configuration.patch_size, configuration.median_shape, strict=True))

    def leaves_enough(self, found: Sequence[Candidate], seconds: float, took: float) -> bool:
        """Return whether one more candidate can be measured, which takes about as long as the first `took`.

        It must leave what was found the fewest steps; where nothing has them even now, another one may be faster.
        """
        left = (seconds, seconds - took)
        now, then = (any(self.steps(one, s / self._shares) >= FEWEST_STEPS for one in found) for s in left)
        return seconds > 0 and (then or not now)

    def require(self, candidate: Candidate, seconds: float) -> None:
        """Raise `InputError` where fewer than `FEWEST_STEPS` steps would be left, naming a budget that works."""
        if self.steps(candidate, seconds) >= FEWEST_STEPS:
            return
        missing = FEWEST_STEPS * candidate.step.seconds_per_step * SLACK + self._predicting(candidate) - seconds
        smallest = _SPARE * (self._budget + missing * self._shares)
        raise InputError(
            f"{duration(self._budget)} are too short for {candidate.name}: fewer than {FEWEST_STEPS} training "
            f"steps would be left",
            f"the smallest budget that works here is --time {ceil(smallest / 60)}m",
        )

    def validation(self, candidate: Candidate) -> ValidationCost:
        """Return how one fold is validated, in at most its share of the time."""
        limit = _VALIDATION_SHARE * self._budget / self._shares if self._options.preset == "auto" else inf
        return candidate.validation(self._workload, limit)

    def _predicting(self, candidate: Candidate) -> float:
        return self.validation(candidate).seconds + candidate.testing(1, self._workload)

    def steps(self, candidate: Candidate, seconds: float) -> float:
        """Return the training steps that are possible in so many seconds, predictions included."""
        left = seconds - self._predicting(candidate)
        return max(0.0, left) / (candidate.step.seconds_per_step * SLACK)


def _grid(array: NDArray[Any], configuration: Configuration, spacing_mm: Sequence[float]) -> list[int]:
    """Return the shape of an array at another spacing; a 2D network leaves the slices of a volume as they are."""
    slices, sizes = array.shape[: -configuration.ndim], array.shape[-configuration.ndim :]
    factors = [old / new for old, new in zip(configuration.spacing_mm, spacing_mm, strict=True)]
    return [*slices, *(max(1, round(n * factor)) for n, factor in zip(sizes, factors, strict=True))]


def _smallest(configuration: Configuration) -> Configuration:
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
