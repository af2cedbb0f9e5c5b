"""From spacings, shapes and a memory budget to configurations: which there are, and every number of theirs.

The rules are nnU-Net's (2.8.1). Each takes what the user set in place of its own value, and records what it decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import log, prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from segfit.errors import InputError, nearest
from segfit.feature_maps import network_elements
from segfit.options import CONFIGURATION_NAMES, ConfigurationOptions, PlanningOptions
from segfit.planning.patch import (
    LOWRES_SHARE,
    LOWRES_STEP,
    Budget,
    Patch,
    affordable,
    batch_size,
    fit_patch,
    lower_resolution,
    nnunet_batch,
    start_volume,
)
from segfit.planning.presets import rules_of_kind
from segfit.planning.resampling import preprocessing_of
from segfit.planning.spacing import axis_order, coarse_axis, median_shape, target_spacing
from segfit.planning.topology import SMALLEST_MAP, kernels_for
from segfit.planning.trace import Asked, Trace
from segfit.specs import Configuration, NetworkSpec, Normalization
from segfit.words import by_axis

__all__ = ["Draft", "Images", "chosen", "configuration", "drafts"]

_NETWORK = ("features", "strides", "kernels", "encoder_convs", "decoder_convs")


@dataclass(frozen=True, kw_only=True)
class Images:
    """What the rules for configurations know of the cases. Array order; pictures are volumes of one thick slice."""

    spacings: NDArray[np.float64]  # (cases, 3) mm
    shapes: NDArray[np.float64]  # (cases, 3) voxels after cropping
    num_training: int  # declared number of training cases; the batch-size cap uses it
    ndim: Literal[2, 3]  # axes that the images have
    orientation: Literal["canonical", "stored"] = "stored"

    @cached_property
    def target_mm(self) -> tuple[float, ...]:
        """Target spacing by the rule."""
        return target_spacing(self.spacings, self.shapes)

    def target_of(self, values: ConfigurationOptions) -> tuple[float, ...]:
        """Return the target spacing that was set, with the thickness of a picture, or that of the rule."""
        asked = values.target_spacing_mm
        if asked is None:
            return self.target_mm
        return asked if self.ndim == 3 else (float(self.spacings[0, 0]), *asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """The images as one configuration sees them, and the patch that fits: all but its network and preprocessing.

    Axes are those the network sees, after transposition.
    """

    budget: Budget
    transpose: tuple[int, ...]  # of the three axes that the rules know
    spacing_mm: tuple[float, ...]
    median_shape: tuple[float, ...]
    dataset_voxels: float  # voxels of the whole dataset at this resolution
    patch: Patch
    coarsened: bool = False  # from the full resolution, until a patch sees enough


class _Sight:
    """How images look at the target spacing and with the order of axes that was asked for, each computed once."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self._medians: dict[tuple[float, ...], tuple[float, ...]] = {}

    def __call__(
        self, values: ConfigurationOptions, target: tuple[float, ...]
    ) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
        """Return the order of the axes, and in that order spacing in mm and median shape."""
        if target not in self._medians:
            self._medians[target] = median_shape(self.images.spacings, self.images.shapes, target)
        median = self._medians[target]
        if min(median) < 1:
            raise InputError(
                f"at a target spacing of {list(target)} mm the median image would have {list(median)} voxels; "
                "choose a finer target spacing"
            )
        order = values.transpose or axis_order(target)
        return order, tuple([target[axis] for axis in order]), tuple([median[axis] for axis in order])


