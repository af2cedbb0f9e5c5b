"""From a plan and a clock to what is trained: candidates are measured on this machine, the written rules choose.

`segfit.planning.budget` holds the rules; here they meet the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch

from segfit.device import measure_hardware
from segfit.errors import InputError
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
    short_recipe,
    shrunk,
    with_run,
)
from segfit.planning.plan import AugmentationSpec, Configuration, Plan, RunSpec, TrainingSpec
from segfit.progress import SILENT, Progress
from segfit.report.words import duration
from segfit.training.probe import StepCost, probe_forward, probe_step

__all__ = ["DEFAULT_SECONDS", "Workload", "size_run"]

DEFAULT_SECONDS = {"cpu": 2 * 3600.0, "mps": 8 * 3600.0, "cuda": 24 * 3600.0}
"""Time budget of a run when the user names none, by kind of device."""

_SLACK = 1.15  # measured steps are alone on the machine and without reading data
_CASE_SECONDS = 0.05  # export, writing and scoring of a small case, beside the networks
_CASE_SECONDS_PER_MEGAVOXEL = 0.25
_REPORT_SECONDS = 12.0
_ARITHMETIC_SHARE = 0.3  # of the patch is enough to compare precisions and memory layouts
_SHRINKING = 0.6  # a patch that is too slow is reduced to this share of its voxels at most, then measured again


@dataclass(frozen=True, slots=True)
class Workload:
    """How much there is to predict around the trainings."""

    num_folds: int
    validation_cases: int  # of the largest fold
    test_cases: int


@dataclass(frozen=True, slots=True)
class _Measured:
    """A candidate and what it costs here."""

    configuration: Configuration
    recipe: TrainingSpec
    step: StepCost
    case_seconds: float  # predicting one case with one network

    def seconds(self, networks: int, workload: Workload) -> float:
        """Return the time of all predictions for `networks` trainings."""
        cases = networks * workload.validation_cases + networks * workload.test_cases
        return cases * self.case_seconds + (workload.test_cases + networks * workload.validation_cases) * _CASE_SECONDS


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
    ) -> None:
        self._plan = plan
        self._fingerprint = fingerprint
        self._labels = labels
        self._options = options
        self._device = device
        self._workload = workload
        self._progress = progress

    def measure(self, configuration: Configuration, recipe: TrainingSpec) -> _Measured:
        """Run a few steps and tiles."""
        step = probe_step(configuration, recipe, self._labels, self._device)
        tile = probe_forward(configuration, recipe, self._labels, self._device)
        views = _tiles(configuration, self._fingerprint, self._options.inference.tile_step)
        views *= len(mirror_subsets(recipe.augmentation.mirror_axes if self.mirrors else ()))
        voxels = prod(_typical_shape(self._fingerprint)) / 1e6
        export = voxels * _CASE_SECONDS_PER_MEGAVOXEL * configuration.network.num_outputs / 2
        self._progress.note(
            f"{configuration.name}: {configuration.network.features[0]} features, batch {configuration.batch_size}, "
            f"patch {'x'.join(map(str, configuration.patch_size))}: {duration(step.seconds_per_step)} per step"
        )
        return _Measured(configuration, recipe, step, views * tile + export)

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
            augmentation = _augmentation(item, small)
            item = item.model_copy(update={"augmentation": augmentation})
            return probe_step(small, item, self._labels, self._device).seconds_per_step

        return min(tried, key=seconds)

    def widest(self, name: str, seconds: float) -> _Measured:
        """Return the largest candidate of a configuration that still gets enough steps in `seconds`."""
        planned = self._plan.configurations[name]
        options = self._options
        sized = options.preset == "auto"
        ladder = candidates(planned, options) if sized else (planned,)
        recipe = self.arithmetic(ladder[len(ladder) // 2], self._plan.training[name])
        best = self._cheapest(ladder[0], recipe, seconds, shrink=sized and options.planning.patch_size is None)
        if best.configuration.patch_size != planned.patch_size:
            return best
        for candidate in ladder[1:]:
            if self._steps(best, seconds) < WANTED_STEPS * 1.1:
                break
            tried = self.measure(candidate, recipe)
            if self._steps(tried, seconds) < WANTED_STEPS:
                break
            best = tried
        return best

    def _cheapest(
        self, configuration: Configuration, recipe: TrainingSpec, seconds: float, *, shrink: bool
    ) -> _Measured:
        """Return the first candidate, its patch reduced until there are enough steps; refuse a budget below that."""
        best = self.measure(configuration, recipe)
        while shrink and (steps := self._steps(best, seconds)) < TOLERABLE_STEPS:
            smaller = shrunk(best.configuration, max(_SHRINKING, min(0.95, steps / TOLERABLE_STEPS)))
            if smaller is None:
                break
            tried = self.measure(smaller, recipe.model_copy(update={"augmentation": _augmentation(recipe, smaller)}))
            if self._steps(tried, seconds) <= steps:
                break  # smaller patches mean more tiles to predict
            best = tried
        if self._steps(best, seconds) < FEWEST_STEPS:
            needed = best.seconds(1, self._workload) + FEWEST_STEPS * best.step.seconds_per_step * _SLACK
            short = needed - seconds
            raise InputError(
                f"the time budget is too short for {configuration.name}: after {duration(max(0, seconds))} of training "
                f"and prediction there would be fewer than {FEWEST_STEPS} steps; give at least "
                f"{duration(60 * ceil(short / 60 + 0.5))} more with --time"
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
    *,
    seconds: float | None,
    forecast_s: dict[str, float],
    progress: Progress = SILENT,
) -> Plan:
    """Return the plan with `run` decided.

    Parameters
    ----------
    seconds : what is left of the time budget for everything from here on; None: `options.training.steps` decides
    forecast_s : seconds of the stages before training that are still to come, by stage

    Raises `InputError` if the budget is too small for anything, `StageError` if nothing fits into memory.
    """
    names = choose_configurations(list(plan.configurations), options)
    sizer = _Sizer(plan, fingerprint, labels, options, device, workload, progress)
    asked_folds = options.planning.folds
    folds = tuple(asked_folds) if asked_folds is not None else tuple(range(workload.num_folds))
    unknown = [fold for fold in folds if not 0 <= fold < workload.num_folds]
    if unknown or not folds:
        raise InputError(
            f"planning.folds must be among 0 to {workload.num_folds - 1} for this dataset, got {list(folds)}"
        )
    if seconds is None:
        return _by_steps(plan, sizer, names, folds, options, workload, forecast_s)
    left = seconds - sum(forecast_s.values()) - _REPORT_SECONDS
    share = left / (len(folds) if asked_folds is not None else 1)
    if options.planning.configurations is not None:
        share /= len(names)
    measured = [sizer.widest(names[0], share)]
    enough = ENOUGH_STEPS * workload.num_folds * measured[0].step.seconds_per_step
    if len(names) > 1 and (options.planning.configurations is not None or left > enough):
        measured += [
            sizer.widest(name, left if options.planning.configurations is None else share) for name in names[1:]
        ]
    costs = [item.step.seconds_per_step * _SLACK for item in measured]
    count, fold_count = choose_trainings(
        left, costs, workload.num_folds, folds=None if asked_folds is None else len(folds)
    )
    if options.planning.configurations is not None:
        count = len(names)
    chosen, folds = measured[:count], folds[:fold_count]
    networks = len(folds)
    predicting = sum(item.seconds(networks, workload) for item in chosen)
    per_training = (left - predicting) / (networks * len(chosen))
    steps = {item.configuration.name: int(per_training / item.step.seconds_per_step / _SLACK) for item in chosen}
    return _decided(
        plan, chosen, folds, options, workload, forecast_s, steps=steps, seconds_per_training=round(per_training, 1)
    )


def _by_steps(
    plan: Plan,
    sizer: _Sizer,
    names: Sequence[str],
    folds: tuple[int, ...],
    options: Options,
    workload: Workload,
    forecast_s: dict[str, float],
) -> Plan:
    """Train the planned networks for a number of steps: the first configuration, or those asked for."""
    steps = options.training.steps
    assert steps is not None
    chosen = []
    for name in names if options.planning.configurations is not None else names[:1]:
        recipe = sizer.arithmetic(plan.configurations[name], plan.training[name])
        chosen.append(sizer.measure(plan.configurations[name], recipe))
    return _decided(
        plan,
        chosen,
        folds,
        options,
        workload,
        forecast_s,
        steps=dict.fromkeys((m.configuration.name for m in chosen), steps),
    )


def _decided(
    plan: Plan,
    chosen: Sequence[_Measured],
    folds: tuple[int, ...],
    options: Options,
    workload: Workload,
    forecast_s: dict[str, float],
    *,
    steps: dict[str, int],
    seconds_per_training: float | None = None,
) -> Plan:
    sized = {}
    for item in chosen:
        recipe = item.recipe
        if options.preset == "auto" and steps[item.configuration.name] < LONG_STEPS:
            recipe = short_recipe(recipe, options)
        sized[item.configuration.name] = (item.configuration, recipe)
    training = sum(
        seconds_per_training or steps[item.configuration.name] * item.step.seconds_per_step * _SLACK for item in chosen
    )
    validating = sum(workload.validation_cases * (item.case_seconds + _CASE_SECONDS) for item in chosen)
    testing = workload.test_cases * (_CASE_SECONDS + len(folds) * sum(item.case_seconds for item in chosen))
    run = RunSpec(
        configurations=tuple(item.configuration.name for item in chosen),
        folds=folds,
        steps=options.training.steps,
        seconds_per_training=seconds_per_training,
        expected_steps=steps,
        seconds_per_step={item.configuration.name: round(item.step.seconds_per_step, 4) for item in chosen},
        peak_memory_gb={item.configuration.name: round(item.step.peak_memory_gb, 3) for item in chosen},
        forecast_s={
            **forecast_s,
            "train": round(training * len(folds), 1),
            "validate": round(validating * len(folds), 1),
            **({"predict": round(testing, 1)} if workload.test_cases else {}),
            "report": _REPORT_SECONDS,
        },
    )
    asked = {"time_s": options.time_s, "steps": options.training.steps, "folds": options.planning.folds}
    return with_run(plan, sized, run, asked={key: value for key, value in asked.items() if value is not None})


def _augmentation(recipe: TrainingSpec, configuration: Configuration) -> AugmentationSpec:
    """Return the augmentation of another patch; what was switched off stays off."""
    before = recipe.augmentation
    after = augmentation_for(configuration.patch_size, before.mirror_axes, before.masked_channels)
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
