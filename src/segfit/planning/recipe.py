"""How a configuration is trained: the axes that are flipped, the augmentation, the recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from segfit.errors import InputError
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.labels import Exchange, LabelScheme
from segfit.options import Options
from segfit.planning.augmentation import STRENGTHS, augmentation_for
from segfit.planning.mirroring import AxisEvidence, exchanged_values, value_names
from segfit.planning.trace import Asked, Trace, as_json
from segfit.specs import AugmentationSpec, Configuration, TrainingSpec

__all__ = [
    "Flips",
    "decide_common_recipe",
    "decide_flips",
    "flips_of",
    "geometry_values",
    "patch_ratio",
    "recipe_of",
    "recipe_values",
    "scaling_of",
    "size_spread",
]

_FEWEST_SUPERVISED_STAGES = 3
_GEOMETRY = ("rotation_degrees", "dummy_2d")  # which the patch that is cut out depends on
_BY_PATCH = (*_GEOMETRY, "sample_patch", "mirror_axes", "masked_channels")
"""What of the augmentation depends on the data; the rest are nnU-Net's constants."""
_PREVIOUS = {
    "previous_operator_probability": 0.4,
    "previous_operator_label_probability": 0.5,
    "previous_radius_range": (1.0, 8.0),
    "previous_removal_probability": 0.2,
    "previous_removal_label_probability": 0.5,
    "previous_removed_share": 0.15,
}
"""What nnU-Net does in the second stage of a cascade to the labels that the first one predicted."""
_NO_INTENSITY = {*_BY_PATCH, "exchange"}  # the exchange of labels is a decision of its own
_ADAMW = {"learning_rate": 3e-4, "momentum": 0.9, "weight_decay": 5e-2}
"""What AdamW starts from where the user names it and nothing else; published for nnU-Net's transformers."""
_MEDNEXT = {"optimizer": "adamw", "learning_rate": 1e-3, "momentum": 0.9}
"""What MedNeXt was published with; weight decay stays nnU-Net's."""


_FEWEST_SIZES = 10
_WIDE_SPREAD = 2.0
_WIDE: dict[str, Any] = {"rotation_probability": 0.5, "scaling_probability": 0.5, "scaling_range": (0.6, 1.6)}
"""Where sizes differ much (docs/decisions/time-budget.md); elsewhere it costs Dice."""
_FARTHEST = 1.4  # of nnU-Net's range


@dataclass(frozen=True, slots=True)
class Flips:
    """Axes that are flipped, in array order."""

    axes: tuple[int, ...]
    exchanged: tuple[tuple[int, int], ...] = ()  # label values that change places when the last axis is flipped


def flips_of(
    fingerprint: Fingerprint, labels: LabelScheme, options: Options, asked: Asked, evidence: Sequence[AxisEvidence]
) -> Flips:
    """Return what is flipped: the axes that were set, all of them as nnU-Net does, in `auto` those of the evidence."""
    axes = asked.values.mirror_axes
    if axes is not None:
        sides_known = fingerprint.ndim == 2 or fingerprint.orientation == "canonical"
        exchanging = options.preset == "auto" and sides_known and fingerprint.ndim - 1 in axes
        return Flips(tuple(sorted(set(axes))), exchanged_values(labels) if exchanging else ())
    if options.preset != "auto":
        return Flips(tuple(range(fingerprint.ndim)))
    return Flips(tuple(item.axis for item in evidence if item.mirrored), evidence[-1].exchanged)


def decide_flips(
    fingerprint: Fingerprint, labels: LabelScheme, options: Options, asked: Asked, evidence: Sequence[AxisEvidence]
) -> Flips:
    """Return what is flipped in all configurations without axes of their own, and record it.

    `evidence` is what the cases say where that decides.
    """
    flips = flips_of(fingerprint, labels, options, asked, evidence)
    trace, names = asked.trace, "zyx"[-fingerprint.ndim :]
    augmented = options.augmentation.strength != "none"
    kept = {names[item.axis]: item.reason for item in evidence if item.reason}
    inputs: dict[str, Any] = {"array_order": ", ".join(f"{axis} is {name}" for axis, name in enumerate(names))}
    trace.decide(
        "mirror_axes",
        flips.axes if augmented else (),
        "mirror_evidence" if evidence else "mirror_all",
        "kept" if kept else "all",
        asked.option("mirror_axes"),
        "" if augmented else "augmentation.strength",
        **(inputs | {"kept_axes": kept} if kept else inputs),
    )
    if kept:
        trace.differ("mirrored", axes=[names[axis] for axis in flips.axes])
    if augmented and flips.exchanged:
        value_name = value_names(labels)
        pairs = [f"{value_name[a]} with {value_name[b]}" for a, b in flips.exchanged]
        two_sided = [name for item in evidence for name in item.two_sided]
        inputs = {"on_both_sides_in_spite_of_their_names": two_sided} if two_sided else {}
        trace.decide("exchanged_labels", pairs, "exchange", pairs=len(pairs), **inputs)
    return flips


