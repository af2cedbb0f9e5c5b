"""Which configurations there are: the images as each would see them, and the patch that fits.

The rules are nnU-Net's (2.8.1), evaluated in its order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from segfit.errors import InputError, nearest
from segfit.options import CASCADE, CONFIGURATION_NAMES, ConfigurationOptions, PlanningOptions
from segfit.planning.patch import LOWRES_SHARE, MemoryBudget, Patch, fit_patch, lower_resolution
from segfit.planning.presets import rules_of_kind
from segfit.planning.spacing import axis_order, coarse_axis, median_shape, target_spacing
from segfit.planning.topology import SMALLEST_MAP
from segfit.planning.trace import Asked, Trace
from segfit.text import by_axis

__all__ = ["Draft", "Images", "chosen", "drafts", "fixed_patch"]


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

    def median_at(self, target: tuple[float, ...]) -> tuple[float, ...]:
        """Return the median shape at a target spacing; `InputError` where nothing would be left."""
        if target not in self._medians:
            self._medians[target] = median_shape(self.spacings, self.shapes, target)
        median = self._medians[target]
        if min(median) < 1:
            raise InputError(
                f"at a target spacing of {list(target)} the median image would have {list(median)} voxels",
                "choose a finer target spacing",
            )
        return median

    @cached_property
    def _medians(self) -> dict[tuple[float, ...], tuple[float, ...]]:
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """The images as one configuration sees them, and the patch that fits: all but its network and preprocessing.

    Axes are those the network sees, after transposition.
    """

    budget: MemoryBudget
    transpose: tuple[int, ...]  # of the three axes that the rules know
    spacing_mm: tuple[float, ...]
    median_shape: tuple[float, ...]
    dataset_voxels: float  # voxels of the whole dataset at this resolution
    patch: Patch
    coarsened: bool = False  # from the full resolution, until a patch sees enough


def drafts(images: Images, budget: MemoryBudget, planning: PlanningOptions, trace: Trace) -> dict[str, Draft]:
    """Return a draft of every configuration that the rules or the user ask for, in the order of the plan."""
    _dataset_decisions(trace, images, planning)

    def draft(name: str, axes: slice = slice(None)) -> Draft:
        values = planning.of(name)
        cost = _budget(budget, values)
        target = images.target_of(values)
        order = values.transpose or axis_order(target)
        spacing, median = _ordered(target, order), _ordered(images.median_at(target), order)
        patch = fit_patch(spacing[axes], median[axes], cost, fixed_patch(values, order, len(spacing[axes])))
        return Draft(
            budget=cost,
            transpose=order,
            spacing_mm=spacing[axes],
            median_shape=median[axes],
            dataset_voxels=prod(median) * images.num_training,
            patch=patch,
        )

    found = {"2d": draft("2d", slice(1, None))}
    target = images.target_of(planning)
    if images.median_at(target)[(planning.transpose or axis_order(target))[0]] == 1:
        return found
    full = draft("3d_fullres")
    own = planning.by_configuration.get("3d_lowres")
    if own is not None and own.target_spacing_mm is not None:
        lowres: Draft | None = draft("3d_lowres")
    else:
        lowres = _coarsened(images, budget, planning, full)
    if lowres is None:
        return found | {"3d_fullres": full}
    same = planning.of(CASCADE) == planning.of("3d_fullres")
    cascade = full if same else draft(CASCADE)
    return found | {"3d_lowres": lowres, "3d_fullres": full, CASCADE: cascade}


def _ordered(values: tuple[float, ...], order: tuple[int, ...]) -> tuple[float, ...]:
    return tuple([values[axis] for axis in order])


def _budget(budget: MemoryBudget, values: ConfigurationOptions) -> MemoryBudget:
    rules = budget.rules if values.kind is None else rules_of_kind(budget.rules, values.kind)
    if values.base_features is not None:
        rules = replace(rules, base_features=values.base_features)
    if values.expansion is not None:
        rules = replace(rules, expansion=values.expansion)
    return budget if rules is budget.rules else replace(budget, rules=rules)


def fixed_patch(values: ConfigurationOptions, order: tuple[int, ...], ndim: int) -> tuple[int, ...] | None:
    """Return the patch that was set for so many axes, as the network sees it; a plane's axes keep their order."""
    patch = values.patch_size
    if patch is None or len(patch) != ndim:
        return None
    return tuple([patch[axis] for axis in order]) if ndim == 3 else patch