def drafts(images: Images, budget: Budget, planning: PlanningOptions, trace: Trace) -> dict[str, Draft]:
    """Return a draft of every configuration that the rules or the user ask for, in the order of the plan."""
    see = _Sight(images)
    _dataset_decisions(trace, images, planning)
    _, _, median = see(planning, images.target_of(planning))

    def draft(name: str, axes: slice = slice(None)) -> Draft:
        values = planning.of(name)
        cost = _budget(budget, values)
        order, spacing, median = see(values, images.target_of(values))
        patch = fit_patch(spacing[axes], median[axes], cost, _fixed(values, order, len(spacing[axes])))
        return Draft(
            budget=cost,
            transpose=order,
            spacing_mm=spacing[axes],
            median_shape=median[axes],
            dataset_voxels=prod(median) * images.num_training,
            patch=patch,
        )

    found = {"2d": draft("2d", slice(1, None))}
    if median[0] == 1:
        return found
    full = draft("3d_fullres")
    own = planning.by_configuration.get("3d_lowres")
    if own is not None and own.target_spacing_mm is not None:
        lowres: Draft | None = draft("3d_lowres")
    else:
        lowres = _coarsened(images, see, budget, planning, full)
    if lowres is None:
        return found | {"3d_fullres": full}
    same = planning.of("3d_cascade_fullres") == planning.of("3d_fullres")
    cascade = full if same else draft("3d_cascade_fullres")
    return found | {"3d_lowres": lowres, "3d_fullres": full, "3d_cascade_fullres": cascade}


def _budget(budget: Budget, values: ConfigurationOptions) -> Budget:
    rules = budget.rules if values.kind is None else rules_of_kind(budget.rules, values.kind)
    if values.base_features is not None:
        rules = replace(rules, base_features=values.base_features)
    return budget if rules is budget.rules else replace(budget, rules=rules)


def _fixed(values: ConfigurationOptions, order: tuple[int, ...], ndim: int) -> tuple[int, ...] | None:
    """Return the patch that was set for so many axes, as the network sees it; a plane's axes keep their order."""
    patch = values.patch_size
    if patch is None or len(patch) != ndim:
        return None
    return tuple([patch[axis] for axis in order]) if ndim == 3 else patch


def _coarsened(images: Images, see: _Sight, budget: Budget, planning: PlanningOptions, full: Draft) -> Draft | None:
    """Return the lower resolution that the full one calls for: its target spacing, coarsened."""
    values = planning.of("3d_lowres")
    target = tuple([full.spacing_mm[full.transpose.index(axis)] for axis in range(3)])
    order, spacing, median = see(values, target)
    cost = _budget(budget, values)
    found = lower_resolution(spacing, median, prod(full.patch.size), cost, _fixed(values, order, 3))
    if found is None:
        return None
    return Draft(
        budget=cost,
        transpose=order,
        spacing_mm=found.spacing_mm,
        median_shape=found.median_shape,
        dataset_voxels=found.voxels * images.num_training,
        patch=found.patch,
        coarsened=True,
    )


def _dataset_decisions(trace: Trace, images: Images, planning: PlanningOptions) -> None:
    """Record the target spacing and the order of axes of the configurations without values of their own."""
    ndim = images.ndim
    target = images.target_of(planning)
    spacings, shapes = images.spacings[:, -ndim:], images.shapes[:, -ndim:]
    median_mm, median = np.median(spacings, axis=0).tolist(), np.median(shapes, axis=0).tolist()
    inputs: dict[str, Any] = {
        "cases": len(spacings),
        "median_mm": median_mm,
        "finest_mm": spacings.min(axis=0).tolist(),
        "coarsest_mm": spacings.max(axis=0).tolist(),
        "median_shape_after_crop": median,
    }
    bound, coarse = "median", coarse_axis(median_mm, median) if ndim == 3 else None
    if coarse is not None:
        percentile = float(np.percentile(spacings[:, coarse], 10))
        inputs |= {"percentile_10_mm": percentile, "coarse_axis": "zyx"[coarse]}
        bound = "capped_percentile" if images.target_mm[coarse] > percentile else "percentile"
    option = "planning.target_spacing_mm" if planning.target_spacing_mm is not None else ""
    trace.decide("target_spacing_mm", target[-ndim:], f"target_spacing_{ndim}d", bound, option, **inputs)
    if ndim == 3:
        largest = max(target)
        coarsest = ["zyx"[axis] for axis, mm in enumerate(target) if mm == largest]
        order = planning.transpose or axis_order(target)
        option = "planning.transpose" if planning.transpose is not None else ""
        bound = "coarsest" if len(coarsest) == 1 else "first"
        trace.decide("transpose", order, "transpose", bound, option, target_spacing_mm=target, coarsest_axes=coarsest)