def size_spread(fingerprint: Fingerprint) -> float | None:
    """Return how large the foreground of large cases (95 %) is to that of small ones (5 %), along an edge.

    None where fewer than `_FEWEST_SIZES` cases have any.
    """
    voxels = [sum(n for value, n in case.label_voxels.items() if value > 0) for case in fingerprint.cases]
    sizes: list[float] = sorted(
        (count * prod(case.spacing_mm)) ** (1 / fingerprint.ndim)
        for count, case in zip(voxels, fingerprint.cases, strict=True)
        if count
    )
    if len(sizes) < _FEWEST_SIZES:
        return None
    return sizes[round(0.95 * (len(sizes) - 1))] / sizes[round(0.05 * (len(sizes) - 1))]


@dataclass(frozen=True, slots=True)
class Scaling:
    """How samples are scaled, and turned, for the sizes of what is segmented."""

    rule: str
    spread: float
    values: Mapping[str, Any]  # of the augmentation


def scaling_of(spread: float | None, options: Options) -> Scaling | None:
    """Return how samples are scaled for the `size_spread` of a dataset where that is not nnU-Net's way."""
    if options.preset != "auto" or options.augmentation.strength is not None or spread is None:
        return None
    if spread >= _WIDE_SPREAD:
        return Scaling("wide_sizes", spread, _WIDE)
    if spread >= _FARTHEST:
        return None
    return Scaling("equal_sizes", spread, {"scaling_range": (round(1 / spread, 3), round(spread, 3))})


def recipe_of(
    item: Configuration, flips: Flips, scaling: Scaling | None, options: Options, asked: Asked
) -> TrainingSpec:
    """Return the recipe of one configuration, and record it."""
    augmentation = _augmentation(item, flips, options, scaling)
    plugin = item.network.plugin
    supervised = item.network.num_stages >= _FEWEST_SUPERVISED_STAGES and plugin is None
    if options.training.deep_supervision and not supervised:
        reason = f"{item.network.num_stages} stages" if plugin is None else f"the network is {plugin}, of one output"
        raise InputError(
            f"training.deep_supervision does not fit {item.name} ({reason})",
            f"it needs a U-Net of {_FEWEST_SUPERVISED_STAGES} stages or more",
        )
    published = _MEDNEXT if _is_published(item, options) else {}
    recipe = TrainingSpec(deep_supervision=supervised, augmentation=augmentation, **published)
    recipe = recipe.model_copy(update=_asked_training(options))
    seen = item.preprocessing.transpose[-item.ndim :]
    asked.note("mirror_axes", sorted(seen[axis] for axis in augmentation.mirror_axes))
    if asked.own("mirror_axes"):
        value = asked.trace.values[item.name, "mirror_axes"]
        asked.trace.decide(f"{item.name}.mirror_axes", value, "mirror_all", "all", asked.option("mirror_axes"))
    _recipe_decisions(item, recipe, options, asked.trace, scaling)
    if not recipe.deep_supervision and options.training.deep_supervision is None and plugin is None:
        asked.trace.differ("unsupervised", name=item.name, stages=item.network.num_stages)
    return recipe


def _is_published(item: Configuration, options: Options) -> bool:
    """Whether the recipe is MedNeXt's: with its blocks, and no optimiser of the user's."""
    return item.network.kind == "mednext" and item.network.plugin is None and options.training.optimizer is None


def decide_common_recipe(
    training: Mapping[str, TrainingSpec], scaling: Scaling | None, options: Options, trace: Trace
) -> None:
    """Record how the recipes differ from nnU-Net's, once for all configurations."""
    if any(recipe.augmentation.exchange is not None for recipe in training.values()):
        trace.differ("exchange")
    for group, values in (("training", _asked_training(options)), ("augmentation", options.augmentation.values)):
        for key, value in values.items():
            trace.differ("option", option=f"{group}.{key}", value=value)
    if scaling is not None:
        trace.differ(scaling.rule)
    strength = options.augmentation.strength
    if strength == "none":
        trace.differ("no_augmentation")
    elif strength in STRENGTHS:
        trace.differ("option", option="augmentation.strength", value=strength)


