"""From what was measured and what was asked to the plan. Pure: no file, no device, no clock, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from segfit.device import Hardware
from segfit.errors import InputError, nearest
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.labels import Exchange, LabelScheme
from segfit.options import CONFIGURATION_NAMES, Options, PlanningOptions
from segfit.planning import decisions as why
from segfit.planning.augmentation import augmentation_for
from segfit.planning.changes import changes_of
from segfit.planning.checks import check_planned, check_request
from segfit.planning.configuration_decisions import cascade_decisions, configuration_decisions, network_ends
from segfit.planning.design import Budget, DatasetDesign, Design
from segfit.planning.mirroring import AxisEvidence, axis_evidence, exchanged_values, value_names
from segfit.planning.normalization import channel_schemes, normalization_of
from segfit.planning.notes import dataset_notes
from segfit.planning.overrides import option_key, overridden
from segfit.planning.plan import Decision, Plan
from segfit.planning.presets import Rules, choose_rules, orientation_of
from segfit.planning.reasons import Alternative, by_axis
from segfit.planning.recipe_decisions import training_decisions
from segfit.planning.request import designed, designs_of
from segfit.planning.set_values import anything_set, with_set_values
from segfit.planning.topology import SMALLEST_MAP
from segfit.specs import AugmentationSpec, Configuration, NetworkSpec, Normalization, PreprocessingSpec, TrainingSpec

__all__ = ["derive"]

_MORE_MEMORY = (2, 3)
"""How many times the memory the explanation of a plan looks at."""
_FEWEST_SUPERVISED_STAGES = 3
_GEOMETRY = ("rotation_degrees", "dummy_2d")  # which the patch that is cut out depends on


def derive(fingerprint: Fingerprint, labels: LabelScheme, options: Options, hardware: Hardware | None = None) -> Plan:
    """Return the plan for a dataset, with a reason for every derived value.

    Presets `stock` and `resenc-*` decide exactly as the reference's planners. `auto` takes their rules by the memory
    that is there, plans on canonical axes, and does not flip axes along which labels keep their order; pairs of left
    and right change places with a flip. Whatever the options fix is taken over and listed in `Plan.changes`. `Plan.run`
    stays None: it needs a measured step.

    Raises `InputError` when fingerprint and options do not go together or nothing fits.
    """
    draft = _drafted(fingerprint, labels, options, hardware)
    alternatives = _alternatives(draft, fingerprint, labels, options, hardware)
    plan = _told(draft, fingerprint, labels, options, hardware, alternatives)
    if not anything_set(options.planning):
        return plan
    return with_set_values(plan, _by_rule(fingerprint, labels, options, hardware), options.planning)


def _by_rule(fingerprint: Fingerprint, labels: LabelScheme, options: Options, hardware: Hardware | None) -> Plan | None:
    """Return the plan without any value that was set; None where the rules find none.

    The data were measured on the axes that were asked for, so the rules see those.
    """
    asked = PlanningOptions(orientation=options.planning.orientation, splits=options.planning.splits)
    without = options.model_copy(update={"planning": asked})
    try:
        plan = _told(_drafted(fingerprint, labels, without, hardware), fingerprint, labels, without, hardware, ())
    except InputError:
        return None
    usual = orientation_of(options.model_copy(update={"planning": PlanningOptions()}))
    usual = usual if fingerprint.ndim == 3 else fingerprint.orientation
    orientation = why.orientation_decision(usual, preset=options.preset, ndim=fingerprint.ndim)
    others = (orientation if item.key == orientation.key else item for item in plan.decisions)
    return plan.model_copy(update={"decisions": tuple(others)})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """What rules and options give, before anything is told of it."""

    rules: Rules
    memory_gb: float
    reasons: tuple[Decision, ...]  # for rules and memory
    dataset: DatasetDesign
    designs: Mapping[str, Design]
    configurations: Mapping[str, Configuration]
    dropped: tuple[str, ...]  # a remark on each configuration that cannot be trained


def _drafted(fingerprint: Fingerprint, labels: LabelScheme, options: Options, hardware: Hardware | None) -> _Draft:
    check_request(fingerprint, options)
    rules, memory_gb, reasons = choose_rules(options, hardware)
    asked = options.planning
    dataset = designed(fingerprint, Budget(rules=rules, memory_gb=memory_gb, heads=labels.num_declared), asked)
    designs = designs_of(dataset)
    built = _configurations(fingerprint, labels, options, designs)
    planned, dropped = _chosen(built, designs, options)
    return _Draft(
        rules=rules,
        memory_gb=memory_gb,
        reasons=reasons,
        dataset=dataset,
        designs=designs,
        configurations={name: overridden(item, asked, designs[name]) for name, item in planned.items()},
        dropped=dropped,
    )


def _alternatives(
    draft: _Draft, fingerprint: Fingerprint, labels: LabelScheme, options: Options, hardware: Hardware | None
) -> tuple[Alternative, ...]:
    """Return what planning again with two and three times the memory gives, where that is other rules or a target."""
    found: dict[tuple[str, float], Alternative] = {}
    for factor in _MORE_MEMORY:
        more = options.model_copy(update={"memory_gb": factor * draft.memory_gb})
        rules, memory_gb, _ = choose_rules(more, hardware)
        if (rules.name, memory_gb) in {*found, (draft.rules.name, draft.memory_gb)}:
            continue
        configurations: Mapping[str, Configuration] | None = None
        with suppress(InputError):
            configurations = _drafted(fingerprint, labels, more, hardware).configurations
        found[rules.name, memory_gb] = Alternative(
            memory_gb=memory_gb, preset=rules.name, configurations=configurations
        )
    return tuple(found.values())


def _told(
    draft: _Draft,
    fingerprint: Fingerprint,
    labels: LabelScheme,
    options: Options,
    hardware: Hardware | None,
    alternatives: Sequence[Alternative],
) -> Plan:
    """Return the plan with what the options fix, told as if the rules had given it."""
    asked, configurations = options.planning, dict(draft.configurations)
    mirrored = {name: _mirrored(fingerprint, labels, options, asked.of(name).mirror_axes) for name in configurations}
    training = {name: _recipe(item, mirrored[name], options) for name, item in configurations.items()}
    common = channel_schemes(fingerprint, propose=options.preset == "auto", asked=asked.normalization)
    flipped = _mirrored(fingerprint, labels, options, asked.mirror_axes)
    normalization = _common_normalization(configurations, asked) or normalization_of(common, fingerprint)
    own = asked.by_configuration.get("3d_lowres")
    lowres_set = own is not None and own.target_spacing_mm is not None
    preset, augmented = draft.rules.name, options.augmentation.strength != "none"
    decided: list[Decision] = [
        *draft.reasons,
        why.orientation_decision(fingerprint.orientation, preset=options.preset, ndim=fingerprint.ndim),
        *why.dataset_decisions(fingerprint, draft.dataset),
        why.configurations_decision(
            list(configurations),
            fingerprint.ndim,
            draft.dataset,
            alternatives,
            preset=preset,
            lowres_set=lowres_set,
            dropped=draft.dropped,
        ),
        *why.normalization_decisions(fingerprint, normalization, common),
        why.mirroring_decision(flipped.axes, fingerprint.ndim, flipped.evidence, augmented=augmented),
    ]
    if augmented and flipped.exchanged:
        names = value_names(labels)
        two_sided = [name for item in flipped.evidence for name in item.two_sided]
        decided.append(why.exchange_decision([(names[a], names[b]) for a, b in flipped.exchanged], two_sided))
    for name, item in configurations.items():
        if item.previous_stage is None or "3d_fullres" not in configurations or name in asked.by_configuration:
            decided += configuration_decisions(
                item,
                draft.designs[name],
                fullres=None if lowres_set else draft.dataset.fullres,
                fingerprint=fingerprint,
                alternatives=alternatives,
                preset=preset,
            )
        if item.previous_stage is not None:
            decided += cascade_decisions(item)
        decided += network_ends(item, fingerprint.channel_names, labels)
        usual = _recipe(item, mirrored[name], Options())
        decided += training_decisions(name, training[name], usual, item.patch_size, item.network.num_stages, options)

    changes = changes_of(
        fingerprint,
        options,
        flipped.axes,
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
            *draft.dropped,
            *_memory_warnings(configurations, draft.designs, draft.memory_gb, hardware),
        ),
    )


def _configurations(
    fingerprint: Fingerprint, labels: LabelScheme, options: Options, designs: Mapping[str, Design]
) -> dict[str, Configuration]:
    asked, has_lowres = options.planning, "3d_lowres" in designs
    schemes = {
        name: channel_schemes(fingerprint, propose=options.preset == "auto", asked=asked.of(name).normalization)
        for name in designs
    }
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
    built: Mapping[str, Configuration], designs: Mapping[str, Design], options: Options
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
    patch = by_axis(item.patch_size)
    if this.patch_bound == "memory":
        return f"{this.budget.memory_gb:g} GB leave a patch of {patch} voxels, too small for a network; raise --memory"
    if this.patch_bound == "fixed":
        return f"the patch of {patch} voxels that was asked for is too small for a network; one axis needs 8 or more"
    size = by_axis(item.median_shape)
    axes = zip(item.spacing_mm, item.patch_size, strict=True)
    long_enough = [(spacing, voxels) for spacing, voxels in axes if voxels >= 2 * SMALLEST_MAP]
    if long_enough:  # and yet nothing was halved
        spacing, voxels = min(long_enough)
        return (
            f"the images have {size} voxels, too few for a network: the axis to be halved first, the finest with "
            f"{spacing:g} mm, has {voxels} of the {3 * SMALLEST_MAP} it needs; set a coarser planning.target_spacing_mm"
        )
    return f"the images have {size} voxels, too few for a network; at least one axis needs {2 * SMALLEST_MAP} or more"


@dataclass(frozen=True, slots=True)
class _Mirrored:
    """Axes that are flipped, in array order."""

    axes: tuple[int, ...]
    exchanged: tuple[tuple[int, int], ...] = ()  # label values that change places when the last axis is flipped
    evidence: tuple[AxisEvidence, ...] = ()  # what was seen in the data where that decided


def _mirrored(
    fingerprint: Fingerprint, labels: LabelScheme, options: Options, asked: tuple[int, ...] | None
) -> _Mirrored:
    if asked is None and options.preset != "auto":
        return _Mirrored(tuple(range(fingerprint.ndim)))
    sides_known = fingerprint.ndim == 2 or fingerprint.orientation == "canonical"
    if asked is not None:
        exchanging = options.preset == "auto" and sides_known and fingerprint.ndim - 1 in asked
        return _Mirrored(tuple(sorted(set(asked))), exchanged_values(labels) if exchanging else ())
    evidence = axis_evidence(fingerprint.cases, labels, fingerprint.ndim, sides_known=sides_known)
    return _Mirrored(tuple(item.axis for item in evidence if item.mirrored), evidence[-1].exchanged, evidence)


def _network_axes(array_axes: Sequence[int], configuration: Configuration) -> tuple[int, ...]:
    """Return array axes as the network counts them: transposed, without the slice axis of a 2D configuration."""
    seen = configuration.preprocessing.transpose[-configuration.ndim :]
    return tuple(axis for axis, source in enumerate(seen) if source in array_axes)


def _exchange(mirrored: _Mirrored, configuration: Configuration) -> Exchange | None:
    """Return what changes places with the left-right axis; None where the network does not see that axis."""
    across = _network_axes([configuration.preprocessing.image_ndim - 1], configuration)
    return Exchange(axis=across[0], pairs=mirrored.exchanged) if mirrored.exchanged and across else None


_ADAMW = {"learning_rate": 3e-4, "momentum": 0.9, "weight_decay": 5e-2}
"""What AdamW starts from where the user names it and nothing else; published for the reference's transformers."""


def _asked_training(options: Options) -> dict[str, Any]:
    return {**(_ADAMW if options.training.optimizer == "adamw" else {}), **options.training.values}


def _recipe(configuration: Configuration, mirrored: _Mirrored, options: Options) -> TrainingSpec:
    masked = [c for c, how in enumerate(configuration.preprocessing.normalization) if how.use_mask]
    asked = options.augmentation
    augmentation = augmentation_for(
        configuration.patch_size,
        _network_axes(mirrored.axes, configuration),
        masked,
        dummy_2d=asked.dummy_2d,
        degrees=asked.rotation_degrees,
    )
    own = {key: value for key, value in asked.values.items() if key not in _GEOMETRY}
    augmentation = augmentation.model_copy(update={"exchange": _exchange(mirrored, configuration), **own})
    if options.augmentation.strength == "none":
        none = {name: 0.0 for name in AugmentationSpec.model_fields if name.endswith("_probability")}
        augmentation = augmentation.model_copy(
            update={**none, "mirror_axes": (), "exchange": None, "sample_patch": configuration.patch_size}
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
    configurations: Mapping[str, Configuration],
    designs: Mapping[str, Design],
    memory_gb: float,
    hardware: Hardware | None,
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