def chosen(drafted: Mapping[str, Draft], ndim: int, planning: PlanningOptions, trace: Trace) -> dict[str, Draft]:
    """Return the drafts that are planned: those that were asked for and can be trained, in the order of the plan."""
    too_small = {name: _too_small(item) for name, item in drafted.items() if len(item.patch.topology.strides) == 1}
    usable = {name: item for name, item in drafted.items() if name not in too_small}
    if not usable:
        raise InputError(f"there is nothing to train: {'; '.join(dict.fromkeys(too_small.values()))}")
    found, asked = usable, planning.configurations
    if asked is not None:
        _check_names(asked, usable)
        previous = {"3d_lowres" for name in asked if name == "3d_cascade_fullres"}
        found = {name: item for name, item in usable.items() if name in {*asked, *previous}}
    for name, own in planning.by_configuration.items():
        if name not in found and own != ConfigurationOptions():
            hint = "; planning.3d_lowres.target_spacing_mm adds one" if name in CONFIGURATION_NAMES[1::2] else ""
            raise InputError(
                f"planning.{name} has values, but this plan has no configuration {name}, only {', '.join(found)}{hint}"
            )
    inputs: dict[str, Any] = (
        {"left_out": [f"{name} is left out: {why}" for name, why in too_small.items()]} if too_small else {}
    )
    option = "planning.configurations" if asked is not None else ""
    inputs |= _share(drafted)
    trace.decide("configurations", sorted(found), *_why_these(drafted, ndim), option, axes=ndim, **inputs)
    if asked is not None:
        trace.differ("configurations", names=list(found))
    return found


def _check_names(asked: Iterable[str], usable: Mapping[str, Draft]) -> None:
    for name in asked:
        if name not in CONFIGURATION_NAMES:
            raise InputError(f"unknown configuration {name!r}{nearest(name, CONFIGURATION_NAMES)}")
        if name not in usable:
            raise InputError(f"this dataset has no configuration {name}; the rules give {', '.join(usable)}")
    if not asked:
        raise InputError(f"planning.configurations is empty; the rules give {', '.join(usable)}")


def _share(drafted: Mapping[str, Draft]) -> dict[str, Any]:
    """Return how much of the median image a patch of 3d_fullres sees; nothing where there is none."""
    full = drafted.get("3d_fullres")
    if full is None:
        return {}
    share = prod(full.patch.size) / prod(full.median_shape)
    return {
        "patch_size": full.patch.size,
        "median_shape": full.median_shape,
        "patch_share_of_median_image": share,
    }


def _why_these(drafted: Mapping[str, Draft], ndim: int) -> tuple[str, str]:
    """Return the rule for the configurations of a dataset and its bound."""
    if "3d_fullres" not in drafted:
        return "configurations_2d", "pictures" if ndim == 2 else "one_slice"
    lowres = drafted.get("3d_lowres")
    if lowres is not None:
        return "configurations_3d", "lowres_added" if lowres.coarsened else "lowres_set"
    sees = _share(drafted)["patch_share_of_median_image"]
    return "configurations_3d", "lowres_close" if sees < LOWRES_SHARE else "sees_enough"


def _too_small(this: Draft) -> str:
    """Say why a patch leaves nothing to halve."""
    patch = by_axis(this.patch.size)
    if this.patch.bound == "memory":
        return f"{this.budget.memory_gb:g} GB leave a patch of {patch} voxels, too small for a network; raise --memory"
    if this.patch.bound == "fixed":
        return f"the patch of {patch} voxels that was asked for is too small for a network; one axis needs 8 or more"
    size = by_axis(this.median_shape)
    axes = zip(this.spacing_mm, this.patch.size, strict=True)
    long_enough = [(spacing, voxels) for spacing, voxels in axes if voxels >= 2 * SMALLEST_MAP]
    if long_enough:  # and yet nothing was halved
        spacing, voxels = min(long_enough)
        return (
            f"the images have {size} voxels, too few for a network: the axis to be halved first, the finest with "
            f"{spacing:g} mm, has {voxels} of the {3 * SMALLEST_MAP} it needs; set a coarser planning.target_spacing_mm"
        )
    return f"the images have {size} voxels, too few for a network; at least one axis needs {2 * SMALLEST_MAP} or more"