def _augmentation(item: Configuration, flips: Flips, options: Options, scaling: Scaling | None) -> AugmentationSpec:
    masked = [channel for channel, how in enumerate(item.preprocessing.normalization) if how.use_mask]
    asked = options.augmentation
    found = augmentation_for(
        item.patch_size,
        _network_axes(flips.axes, item),
        masked,
        dummy_2d=asked.dummy_2d,
        degrees=asked.rotation_degrees,
    )
    across = _network_axes([item.preprocessing.image_ndim - 1], item)  # none where the network does not see that axis
    exchange = Exchange(axis=across[0], pairs=flips.exchanged) if flips.exchanged and across else None
    foreign = _GEOMETRY if item.previous_stage is not None else (*_GEOMETRY, *_PREVIOUS)
    own = {key: value for key, value in asked.values.items() if key not in foreign}
    previous = {} if item.previous_stage is None else _PREVIOUS
    strength = STRENGTHS.get(asked.strength or "", {})
    sizes = scaling.values if scaling else {}
    found = found.model_copy(update={"exchange": exchange, **previous, **strength, **sizes, **own})
    if asked.strength != "none":
        return found
    none: dict[str, Any] = {name: 0.0 for name in AugmentationSpec.model_fields if name.endswith("_probability")}
    none |= {"mirror_axes": (), "exchange": None, "sample_patch": item.patch_size}
    return found.model_copy(update=none)


def _network_axes(array_axes: Iterable[int], item: Configuration) -> tuple[int, ...]:
    """Return array axes as the network counts them: transposed, without the slice axis of a 2D configuration."""
    wanted = set(array_axes)
    seen = item.preprocessing.transpose[-item.ndim :]
    return tuple(axis for axis, source in enumerate(seen) if source in wanted)


def _asked_training(options: Options) -> dict[str, Any]:
    """Return what was set of the recipe, with what AdamW needs beside it."""
    return {**(_ADAMW if options.training.optimizer == "adamw" else {}), **options.training.values}


def recipe_values(recipe: TrainingSpec) -> dict[str, Any]:
    """Return everything of the recipe but the augmentation and deep supervision, which are decisions of their own."""
    own = ("augmentation", "deep_supervision")
    return {name: value for name, value in recipe if name not in own}


def geometry_values(recipe: TrainingSpec) -> dict[str, Any]:
    """Return what of the augmentation depends on patch and data."""
    return {name: as_json(value) for name, value in recipe.augmentation if name in _BY_PATCH}


def patch_ratio(patch: Sequence[int]) -> float:
    """Return how flat a patch is, which bounds how far it may be turned: over the first axis, in 2D the shorter one."""
    return max(patch) / (min(patch) if len(patch) == 2 else patch[0])


def _supervision_bound(item: Configuration) -> str:
    if item.network.plugin is not None:
        return "plugin"
    return "stages" if item.network.num_stages >= _FEWEST_SUPERVISED_STAGES else "two_stages"


def _recipe_decisions(
    item: Configuration, recipe: TrainingSpec, options: Options, trace: Trace, scaling: Scaling | None
) -> None:
    name, patch = item.name, item.patch_size
    training, augmentation = options.training.values, options.augmentation
    changes = ["augmentation.strength"] if augmentation.strength in ("none", *STRENGTHS) else []

    def given(of_patch: bool) -> list[str]:
        return [f"augmentation.{key}" for key in augmentation.values if (key in _BY_PATCH) == of_patch]

    trace.decide(
        f"{name}.training",
        recipe_values(recipe),
        "recipe_mednext" if _is_published(item, options) else "recipe",
        "",
        *(f"training.{key}" for key in training if key != "deep_supervision"),
    )
    trace.decide(
        f"{name}.training.deep_supervision",
        recipe.deep_supervision,
        "deep_supervision",
        _supervision_bound(item),
        "training.deep_supervision" if "deep_supervision" in training else "",
        stages=item.network.num_stages,
    )
    trace.decide(
        f"{name}.augmentation",
        geometry_values(recipe),
        f"geometry_{len(patch)}d",
        "",
        *(changes if augmentation.strength == "none" else ()),
        *given(True),
        patch_size=patch,
        ratio=patch_ratio(patch),
    )
    intensities = {name: value for name, value in recipe.augmentation if name not in _NO_INTENSITY}
    key, of_values = f"{name}.augmentation.intensities", (*changes, *given(False))
    inputs = {"spread": scaling.spread} if scaling else {}
    trace.decide(key, intensities, scaling.rule if scaling else "intensities", "", *of_values, **inputs)
