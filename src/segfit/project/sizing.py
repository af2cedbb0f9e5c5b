"""From a plan and a clock to what is trained: candidates are measured on this machine, the written rules choose.

`segfit.planning.budget` holds the rules; here they meet the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, prod
from time import perf_counter

import torch

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
    LONG_STEPS,
    TOLERABLE_STEPS,
    WANTED_STEPS,
    candidates,
    choose_configurations,
    choose_trainings,
    reductions,
    short_recipe,
    shrunk,
    with_run,
)
from segfit.planning.plan import AugmentationSpec, Configuration, Plan, RunSpec, StageForecast, TrainingSpec
from segfit.planning.reasons import by_axis
from segfit.progress import SILENT, Progress
from segfit.project.forecast import (
    CASE_SECONDS,
    CASE_SECONDS_PER_MEGAVOXEL,
    PreprocessingCost,
    TrainingCost,
    Workload,
    forecast_preprocessing,
    forecast_stages,
    report_seconds,
)
from segfit.training.probe import StepCost, TileCost, memory_limited, probe_forward, probe_step
from segfit.words import duration

__all__ = ["DEFAULT_SECONDS", "size_run"]

DEFAULT_SECONDS = {"cpu": 2 * 3600.0, "mps": 8 * 3600.0, "cuda": 24 * 3600.0}
"""Time budget of a run when the user names none, by kind of device."""

_SLACK = 1.15  # measured steps are alone on the machine and without reading data
_AROUND_SECONDS = 3.0  # starting, selecting and leaving
_FREE_SHARE = 0.9  # of the free memory may be taken
_ARITHMETIC_SHARE = 0.3  # of the patch is enough to compare precisions and memory layouts
_SHRINKING = 0.6  # a patch that is too slow is reduced to this share of its voxels at most, then measured again


@dataclass(frozen=True, slots=True)
class _Measured:
    """A candidate and what it costs here."""

    configuration: Configuration
    recipe: TrainingSpec
    step: StepCost
    tile: TileCost
    case_seconds: float  # predicting one case with one network
    memory_gb: float | None = None  # what it was reduced to; None: the planned one fits

    @property
    def name(self) -> str:
        """Name of the configuration."""
        return self.configuration.name

    def training(self, seconds: float, steps: int) -> TrainingCost:
        """Return the cost of training it for so many seconds, over all folds, with so many steps each."""
        return TrainingCost(
            configuration=self.configuration,
            seconds=seconds,
            case_seconds=self.case_seconds,
            steps=steps,
            step_memory_gb=self.step.peak_memory_gb,
            tile_memory_gb=self.tile.peak_memory_gb,
            state_gb=self.step.state_gb,
        )

    def seconds(self, networks: int, workload: Workload) -> float:
        """Return the time of all predictions for `networks` trainings."""
        cases = networks * workload.validation_cases + networks * workload.test_cases
        return cases * self.case_seconds + (workload.test_cases + networks * workload.validation_cases) * CASE_SECONDS


class _Sizer:
    def __init__(
        self,
        plan: Plan,
        fingerprint: Fingerprint,
        labels: LabelScheme,
        options: Options,
        device: torch.device,
        workload: Workload,
        progress: Progress,
        *,
        budget: float,
        shares: int,
    ) -> None:
        """`budget` is all the time there is in seconds, divided among `shares` trainings that were asked for."""
        self._plan = plan
        self._fingerprint = fingerprint
        self._labels = labels
        self._options = options
        self._device = device
        self._workload = workload
        self._progress = progress
        self._budget, self._shares = budget, shares
        self.peak_gb = 0.0  # of everything that was measured

    def available_gb(self) -> float:
        """Return the memory that this process may hold: nine tenths of what is free, and no more than was asked for.

        The memory target of a named preset belongs to its rules and limits nothing here.
        """
        hardware = measure_hardware(str(self._device))
        mine = process_bytes() / 2**30 if self._device.type == "cpu" else 0.0
        free = mine + _FREE_SHARE * hardware.free_memory_gb
        asked = self._options.memory_gb if self._options.preset == "auto" else None
        return free if asked is None else min(free, asked)

    def measure(self, configuration: Configuration, recipe: TrainingSpec) -> _Measured:
        """Run a few steps and tiles; raise `MemoryShortageError` where they take more memory than there is."""
        with memory_limited(self._device, self.available_gb()):
            step = probe_step(configuration, recipe, self._labels, self._device)
            tile = probe_forward(configuration, recipe, self._labels, self._device)
        self.peak_gb = max(self.peak_gb, step.peak_memory_gb)
        views = _tiles(configuration, self._fingerprint, self._options.inference.tile_step)
        views *= len(mirror_subsets(recipe.augmentation.mirror_axes if self.mirrors else ()))
        voxels = prod(_typical_shape(self._fingerprint)) / 1e6
        export = voxels * CASE_SECONDS_PER_MEGAVOXEL * configuration.network.num_outputs / 2
        self._progress.note(
            f"{_words(configuration)}: {duration(step.seconds_per_step)} per step, {step.peak_memory_gb:.2f} GB"
        )
        return _Measured(configuration, recipe, step, tile, views * tile.seconds + export)

    def fitting(self, configuration: Configuration, recipe: TrainingSpec) -> _Measured:
        """Measure a configuration, or the largest reduction of it that fits into memory, found by bisection.

        Raises `InputError` if none does.
        """
        try:
            return self.measure(configuration, recipe)
        except MemoryShortageError:
            limit = self.available_gb()
            self._progress.note(f"{_words(configuration)}: does not fit into {limit:.1f} GB")
        smaller = reductions(configuration, self._options)
        best: _Measured | None = None
        low, high = 0, len(smaller)  # the first that fits is among them
        while low < high:
            middle = (low + high) // 2
            item = smaller[middle]
            try:
                tried = self.measure(item, self._adapted(recipe, item))
            except MemoryShortageError:
                self._progress.note(f"{_words(item)}: does not fit into {limit:.1f} GB")
                low = middle + 1
            else:
                best, high = tried, middle
        if best is None:
            least = _words(smaller[-1] if smaller else configuration)
            raise InputError(
                f"not even {least} fits into {limit:.1f} GB of memory; free memory, raise --memory, or leave "
                "planning.patch_size, planning.batch_size and planning.base_features to the planner"
            )
        return replace(best, memory_gb=limit)

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

        The gain hardly depends on the size of the patch, so a small one does.
        """
        fast = measure_hardware(str(self._device)).fast_bf16
        half = ["bf16"] if fast else (["fp16"] if self._device.type == "cuda" else [])
        asked = self._options.training
        precisions = [*half, "fp32"] if asked.precision is None else [asked.precision]
        layouts = [True, False] if asked.channels_last is None else [asked.channels_last]
        tried = [
            recipe.model_copy(update={"precision": precision, "channels_last": channels_last})
            for precision in precisions
            for channels_last in layouts
        ]
        if len(tried) == 1:
            return tried[0]
        small = shrunk(configuration, _ARITHMETIC_SHARE) or configuration

        def seconds(item: TrainingSpec) -> float:
            item = self._adapted(item, small)
            try:
                with memory_limited(self._device, self.available_gb()):
                    cost = probe_step(small, item, self._labels, self._device)
            except MemoryShortageError:
                return inf  # the patch will be reduced further
            self.peak_gb = max(self.peak_gb, cost.peak_memory_gb)
            return cost.seconds_per_step

        return min(tried, key=seconds)

    def planned(self, name: str) -> _Measured:
        """Return the planned configuration, reduced only where memory demands it."""
        configuration = self._plan.configurations[name]
        return self.fitting(configuration, self.arithmetic(configuration, self._plan.training[name]))

    def widest(self, name: str, seconds: float) -> _Measured:
        """Return the largest candidate of a configuration that still gets enough steps in `seconds`."""
        planned = self._plan.configurations[name]
        options = self._options
        sized = options.preset == "auto"
        ladder = candidates(planned, options) if sized else (planned,)
        recipe = self.arithmetic(ladder[len(ladder) // 2], self._plan.training[name])
        free = sized and options.planning.of(name).patch_size is None
        best = self._cheapest(ladder[0], recipe, seconds, shrink=free)
        if best.configuration.patch_size != planned.patch_size:
            return best
        for candidate in ladder[1:]:
            if self._steps(best, seconds) < WANTED_STEPS * 1.1:
                break
            try:
                tried = self.measure(candidate, recipe)
            except MemoryShortageError:
                return replace(best, memory_gb=self.available_gb())
            if self._steps(tried, seconds) < WANTED_STEPS:
                break
            best = tried
        return best

    def _cheapest(
        self, configuration: Configuration, recipe: TrainingSpec, seconds: float, *, shrink: bool
    ) -> _Measured:
        """Return the first candidate, its patch reduced until there are enough steps; refuse a budget below that."""
        best = self.fitting(configuration, recipe)
        while shrink and (steps := self._steps(best, seconds)) < TOLERABLE_STEPS:
            smaller = shrunk(best.configuration, max(_SHRINKING, min(0.95, steps / TOLERABLE_STEPS)))
            if smaller is None:
                break
            tried = self.measure(smaller, self._adapted(recipe, smaller))
            tried = replace(tried, memory_gb=best.memory_gb)
            if self._steps(tried, seconds) <= steps:
                break  # smaller patches mean more tiles to predict
            best = tried
        if self._steps(best, seconds) < FEWEST_STEPS:
            needed = best.seconds(1, self._workload) + FEWEST_STEPS * best.step.seconds_per_step * _SLACK
            smallest = self._budget + (needed - seconds) * self._shares
            raise InputError(
                f"{duration(self._budget)} are too short for {configuration.name}: fewer than {FEWEST_STEPS} training "
                f"steps would be left; the smallest budget that works here is --time {ceil(smallest / 60 + 0.5)}m"
            )
        return best

    def _steps(self, measured: _Measured, seconds: float) -> float:
        left = seconds - measured.seconds(1, self._workload)
        return max(0.0, left) / (measured.step.seconds_per_step * _SLACK)


def size_run(
    plan: Plan,
    fingerprint: Fingerprint,
    labels: LabelScheme,
    options: Options,
    device: torch.device,
    workload: Workload,
    preprocessing: PreprocessingCost,
    *,
    budget: float,
    spent: float,
    progress: Progress = SILENT,
) -> Plan:
    """Return the plan with `run` decided.

    Parameters
    ----------
    preprocessing : what was measured of it
    budget, spent : seconds of the whole run, and how many of them have gone; `options.training.steps` decides instead
        if it is given

    Raises `InputError` if the budget is too small for anything or nothing fits into memory.
    """
    started = perf_counter()
    names = choose_configurations(list(plan.configurations), options)
    folds = _folds(options, workload.num_folds)
    every = options.planning.configurations is not None  # all that were asked for are trained
    shares = (1 if options.planning.folds is None else len(folds)) * (len(names) if every else 1)
    sizer = _Sizer(plan, fingerprint, labels, options, device, workload, progress, budget=budget, shares=shares)
    if options.training.steps is not None:
        chosen = [sizer.planned(name) for name in (names if every else names[:1])]
        seconds = {item.name: options.training.steps * item.step.seconds_per_step * _SLACK for item in chosen}
        steps = dict.fromkeys(seconds, options.training.steps)
        per_training = None
    else:
        ahead = forecast_preprocessing(preprocessing, fingerprint, [plan.configurations[names[0]].preprocessing])
        left = budget - spent - ahead.seconds - report_seconds(fingerprint) - _AROUND_SECONDS
        chosen, folds = _for_time(sizer, names, folds, left, shares, workload, options)
        predicting = sum(item.seconds(len(folds), workload) for item in chosen)
        left -= perf_counter() - started
        per_training = round((left - predicting) / (len(folds) * len(chosen)), 1)
        steps = {item.name: int(per_training / item.step.seconds_per_step / _SLACK) for item in chosen}
        seconds = dict.fromkeys(steps, per_training)
    costs = [item.training(seconds[item.name] * len(folds), steps[item.name]) for item in chosen]
    specs = [item.configuration.preprocessing for item in chosen]
    on_cpu = device.type == "cpu"
    run = RunSpec(
        configurations=tuple(item.name for item in chosen),
        folds=folds,
        steps=options.training.steps,
        seconds_per_training=per_training,
        expected_steps=steps,
        seconds_per_step={item.name: round(item.step.seconds_per_step, 4) for item in chosen},
        peak_memory_gb={item.name: round(item.step.peak_memory_gb, 3) for item in chosen},
        forecast={
            "size": StageForecast(
                seconds=round(preprocessing.seconds + perf_counter() - started, 1),
                **{"memory_gb" if on_cpu else "device_memory_gb": round(sizer.peak_gb, 3)},
            ),
            "preprocess": forecast_preprocessing(preprocessing, fingerprint, specs),
            **forecast_stages(costs, len(folds), workload, fingerprint, on_cpu=on_cpu),
        },
    )
    return _with_run(plan, chosen, run, options, labels.num_declared)


def _folds(options: Options, num_folds: int) -> tuple[int, ...]:
    """Return the folds that were asked for, or all."""
    folds = tuple(range(num_folds)) if options.planning.folds is None else options.planning.folds
    if not folds or not set(folds) <= set(range(num_folds)):
        raise InputError(f"planning.folds must be among 0 to {num_folds - 1} for this dataset, got {list(folds)}")
    return folds


def _for_time(
    sizer: _Sizer,
    names: Sequence[str],
    folds: tuple[int, ...],
    left: float,
    shares: int,
    workload: Workload,
    options: Options,
) -> tuple[list[_Measured], tuple[int, ...]]:
    """Return the configurations and folds that are trained in the seconds that are left."""
    every = options.planning.configurations is not None
    measured = [sizer.widest(names[0], left / shares)]
    enough = ENOUGH_STEPS * workload.num_folds * measured[0].step.seconds_per_step
    if every or left > enough:
        measured += [sizer.widest(name, left / shares if every else left) for name in names[1:]]
    count, fold_count = choose_trainings(
        left,
        [item.step.seconds_per_step * _SLACK for item in measured],
        workload.num_folds,
        folds=None if options.planning.folds is None else len(folds),
    )
    return measured[: len(names) if every else count], folds[:fold_count]


def _with_run(plan: Plan, chosen: Sequence[_Measured], run: RunSpec, options: Options, heads: int) -> Plan:
    """Return the plan with the run and what was sized for it."""
    sized = {}
    for item in chosen:
        recipe = item.recipe
        if options.preset == "auto" and run.expected_steps[item.name] < LONG_STEPS:
            recipe = short_recipe(recipe, options)
        sized[item.name] = (item.configuration, recipe)
    asked = {"time_s": options.time_s, "steps": options.training.steps, "folds": options.planning.folds}
    return with_run(
        plan,
        sized,
        run,
        asked={key: value for key, value in asked.items() if value is not None},
        memory_gb={item.name: item.memory_gb for item in chosen},
        heads=heads,
    )


def _words(configuration: Configuration) -> str:
    return (
        f"{configuration.name}: {configuration.network.features[0]} features, batch {configuration.batch_size}, "
        f"patch {by_axis(configuration.patch_size)}"
    )


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