def configuration(
    name: str,
    drafted: Mapping[str, Draft],
    images: Images,
    asked: Asked,
    *,
    normalization: tuple[Normalization, ...],
    in_channels: int,
    num_outputs: int,
    next_stage: str | None = None,
) -> Configuration:
    """Return a configuration of the plan, made of its draft and of what was set.

    `drafted` are all that the rules ask for, whether they are planned or not. Raises `InputError` for values that do
    not go together.
    """
    this, trace = drafted[name], asked.trace
    _resolution(name, this, drafted, images, asked)
    network = _network(name, this, asked, in_channels, num_outputs)
    patch = _patch(name, this, asked, network)
    changed = patch != this.patch.size or any(getattr(asked.values, leaf) is not None for leaf in _NETWORK)
    estimate = network_elements(network, patch, this.budget.heads) if changed else this.patch.estimate
    batch = _batch(name, this, asked, patch, estimate)
    _estimate(trace, name, this, estimate)
    _network_decisions(name, this, asked, network)
    preprocessing = preprocessing_of(
        images.ndim, images.orientation, this.transpose, this.spacing_mm, normalization, asked
    )
    pooled = name == "2d" or (name != "3d_lowres" and "3d_lowres" in drafted)
    rule = "dice_2d" if name == "2d" else "dice_lowres" if name == "3d_lowres" else "dice_3d"
    bound = "" if rule != "dice_3d" else "lowres" if pooled else "no_lowres"
    cascade = name == "3d_cascade_fullres"
    return Configuration(
        name=name,
        ndim=network.ndim,
        patch_size=patch,
        batch_size=batch,
        spacing_mm=this.spacing_mm,
        median_shape=this.median_shape,
        batch_dice=trace.decide(
            f"{name}.batch_dice", asked("batch_dice", pooled), rule, bound, asked.option("batch_dice")
        ),
        preprocessing=preprocessing,
        network=network,
        memory_estimate=estimate,
        previous_stage="3d_lowres" if cascade else None,
        next_stage=next_stage,
    )


def _resolution(name: str, this: Draft, drafted: Mapping[str, Draft], images: Images, asked: Asked) -> None:
    """Record the spacing, the median shape and, where it is its own, the order of axes."""
    trace, spacing = asked.trace, this.spacing_mm
    asked.note("target_spacing_mm", spacing)
    asked.note("transpose", this.transpose if images.ndim == 3 else (0, 1))
    if asked.own("transpose"):
        trace.decide(f"{name}.transpose", this.transpose, "transpose", "", asked.option("transpose"))
    if not this.coarsened:
        option = asked.option("target_spacing_mm")
        trace.decide(f"{name}.spacing_mm", spacing, "spacing", "", option, transpose=this.transpose)
        trace.decide(
            f"{name}.median_shape", this.median_shape, "median_shape", cases=len(images.shapes), spacing_mm=spacing
        )
        return
    full = drafted["3d_fullres"]  # the two may see the axes in another order
    order = [full.transpose.index(axis) for axis in this.transpose]
    full_mm, full_shape = [full.spacing_mm[axis] for axis in order], [full.median_shape[axis] for axis in order]
    ratio = [low / mm for low, mm in zip(spacing, full_mm, strict=True)]
    size = [n / r for n, r in zip(full_shape, ratio, strict=True)]
    trace.decide(
        f"{name}.spacing_mm",
        spacing,
        "spacing_lowres",
        target_spacing_mm=full_mm,
        steps=max(round(log(r) / log(LOWRES_STEP)) for r in ratio),
        patch_share_of_median_image=prod(this.patch.size) / prod(size),
    )
    trace.decide(
        f"{name}.median_shape",
        this.median_shape,
        "median_shape_lowres",
        fullres_median_shape=full_shape,
        fullres_spacing_mm=full_mm,
        spacing_mm=spacing,
    )