def _coarsened(images: Images, budget: MemoryBudget, planning: PlanningOptions, full: Draft) -> Draft | None:
    """Return the lower resolution that the full one calls for: its target spacing, coarsened."""
    values = planning.of("3d_lowres")
    target = tuple([full.spacing_mm[full.transpose.index(axis)] for axis in range(3)])
    order = values.transpose or axis_order(target)
    spacing, median = _ordered(target, order), _ordered(images.median_at(target), order)
    cost = _budget(budget, values)
    found = lower_resolution(spacing, median, prod(full.patch.size), cost, fixed_patch(values, order, 3))
    if found is None:
        return None
    spacing, median, voxels, patch = found
    return Draft(
        budget=cost,
        transpose=order,
        spacing_mm=spacing,
        median_shape=median,
        dataset_voxels=voxels * images.num_training,
        patch=patch,
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
    asked = Asked(planning, trace)
    rule, option = f"target_spacing_{ndim}d", asked.option("target_spacing_mm")
    trace.decide("target_spacing_mm", target[-ndim:], rule, bound, option, **inputs)
    if ndim == 3:
        coarsest = ["zyx"[axis] for axis, mm in enumerate(target) if mm == max(target)]
        order, option = planning.transpose or axis_order(target), asked.option("transpose")
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
        previous = {"3d_lowres" for name in asked if name == CASCADE}
        found = {name: item for name, item in usable.items() if name in {*asked, *previous}}
    for name, own in planning.by_configuration.items():
        if name not in found and own != ConfigurationOptions():
            hint = "; planning.3d_lowres.target_spacing_mm adds one" if name in CONFIGURATION_NAMES[1::2] else ""
            raise InputError(
                f"planning.{name} has values, but this plan has no configuration {name}, only {', '.join(found)}{hint}"
            )
    inputs: dict[str, Any] = {}
    if too_small:
        inputs["left_out"] = [f"{name} is left out: {why}" for name, why in too_small.items()]
    rule, bound = "configurations_2d", "pictures" if ndim == 2 else "one_slice"
    full, lowres = drafted.get("3d_fullres"), drafted.get("3d_lowres")
    if full is not None:
        share = prod(full.patch.size) / prod(full.median_shape)
        inputs |= {"patch_size": full.patch.size, "median_shape": full.median_shape}
        inputs["patch_share_of_median_image"] = share
        rule, bound = "configurations_3d", "lowres_close" if share < LOWRES_SHARE else "sees_enough"
        if lowres is not None:
            bound = "lowres_added" if lowres.coarsened else "lowres_set"
    option = "planning.configurations" if asked is not None else ""
    trace.decide("configurations", sorted(found), rule, bound, option, axes=ndim, **inputs)
    if asked is not None:
        trace.differ("configurations", names=list(found))
    return found


def _check_names(asked: Iterable[str], usable: Mapping[str, Draft]) -> None:
    for name in asked:
        if name not in CONFIGURATION_NAMES:
            raise InputError(f"unknown configuration {name!r}{nearest(name, CONFIGURATION_NAMES)}")
        if name not in usable:
            raise InputError(f"this dataset has no configuration {name}", f"the rules give {', '.join(usable)}")
    if not asked:
        raise InputError("planning.configurations is empty", f"the rules give {', '.join(usable)}")


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
            f"spacing {spacing:g}, has {voxels} of the {3 * SMALLEST_MAP} it needs; "
            "set a coarser planning.target_spacing_mm"
        )
    return f"the images have {size} voxels, too few for a network; at least one axis needs {2 * SMALLEST_MAP} or more"
