"""From what was measured and what was asked to the plan. Pure: no file, no device, no clock, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from segfit.device import Hardware
from segfit.errors import InputError, nearest
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.labels import LabelScheme
from segfit.options import Options, PlanningOptions
from segfit.planning import decisions as why
from segfit.planning.augmentation import augmentation_for
from segfit.planning.changes import changes_of
from segfit.planning.configuration_decisions import cascade_decisions, configuration_decisions, network_ends
from segfit.planning.design import Budget, DatasetDesign, Design, design_dataset
from segfit.planning.mirroring import AxisEvidence, axis_evidence
from segfit.planning.normalization import channel_schemes, normalization_of
from segfit.planning.notes import dataset_notes
from segfit.planning.overrides import asked_decisions, overridden
from segfit.planning.plan import (
    AugmentationSpec,
    Configuration,
    Decision,
    NetworkSpec,
    Normalization,
    Plan,
    PreprocessingSpec,
    TrainingSpec,
)
from segfit.planning.presets import Rules, choose_rules, orientation_of
from segfit.planning.reasons import Alternative
from segfit.planning.recipe_decisions import training_decisions

__all__ = ["SLICE_SPACING_MM", "derive"]

SLICE_SPACING_MM = 999.0
"""Spacing of the single slice that 2D images get while the rules, which know three axes, are evaluated."""

_CONFIGURATIONS = ("2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres")
_FEWEST_SUPERVISED_STAGES = 3
_MORE_MEMORY = (2, 3)
"""How many times the memory the explanation of a plan looks at."""


def derive(fingerprint: Fingerprint, labels: LabelScheme, options: Options, hardware: Hardware | None = None) -> Plan:
    """Return the plan for a dataset, with a reason for every derived value.

    Presets `stock` and `resenc-*` decide exactly as the reference's planners. `auto` takes their rules by the memory
    that is there, plans on canonical axes, and does not flip axes along which labels keep their order. Whatever the
    options fix is taken over and listed in `Plan.changes`. `Plan.run` stays None: it needs a measured step.

    Raises `InputError` when fingerprint and options do not go together or nothing fits.
    """
    _check(fingerprint, options)
    rules, memory_gb, reasons = choose_rules(options, hardware)
    asked = options.planning
    rules = replace(rules, base_features=asked.base_features or rules.base_features)
    budget = Budget(rules=rules, memory_gb=memory_gb, heads=labels.num_declared)
    dataset = _designed(fingerprint, budget, asked)
    schemes = channel_schemes(fingerprint, propose=options.preset == "auto", asked=asked.normalization)
    normalization = normalization_of(schemes, fingerprint)
    designs = _designs(dataset)
    built = _configurations(fingerprint, labels, options, rules, dataset, designs, normalization)
    planned, dropped = _chosen(built, designs, budget, options)
    configurations = {name: overridden(item, asked, budget.heads) for name, item in planned.items()}
    mirrored, evidence = _mirrored(fingerprint, labels, options)
    training = {name: _recipe(item, _network_axes(mirrored, item), options) for name, item in configurations.items()}

    alternatives = _alternatives(fingerprint, options, hardware, budget)
    augmented = options.augmentation.strength != "none"
    decided: list[Decision] = [
        *reasons,
        why.orientation_decision(
            fingerprint.orientation,
            asked=asked.orientation is not None,
            preset=options.preset,
            ndim=fingerprint.ndim,
        ),
        *why.dataset_decisions(fingerprint, dataset, asked=asked.target_spacing_mm is not None),
        why.configurations_decision(
            list(configurations),
            fingerprint.ndim,
            designs,
            alternatives,
            preset=rules.name,
            dropped=dropped,
            asked=asked.configurations is not None,
        ),
        *why.normalization_decisions(fingerprint, normalization, schemes, asked=asked.normalization is not None),
        why.mirroring_decision(
            mirrored, fingerprint.ndim, evidence, asked=asked.mirror_axes is not None, augmented=augmented
        ),
    ]
    for name, item in configurations.items():
        if item.previous_stage is None or "3d_fullres" not in configurations:
            decided += configuration_decisions(
                item,
                designs[name],
                budget,
                fullres=dataset.fullres,
                fingerprint=fingerprint,
                alternatives=alternatives,
                batch_asked=asked.batch_size is not None,
            )
        if item.previous_stage is not None:
            decided += cascade_decisions(item)
        decided += network_ends(item, fingerprint.channel_names, labels)
        decided += training_decisions(
            name,
            training[name],
            item.patch_size,
            _asked_training(options),
            item.network.num_stages,
            augmented=augmented,
        )

    changes = changes_of(fingerprint, options, mirrored, configurations, training, _asked_training(options))
    return Plan(
        dataset=fingerprint.dataset,
        preset=options.preset,
        stock=options.preset != "auto" and not changes,
        changes=changes,
        fingerprint_hash=fingerprint.content_hash(),
        channel_names=fingerprint.channel_names,
        configurations=configurations,
        training=training,
        decisions=tuple(asked_decisions(decided, asked)),
        warnings=(
            *dataset_notes(fingerprint, labels, normalization),
            *(item.remark for item in schemes if item.remark),
            *dropped,
            *_memory_warnings(configurations, budget, hardware),
        ),
    )


def _check(fingerprint: Fingerprint, options: Options) -> None:
    """Refuse fingerprints and options that contradict each other or themselves."""
    ndim, asked = fingerprint.ndim, options.planning
    if not fingerprint.cases:
        raise InputError(f"the fingerprint of {fingerprint.dataset} holds no case; add training cases with labels")
    for case in fingerprint.cases:
        lengths = {len(case.shape), len(case.spacing_mm), len(case.shape_after_crop)}
        if lengths != {ndim} or min(case.spacing_mm) <= 0 or min(case.shape_after_crop) < 1:
            raise InputError(
                f"{case.case}: expected {ndim} positive spacings and sizes, got spacing {case.spacing_mm} and "
                f"shape {case.shape_after_crop}; measure the fingerprint anew"
            )
    if len(fingerprint.intensities) != len(fingerprint.channel_names) or fingerprint.num_training < 1:
        raise InputError(
            f"the fingerprint of {fingerprint.dataset} has statistics of {len(fingerprint.intensities)} channels for "
            f"{len(fingerprint.channel_names)} names and {fingerprint.num_training} cases; measure it anew"
        )
    if ndim == 3 and fingerprint.orientation != orientation_of(options):
        raise InputError(
            f"these options plan on {orientation_of(options)} axes, the fingerprint was measured on "
            f"{fingerprint.orientation} ones; measure it anew"
        )
    if asked.target_spacing_mm is not None:
        _check_length("target_spacing_mm", asked.target_spacing_mm, (ndim,))
        if min(asked.target_spacing_mm) <= 0:
            raise InputError(f"planning.target_spacing_mm must be above zero, got {asked.target_spacing_mm}")
    if asked.patch_size is not None:
        _check_length("patch_size", asked.patch_size, (2, 3) if ndim == 3 else (2,))
        if min(asked.patch_size) < 1:
            raise InputError(f"planning.patch_size must be above zero, got {asked.patch_size}")
    if asked.transpose is not None and (ndim == 2 or sorted(asked.transpose) != [0, 1, 2]):
        raise InputError(f"planning.transpose is an order of the axes 0,1,2 of volumes, got {list(asked.transpose)}")
    for axis in asked.mirror_axes or ():
        if not 0 <= axis < ndim:
            raise InputError(f"planning.mirror_axes are numbered 0 to {ndim - 1} in array order, got {axis}")


def _check_length(key: str, values: Sequence[float], lengths: tuple[int, ...]) -> None:
    if len(values) not in lengths:
        wanted = " or ".join(str(n) for n in lengths)
        raise InputError(f"planning.{key} needs {wanted} values for this dataset, in array order, got {list(values)}")


def _designed(fingerprint: Fingerprint, budget: Budget, asked: PlanningOptions) -> DatasetDesign:
    spacings, shapes, target = _volumes(fingerprint, asked.target_spacing_mm)
    return design_dataset(
        spacings,
        shapes,
        fingerprint.num_training,
        budget,
        target_mm=target,
        patch_size=asked.patch_size,
        transpose=asked.transpose,
    )


def _alternatives(
    fingerprint: Fingerprint, options: Options, hardware: Hardware | None, budget: Budget
) -> tuple[Alternative, ...]:
    """Return what the rules give with two and three times the memory, as `derive` would with that option."""
    found: dict[tuple[str, float], Alternative] = {}
    for factor in _MORE_MEMORY:
        more = options.model_copy(update={"memory_gb": factor * budget.memory_gb})
        rules, memory_gb, _ = choose_rules(more, hardware)
        if (rules.name, memory_gb) in {*found, (budget.rules.name, budget.memory_gb)}:
            continue
        rules = replace(rules, base_features=options.planning.base_features or rules.base_features)
        dataset = _designed(fingerprint, replace(budget, rules=rules, memory_gb=memory_gb), options.planning)
        found[rules.name, memory_gb] = Alternative(memory_gb=memory_gb, preset=rules.name, designs=_designs(dataset))
    return tuple(found.values())


def _volumes(
    fingerprint: Fingerprint, target_mm: tuple[float, ...] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[float, ...] | None]:
    """Return spacings and cropped shapes as ``(cases, 3)``, and the target spacing that was asked for.

    Here, and only here, 2D images become volumes of one slice, thicker than any pixel.
    """
    spacings = np.array([case.spacing_mm for case in fingerprint.cases], dtype=np.float64)
    shapes = np.array([case.shape_after_crop for case in fingerprint.cases], dtype=np.float64)
    if fingerprint.ndim == 3:
        return spacings, shapes, target_mm
    slices = np.ones((len(shapes), 1))
    thickness = SLICE_SPACING_MM * max(1.0, float(spacings.max()), *(target_mm or ()))
    target = (thickness, *target_mm) if target_mm else None
    return np.hstack([thickness * slices, spacings]), np.hstack([slices, shapes]), target


def _designs(dataset: DatasetDesign) -> dict[str, Design]:
    """Return the design behind every configuration the rules ask for, in the order of the plan."""
    by_name = {
        "2d": dataset.plane,
        "3d_lowres": dataset.lowres,
        "3d_fullres": dataset.fullres,
        "3d_cascade_fullres": dataset.fullres if dataset.lowres is not None else None,
    }
    return {name: item for name, item in by_name.items() if item is not None}


def _configurations(
    fingerprint: Fingerprint,
    labels: LabelScheme,
    options: Options,
    rules: Rules,
    dataset: DatasetDesign,
    designs: dict[str, Design],
    normalization: tuple[Normalization, ...],
) -> dict[str, Configuration]:
    return {
        name: _configuration(
            name,
            item,
            rules=rules,
            in_channels=len(normalization) + (len(labels.foreground_values) if "cascade" in name else 0),
            num_outputs=labels.num_outputs,
            batch_size=options.planning.batch_size or item.batch_size,
            batch_dice=name == "2d" or (name != "3d_lowres" and dataset.lowres is not None),
            preprocessing=_preprocessing(fingerprint, dataset, item, normalization),
        )
        for name, item in designs.items()
    }


def _configuration(
    name: str,
    this: Design,
    *,
    rules: Rules,
    in_channels: int,
    num_outputs: int,
    batch_size: int,
    batch_dice: bool,
    preprocessing: PreprocessingSpec,
) -> Configuration:
    ndim: Literal[2, 3] = 2 if len(this.patch) == 2 else 3
    stages = len(this.topology.strides)
    encoder_convs, decoder_convs = rules.convs(stages)
    return Configuration(
        name=name,
        ndim=ndim,
        patch_size=this.patch,
        batch_size=batch_size,
        spacing_mm=this.spacing_mm,
        median_shape=this.median_shape,
        batch_dice=batch_dice,
        preprocessing=preprocessing,
        network=NetworkSpec(
            kind=rules.kind,
            ndim=ndim,
            in_channels=in_channels,
            num_outputs=num_outputs,
            features=rules.features(ndim, stages),
            strides=this.topology.strides,
            kernels=this.topology.kernels,
            encoder_convs=encoder_convs,
            decoder_convs=decoder_convs,
        ),
        memory_estimate=this.estimate,
        previous_stage="3d_lowres" if name == "3d_cascade_fullres" else None,
        next_stage="3d_cascade_fullres" if name == "3d_lowres" else None,
    )


def _preprocessing(
    fingerprint: Fingerprint, dataset: DatasetDesign, this: Design, normalization: tuple[Normalization, ...]
) -> PreprocessingSpec:
    """Return how cases are prepared; a 2D configuration keeps the slices of a volume as they are."""
    spacing: tuple[float | None, ...] = this.spacing_mm
    transpose = dataset.transpose
    if fingerprint.ndim == 2:
        transpose = (0, 1)
    elif len(spacing) == 2:
        spacing = (None, *spacing)
    return PreprocessingSpec(
        orientation=fingerprint.orientation, transpose=transpose, spacing_mm=spacing, normalization=normalization
    )


def _chosen(
    built: dict[str, Configuration], designs: dict[str, Design], budget: Budget, options: Options
) -> tuple[dict[str, Configuration], tuple[str, ...]]:
    """Return the configurations that were asked for and can be trained, and a remark on each that cannot."""
    usable = {name: item for name, item in built.items() if item.network.num_stages > 1}
    too_small = {
        name: _too_small(designs[name], item, budget) for name, item in built.items() if item.network.num_stages == 1
    }
    dropped = tuple(f"{name} is left out: {reason}" for name, reason in too_small.items())
    if not usable:
        raise InputError(f"there is nothing to train: {'; '.join(dict.fromkeys(too_small.values()))}")
    asked = options.planning.configurations
    if asked is None:
        return usable, dropped
    for name in asked:
        if name not in _CONFIGURATIONS:
            raise InputError(f"unknown configuration {name!r}{nearest(name, _CONFIGURATIONS)}")
        if name not in usable:
            raise InputError(f"this dataset has no configuration {name}; the rules give {', '.join(usable)}")
    if not asked:
        raise InputError(f"planning.configurations is empty; the rules give {', '.join(usable)}")
    needed = {*asked, *(usable[name].previous_stage for name in asked)}
    chosen = {name: item for name, item in usable.items() if name in needed}
    return {
        name: item if item.next_stage in chosen else item.model_copy(update={"next_stage": None})
        for name, item in chosen.items()
    }, dropped


def _too_small(this: Design, item: Configuration, budget: Budget) -> str:
    """Say why a patch leaves nothing to halve."""
    patch = "x".join(map(str, item.patch_size))
    if this.patch_bound == "memory":
        return f"{budget.memory_gb:g} GB leave a patch of {patch} voxels, too small for a network; raise --memory"
    if this.patch_bound == "fixed":
        return f"the patch of {patch} voxels that was asked for is too small for a network; one axis needs 8 or more"
    size = "x".join(f"{n:g}" for n in item.median_shape)
    return f"the images have {size} voxels, too few for a network; at least one axis needs 8 or more"


def _mirrored(
    fingerprint: Fingerprint, labels: LabelScheme, options: Options
) -> tuple[tuple[int, ...], tuple[AxisEvidence, ...]]:
    """Return the axes to flip, in array order, and what was seen in the data where that decided."""
    if options.planning.mirror_axes is not None:
        return tuple(sorted(set(options.planning.mirror_axes))), ()
    if options.preset != "auto":
        return tuple(range(fingerprint.ndim)), ()
    evidence = axis_evidence(fingerprint.cases, labels, fingerprint.ndim)
    return tuple(item.axis for item in evidence if item.mirrored), evidence


def _network_axes(mirrored: tuple[int, ...], configuration: Configuration) -> tuple[int, ...]:
    """Return array axes as the network counts them: transposed, without the slice axis of a 2D configuration."""
    seen = configuration.preprocessing.transpose[-configuration.ndim :]
    return tuple(axis for axis, source in enumerate(seen) if source in mirrored)


_ADAMW = {"learning_rate": 3e-4, "momentum": 0.9, "weight_decay": 5e-2}
"""What AdamW starts from where the user names it and nothing else; published for the reference's transformers."""