def _patch(name: str, this: Draft, asked: Asked, network: NetworkSpec) -> tuple[int, ...]:
    """Return the patch as a multiple of the strides: that which was set, if both were."""
    divisor, patch = network.divisor, this.patch.size
    fixed = _fixed(asked.values, this.transpose, network.ndim)
    if fixed is not None and asked.values.strides is not None:
        patch = fixed
        if any(size % d for size, d in zip(patch, divisor, strict=True)):
            raise InputError(
                f"{asked.key('patch_size')} is {by_axis(patch)} as the network sees it, which {asked.key('strides')} "
                f"does not divide; give multiples of {by_axis(divisor)}"
            )
    patch = tuple([-(-size // d) * d for size, d in zip(patch, divisor, strict=True)])
    if prod(size // d for size, d in zip(patch, divisor, strict=True)) < 2 and network.num_stages > 1:
        raise InputError(
            f"{asked.key('strides')} leaves one voxel of the patch {by_axis(patch)} at the lowest resolution, where "
            f"nothing can be normalised; set fewer strides, or a larger {asked.key('patch_size')}"
        )
    rounded = f" ({by_axis(fixed)} rounded up to multiples of {by_axis(divisor)})" if fixed not in (None, patch) else ""
    return asked.trace.decide(
        f"{name}.patch_size",
        asked.note("patch_size", patch, rounded),
        f"patch_size_{network.ndim}d",
        this.patch.bound if patch == this.patch.size else f"{this.patch.bound}_strides",
        asked.option("patch_size") if fixed else "",
        start=this.patch.start,
        start_volume=start_volume(this.spacing_mm),
        median_shape=this.median_shape,
        memory_gb=this.budget.memory_gb,
        multiples_of=divisor,
    )


def _estimate(trace: Trace, name: str, this: Draft, estimate: int) -> None:
    budget, ndim = this.budget, len(this.spacing_mm)
    trace.decide(
        f"{name}.memory_estimate",
        estimate,
        "memory_estimate",
        "two_samples" if ndim == 2 and budget.rules.kind == "plain" else "",
        budget_per_sample=budget.elements(ndim),
        samples_of_the_budget=nnunet_batch(ndim),
        memory_gb=budget.memory_gb,
        declared_labels=budget.heads,
    )


def _batch(name: str, this: Draft, asked: Asked, patch: tuple[int, ...], estimate: int) -> int:
    batch, bound = batch_size(patch, estimate, this.dataset_voxels, this.budget)
    memory, covering = affordable(patch, estimate, this.dataset_voxels, this.budget)
    return asked.trace.decide(
        f"{name}.batch_size",
        asked("batch_size", batch),
        "batch_size",
        bound,
        asked.option("batch_size"),
        memory_allows=memory,
        coverage_allows=covering,
        coverage=this.budget.rules.coverage,
        dataset_voxels=this.dataset_voxels,
        memory_estimate=estimate,
        memory_gb=this.budget.memory_gb,
    )


def _network(name: str, this: Draft, asked: Asked, in_channels: int, num_outputs: int) -> NetworkSpec:
    """Return the network: what was set of it, and what the rules give for the rest."""
    values, rules = asked.values, this.budget.rules
    wanted = {leaf: value for leaf in _NETWORK if (value := getattr(values, leaf)) is not None}
    by_rule, ndim = this.patch.topology, len(this.spacing_mm)
    try:
        if wanted:
            _check_network(wanted, asked, ndim)
        strides = values.strides or by_rule.strides
        stages = len(strides)
        encoder_convs, decoder_convs = rules.convs(stages)
        network = NetworkSpec(
            kind=rules.kind,
            ndim=2 if ndim == 2 else 3,
            in_channels=in_channels,
            num_outputs=num_outputs,
            strides=strides,
            features=values.features or rules.features(ndim, stages),
            kernels=values.kernels
            or (by_rule.kernels if values.strides is None else kernels_for(this.spacing_mm, strides)),
            encoder_convs=encoder_convs if values.encoder_convs is None else values.encoder_convs,
            decoder_convs=decoder_convs if values.decoder_convs is None else values.decoder_convs,
        )
    except ValueError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ") if isinstance(error, ValidationError) else error
        leaf = next(iter(wanted)) if len(wanted) == 1 else "VALUE"
        raise InputError(
            f"{', '.join(asked.key(leaf) for leaf in wanted)} does not fit {name} ({ndim}D, "
            f"{len(values.strides or by_rule.strides)} stages): {reason}. To set it for this configuration only use "
            f"planning.{name}.{leaf}"
        ) from None
    return network


def _check_network(wanted: Mapping[str, Any], asked: Asked, ndim: int) -> None:
    """Refuse numbers that no network has: `InputError` for two options that differ, `ValueError` for the rest."""
    base, features = asked.values.base_features, asked.values.features
    if features and base not in (None, features[0]):
        raise InputError(
            f"{asked.key('base_features')} is {base}, but {asked.key('features')} starts with {features[0]}; set one "
            "of them"
        )
    rows = [entry if isinstance(entry, tuple) else (entry,) for value in wanted.values() for entry in value]
    if any(number < 1 for row in rows for number in row):
        raise ValueError("all numbers must be 1 or more")
    if any(number % 2 == 0 for kernel in wanted.get("kernels", ()) for number in kernel):
        raise ValueError("kernels must be odd")
    strides = wanted.get("strides")
    if strides is None:
        return
    if any(number != 1 for number in strides[0]):
        raise ValueError("the first stride must be 1 along every axis")
    if len(strides) < 2 or any(len(stride) != ndim for stride in strides):
        raise ValueError("strides need two stages or more, and one entry per axis in each")


def _network_decisions(name: str, this: Draft, asked: Asked, network: NetworkSpec) -> None:
    rules, stages, residual = this.budget.rules, network.num_stages, network.kind == "residual"
    asked.note("base_features", network.features[0])
    for leaf in ("kind", *_NETWORK):
        asked.note(leaf, getattr(network, leaf))

    def decide(leaf: str, rule: str, bound: str = "", *others: str, **inputs: Any) -> None:
        options = [asked.option(one) for one in (*others, leaf)]
        asked.trace.decide(f"{name}.network.{leaf}", getattr(network, leaf), rule, bound, *options, **inputs)

    decide("kind", "kind", planner=rules.planner)
    decide("strides", "strides", **stride_inputs(this.spacing_mm, this.patch.size, network))
    flat = sum(1 in kernel for kernel in network.kernels)
    spacing = this.spacing_mm
    decide("kernels", "kernels", "coarse" if flat else "even", spacing_mm=spacing, strides=network.strides, flat=flat)
    cap = rules.max_features_2d if network.ndim == 2 else rules.max_features_3d
    bound = "cap" if network.features[-1] == cap else "stages"
    decide("features", "features", bound, "base_features", base_features=rules.base_features, cap=cap, stages=stages)
    blocks: dict[str, Any] = {"blocks": rules.encoder_convs} if residual else {}
    decide("encoder_convs", f"encoder_{network.kind}", stages=stages, **blocks)
    decide("decoder_convs", f"decoder_{network.kind}", stages=stages)


def stride_inputs(spacing: tuple[float, ...], patch: tuple[int, ...], network: NetworkSpec) -> dict[str, Any]:
    """Return what the strides depend on, and what they leave of the patch."""
    lowest = [n // d for n, d in zip(patch, network.divisor, strict=True)]
    return {"spacing_mm": spacing, "patch_size": patch, "lowest_resolution_shape": lowest}
