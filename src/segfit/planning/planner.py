"""From what was measured and what was asked to the plan. Pure: no file, no device, no clock, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from segfit.device import Hardware
from segfit.errors import InputError, nearest
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.labels import LabelScheme
from segfit.options import CONFIGURATION_NAMES, ConfigurationOptions, Options, PlanningOptions
from segfit.planning import decisions as why
from segfit.planning.augmentation import augmentation_for
from segfit.planning.changes import changes_of
from segfit.planning.checks import check_planned, check_request
from segfit.planning.design import Budget, DatasetDesign, Design, Wish, design_dataset
from segfit.planning.mirroring import AxisEvidence, axis_evidence
from segfit.planning.normalization import ChannelScheme, channel_schemes, normalization_of
from segfit.planning.notes import dataset_notes
from segfit.planning.overrides import option_key, overridden
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
from segfit.planning.presets import choose_rules, orientation_of, rules_of_kind
from segfit.planning.set_values import anything_set, with_set_values
from segfit.planning.topology import SMALLEST_MAP

__all__ = ["SLICE_SPACING_MM", "derive"]

SLICE_SPACING_MM = 999.0
"""Spacing of the single slice that 2D images get while the rules, which know three axes, are evaluated."""

_FEWEST_SUPERVISED_STAGES = 3
_GEOMETRY = ("rotation_degrees", "dummy_2d")  # which the patch that is cut out depends on


def derive(fingerprint: Fingerprint, labels: LabelScheme, options: Options, hardware: Hardware | None = None) -> Plan:
    """Return the plan for a dataset, with a reason for every derived value.

    Presets `stock` and `resenc-*` decide exactly as the reference's planners. `auto` takes their rules by the memory
    that is there, plans on canonical axes, and does not flip axes along which labels keep their order. Whatever the
    options fix is taken over and listed in `Plan.changes`. `Plan.run` stays None: it needs a measured step.

    Raises `InputError` when fingerprint and options do not go together or nothing fits.
    """
    plan = _derived(fingerprint, labels, options, hardware)
    asked = options.planning
    if not anything_set(asked):
        return plan
    return with_set_values(plan, _by_rule(fingerprint, labels, options, hardware), asked)


def _by_rule(fingerprint: Fingerprint, labels: LabelScheme, options: Options, hardware: Hardware | None) -> Plan | None:
    """Return the plan without any value that was set; None where the rules find none.

    The data were measured on the axes that were asked for, so the rules see those.
    """
    asked = PlanningOptions(orientation=options.planning.orientation, splits=options.planning.splits)
    try:
        plan = _derived(fingerprint, labels, options.model_copy(update={"planning": asked}), hardware)
    except InputError:
        return None
    usual = orientation_of(options.model_copy(update={"planning": PlanningOptions()}))
    orientation = why.orientation_decision(usual, preset=options.preset)
    others = (orientation if item.key == orientation.key else item for item in plan.decisions)
    return plan.model_copy(update={"decisions": tuple(others)})


def _derived(fingerprint: Fingerprint, labels: LabelScheme, options: Options, hardware: Hardware | None) -> Plan:
    """Return the plan with what the options fix, told as if the rules had given it."""
    check_request(fingerprint, options)
    rules, memory_gb, reasons = choose_rules(options, hardware)
    asked = options.planning
    budget = Budget(rules=rules, memory_gb=memory_gb, heads=labels.num_declared)
    dataset = _designed(fingerprint, budget, asked)
    designs = _designs(dataset)
    schemes = {
        name: channel_schemes(fingerprint, propose=options.preset == "auto", asked=asked.of(name).normalization)
        for name in designs
    }
    built = _configurations(fingerprint, labels, asked, designs, dataset.lowres is not None, schemes)
    planned, dropped = _chosen(built, designs, options)
    configurations = {name: overridden(item, asked, designs[name]) for name, item in planned.items()}
    mirrored = {name: _mirrored(fingerprint, labels, options, asked.of(name).mirror_axes) for name in configurations}
    training = {
        name: _recipe(item, _network_axes(mirrored[name][0], item), options) for name, item in configurations.items()
    }

    common = channel_schemes(fingerprint, propose=options.preset == "auto", asked=asked.normalization)
    flipped, evidence = _mirrored(fingerprint, labels, options, asked.mirror_axes)
    normalization = _common_normalization(configurations, asked) or normalization_of(common, fingerprint)
    decided: list[Decision] = [
        *reasons,
        why.orientation_decision(fingerprint.orientation, preset=options.preset),
        *why.dataset_decisions(fingerprint, dataset, list(configurations)),
        *why.normalization_decisions(fingerprint, normalization, common),
        why.mirroring_decision(flipped, fingerprint.ndim, evidence),
    ]
    for name, item in configurations.items():
        if item.previous_stage is None or "3d_fullres" not in configurations or name in asked.by_configuration:
            decided += why.configuration_decisions(item, designs[name])
        if item.previous_stage is not None:
            decided += why.cascade_decisions(item, len(labels.foreground_values))
        decided += why.training_decisions(
            name, training[name], _asked_training(options), options.augmentation.values, item.network.num_stages
        )

    changes = changes_of(
        fingerprint,
        options,
        flipped,
        [item.scheme for item in common],
        configurations,
        training,
        _asked_training(options),
    )
    return Plan(
        dataset=fingerprint.dataset,
        preset=options.preset,
        stock=options.preset != "auto" and not changes,
        changes=changes,
        fingerprint_hash=fingerprint.content_hash(),
        channel_names=fingerprint.channel_names,
        configurations=configurations,
        training=training,
        decisions=tuple(decided),
        warnings=(
            *dataset_notes(fingerprint, labels, normalization),
            *(item.remark for item in common if item.remark),
            *dropped,
            *_memory_warnings(configurations, designs, memory_gb, hardware),
        ),
    )


def _designed(fingerprint: Fingerprint, budget: Budget, asked: PlanningOptions) -> DatasetDesign:
    """Return the design of all configurations, each with what was asked of it.

    Here, and only here, 2D images become volumes of one slice, thicker than any pixel.
    """
    spacings = np.array([case.spacing_mm for case in fingerprint.cases], dtype=np.float64)
    shapes = np.array([case.shape_after_crop for case in fingerprint.cases], dtype=np.float64)
    targets = [one.target_spacing_mm or () for one in (asked, *asked.by_configuration.values())]
    thickness = SLICE_SPACING_MM * max(1.0, float(spacings.max()), *(mm for target in targets for mm in target))
    if fingerprint.ndim == 2:
        slices = np.ones((len(shapes), 1))
        spacings, shapes = np.hstack([thickness * slices, spacings]), np.hstack([slices, shapes])

    def wish(values: ConfigurationOptions) -> Wish:
        rules = budget.rules if values.kind is None else rules_of_kind(budget.rules, values.kind)
        rules = replace(rules, base_features=values.base_features or rules.base_features)
        target = values.target_spacing_mm
        if target is not None and fingerprint.ndim == 2:
            target = (thickness, *target)
        return Wish(
            budget=replace(budget, rules=rules),
            target_mm=target,
            patch_size=values.patch_size,
            transpose=values.transpose,
        )

    own: dict[str, Wish] = {name: wish(asked.of(name)) for name in asked.by_configuration}
    lowres = asked.by_configuration.get("3d_lowres")
    if lowres is not None and lowres.target_spacing_mm is None:  # that of all belongs to the full resolution
        own["3d_lowres"] = replace(own["3d_lowres"], target_mm=None)
    common = wish(asked)
    return design_dataset(
        spacings,
        shapes,
        fingerprint.num_training,
        common.budget,
        target_mm=common.target_mm,
        patch_size=common.patch_size,
        transpose=common.transpose,
        own=own,
    )


def _designs(dataset: DatasetDesign) -> dict[str, Design]:
    """Return the design behind every configuration the rules ask for, in the order of the plan."""
    by_name = {
        "2d": dataset.plane,
        "3d_lowres": dataset.lowres,
        "3d_fullres": dataset.fullres,
        "3d_cascade_fullres": dataset.cascade,
    }
    return {name: item for name, item in by_name.items() if item is not None}


def _configurations(
    fingerprint: Fingerprint,
    labels: LabelScheme,
    asked: PlanningOptions,
    designs: dict[str, Design],
    has_lowres: bool,
    schemes: Mapping[str, Sequence[ChannelScheme]],
) -> dict[str, Configuration]:
    return {
        name: _configuration(
            name,
            item,
            in_channels=len(schemes[name]) + (len(labels.foreground_values) if "cascade" in name else 0),
            num_outputs=labels.num_outputs,
            batch_size=asked.of(name).batch_size or item.batch_size,
            batch_dice=name == "2d" or (name != "3d_lowres" and has_lowres),
            preprocessing=_preprocessing(fingerprint, item, normalization_of(schemes[name], fingerprint)),
        )
        for name, item in designs.items()
    }


def _common_normalization(
    configurations: Mapping[str, Configuration], asked: PlanningOptions
) -> tuple[Normalization, ...] | None:
    """Return the normalisation of the configurations that have none of their own; None where all have."""
    keys = ("normalization", "use_mask", "statistics")
    shared = [
        item.preprocessing.normalization
        for name, item in configurations.items()
        if all(option_key(asked, name, key) == f"planning.{key}" for key in keys)
    ]
    return shared[0] if shared else None


def _configuration(
    name: str,
    this: Design,
    *,
    in_channels: int,
    num_outputs: int,
    batch_size: int,
    batch_dice: bool,
    preprocessing: PreprocessingSpec,
) -> Configuration:
    ndim: Literal[2, 3] = 2 if len(this.patch) == 2 else 3
    stages, rules = len(this.topology.strides), this.budget.rules
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
    fingerprint: Fingerprint, this: Design, normalization: tuple[Normalization, ...]
) -> PreprocessingSpec:
    """Return how cases are prepared; a 2D configuration keeps the slices of a volume as they are."""
    spacing: tuple[float | None, ...] = this.spacing_mm
    transpose = this.transpose
    if fingerprint.ndim == 2:
        transpose = (0, 1)
    elif len(spacing) == 2:
        spacing = (None, *spacing)
    return PreprocessingSpec(
        orientation=fingerprint.orientation, transpose=transpose, spacing_mm=spacing, normalization=normalization
    )


def _chosen(
    built: dict[str, Configuration], designs: dict[str, Design], options: Options
) -> tuple[dict[str, Configuration], tuple[str, ...]]:
    """Return the configurations that were asked for and can be trained, and a remark on each that cannot."""
    usable = {name: item for name, item in built.items() if item.network.num_stages > 1}
    too_small = {name: _too_small(designs[name], item) for name, item in built.items() if item.network.num_stages == 1}
    dropped = tuple(f"{name} is left out: {reason}" for name, reason in too_small.items())
    if not usable:
        raise InputError(f"there is nothing to train: {'; '.join(dict.fromkeys(too_small.values()))}")
    asked = options.planning.configurations
    if asked is None:
        check_planned(usable, options)
        return usable, dropped
    for name in asked:
        if name not in CONFIGURATION_NAMES:
            raise InputError(f"unknown configuration {name!r}{nearest(name, CONFIGURATION_NAMES)}")
        if name not in usable:
            raise InputError(f"this dataset has no configuration {name}; the rules give {', '.join(usable)}")
    if not asked:
        raise InputError(f"planning.configurations is empty; the rules give {', '.join(usable)}")
    needed = {*asked, *(usable[name].previous_stage for name in asked)}
    chosen = {name: item for name, item in usable.items() if name in needed}
    check_planned(chosen, options)
    return {
        name: item if item.next_stage in chosen else item.model_copy(update={"next_stage": None})
        for name, item in chosen.items()
    }, dropped


def _too_small(this: Design, item: Configuration) -> str:
    """Say why a patch leaves nothing to halve."""
    patch = "x".join(map(str, item.patch_size))
    if this.patch_bound == "memory":
        return f"{this.budget.memory_gb:g} GB leave a patch of {patch} voxels, too small for a network; raise --memory"
    if this.patch_bound == "fixed":
        return f"the patch of {patch} voxels that was asked for is too small for a network; one axis needs 8 or more"
    size = "x".join(f"{n:g}" for n in item.median_shape)
    axes = zip(item.spacing_mm, item.patch_size, strict=True)
    long_enough = [(spacing, voxels) for spacing, voxels in axes if voxels >= 2 * SMALLEST_MAP]
    if long_enough:  # and yet nothing was halved
        spacing, voxels = min(long_enough)
        return (
            f"the images have {size} voxels, too few for a network: the axis to be halved first, the finest with "
            f"{spacing:g} mm, has {voxels} of the {3 * SMALLEST_MAP} it needs; set a coarser planning.target_spacing_mm"
        )
    return f"the images have {size} voxels, too few for a network; at least one axis needs {2 * SMALLEST_MAP} or more"


def _mirrored(
    fingerprint: Fingerprint, labels: LabelScheme, options: Options, asked: tuple[int, ...] | None
) -> tuple[tuple[int, ...], tuple[AxisEvidence, ...]]:
    """Return the axes to flip, in array order, and what was seen in the data where that decided."""
    if asked is not None:
        return tuple(sorted(set(asked))), ()
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
    asked = options.augmentation
    augmentation = augmentation_for(
        configuration.patch_size, mirror_axes, masked, dummy_2d=asked.dummy_2d, degrees=asked.rotation_degrees
    ).model_copy(update={key: value for key, value in asked.values.items() if key not in _GEOMETRY})
    if options.augmentation.strength == "none":
        none = {name: 0.0 for name in AugmentationSpec.model_fields if name.endswith("_probability")}
        augmentation = augmentation.model_copy(
            update={**none, "mirror_axes": (), "sample_patch": configuration.patch_size}
        )
    supervised = configuration.network.num_stages >= _FEWEST_SUPERVISED_STAGES
    if options.training.deep_supervision and not supervised:
        raise InputError(
            f"training.deep_supervision cannot be had in {configuration.name}, a network of "
            f"{configuration.network.num_stages} stages; it needs {_FEWEST_SUPERVISED_STAGES} or more"
        )
    recipe = TrainingSpec(deep_supervision=supervised, augmentation=augmentation)
    return recipe.model_copy(update=_asked_training(options))


def _memory_warnings(
    configurations: dict[str, Configuration], designs: dict[str, Design], memory_gb: float, hardware: Hardware | None
) -> list[str]:
    warnings = []
    for name, item in configurations.items():
        budget = designs[name].budget
        if budget.exceeded(item.ndim, item.memory_estimate):
            times = item.memory_estimate / budget.elements(item.ndim)
            warnings.append(
                f"{name}: the patch that was asked for needs about {times:.1f} times the memory target of "
                f"{memory_gb:g} GB"
            )
    if hardware is not None and hardware.kind != "cpu" and memory_gb > hardware.free_memory_gb:
        warnings.append(f"planned for {memory_gb:g} GB, {hardware.name} has {hardware.free_memory_gb:.1f} GB free")
    return warnings