def _asked_training(options: Options) -> dict[str, Any]:
    asked = options.training.model_dump(exclude={"steps", "checkpoint_seconds"}, exclude_none=True)
    return {**(_ADAMW if options.training.optimizer == "adamw" else {}), **asked}


def _recipe(configuration: Configuration, mirror_axes: tuple[int, ...], options: Options) -> TrainingSpec:
    masked = [c for c, how in enumerate(configuration.preprocessing.normalization) if how.use_mask]
    augmentation = augmentation_for(configuration.patch_size, mirror_axes, masked)
    if options.augmentation.strength == "none":
        none = {name: 0.0 for name in AugmentationSpec.model_fields if name.endswith("_probability")}
        augmentation = augmentation.model_copy(
            update={**none, "mirror_axes": (), "sample_patch": configuration.patch_size}
        )
    supervised = configuration.network.num_stages >= _FEWEST_SUPERVISED_STAGES
    recipe = TrainingSpec(deep_supervision=supervised, augmentation=augmentation)
    return recipe.model_copy(update=_asked_training(options))


def _memory_warnings(configurations: dict[str, Configuration], budget: Budget, hardware: Hardware | None) -> list[str]:
    warnings = [
        f"{name}: the patch that was asked for needs about "
        f"{item.memory_estimate / budget.elements(item.ndim):.1f} times the memory target of {budget.memory_gb:g} GB"
        for name, item in configurations.items()
        if budget.exceeded(item.ndim, item.memory_estimate)
    ]
    if hardware is not None and hardware.kind != "cpu" and budget.memory_gb > hardware.free_memory_gb:
        warnings.append(
            f"planned for {budget.memory_gb:g} GB, {hardware.name} has {hardware.free_memory_gb:.1f} GB free"
        )
    return warnings
