"""Every number of a configuration: its patch, batch, network, memory and how cases are prepared for it.

The rules are nnU-Net's (2.8.1). Each takes what the user set in place of its own value, and records what it decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log, prod
from typing import Any

from pydantic import ValidationError

from segfit.errors import InputError
from segfit.feature_maps import network_elements
from segfit.options import CASCADE
from segfit.planning.drafts import Draft, Images, fixed_patch
from segfit.planning.patch import LOWRES_STEP, affordable, batch_size, nnunet_batch, start_volume
from segfit.planning.resampling import preprocessing_of
from segfit.planning.topology import kernels_for
from segfit.planning.trace import Asked
from segfit.specs import Configuration, NetworkSpec, Normalization
from segfit.text import by_axis

__all__ = ["configuration", "stride_inputs"]

_NETWORK = ("features", "strides", "kernels", "encoder_convs", "decoder_convs")


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
    budget = this.budget
    estimate = network_elements(network, patch, budget.heads) if changed else this.patch.estimate
    batch = _batch(name, this, asked, patch, estimate)
    trace.decide(
        f"{name}.memory_estimate",
        estimate,
        "memory_estimate",
        "two_samples" if network.ndim == 2 and network.kind == "plain" else "",
        budget_per_sample=budget.elements(network.ndim),
        samples_of_the_budget=nnunet_batch(network.ndim),
        memory_gb=budget.memory_gb,
        declared_labels=budget.heads,
    )
    _network_decisions(name, this, asked, network)
    preprocessing = preprocessing_of(
        images.ndim, images.orientation, this.transpose, this.spacing_mm, normalization, asked
    )
    pooled = name == "2d" or (name != "3d_lowres" and "3d_lowres" in drafted)
    rule = "dice_2d" if name == "2d" else "dice_lowres" if name == "3d_lowres" else "dice_3d"
    bound = "" if rule != "dice_3d" else "lowres" if pooled else "no_lowres"
    cascade = name == CASCADE
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
    fixed = fixed_patch(asked.values, this.transpose, network.ndim)
    if fixed is not None and asked.values.strides is not None:
        patch = fixed
        if any(size % d for size, d in zip(patch, divisor, strict=True)):
            raise InputError(
                f"{asked.key('patch_size')} is {by_axis(patch)} as the network sees it, which {asked.key('strides')} "
                f"does not divide",
                f"give multiples of {by_axis(divisor)}",
            )
    patch = tuple([-(-size // d) * d for size, d in zip(patch, divisor, strict=True)])
    if prod(size // d for size, d in zip(patch, divisor, strict=True)) < 2 and network.num_stages > 1:
        raise InputError(
            f"{asked.key('strides')} leaves one voxel of the patch {by_axis(patch)} at the lowest resolution, where "
            f"nothing can be normalised",
            f"set fewer strides, or a larger {asked.key('patch_size')}",
        )
    rounded = f" ({by_axis(fixed)} rounded up to multiples of {by_axis(divisor)})" if fixed not in (None, patch) else ""
    rounded_up: dict[str, Any] = {}
    if patch != this.patch.size:
        rounded_up["before_rounding_up_to_a_multiple_of_your_strides"] = this.patch.size
    return asked.trace.decide(
        f"{name}.patch_size",
        asked.note("patch_size", patch, rounded),
        f"patch_size_{network.ndim}d",
        this.patch.bound,
        asked.option("patch_size") if fixed else "",
        start=this.patch.start,
        start_volume=start_volume(this.spacing_mm),
        median_shape=this.median_shape,
        memory_gb=this.budget.memory_gb,
        multiples_of=divisor,
        **rounded_up,
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
        encoder_convs, decoder_convs = rules.convs(len(strides))
        layers = {
            "strides": strides,
            "features": rules.features(ndim, len(strides)),
            "kernels": by_rule.kernels if values.strides is None else kernels_for(this.spacing_mm, strides),
            "encoder_convs": encoder_convs,
            "decoder_convs": decoder_convs,
        }
        return NetworkSpec(
            kind=rules.kind,
            norm=values.norm or "instance",
            plugin=values.network,
            ndim=2 if ndim == 2 else 3,
            in_channels=in_channels,
            num_outputs=num_outputs,
            expansion=rules.expansion,
            **(layers | wanted),
        )
    except ValueError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ") if isinstance(error, ValidationError) else error
        leaf = next(iter(wanted)) if len(wanted) == 1 else "VALUE"
        raise InputError(
            f"{', '.join(asked.key(leaf) for leaf in wanted)} does not fit {name} ({ndim}D, "
            f"{len(values.strides or by_rule.strides)} stages): {reason}. To set it for this configuration only use "
            f"planning.{name}.{leaf}"
        ) from None


def _check_network(wanted: Mapping[str, Any], asked: Asked, ndim: int) -> None:
    """Refuse numbers that no network has: `InputError` for two options that differ, `ValueError` for the rest."""
    base, features = asked.values.base_features, asked.values.features
    if features and base not in (None, features[0]):
        raise InputError(
            f"{asked.key('base_features')} is {base}, but {asked.key('features')} starts with {features[0]}",
            "set one of them",
        )
    rows = [entry if isinstance(entry, tuple) else (entry,) for value in wanted.values() for entry in value]
    if any(number < 1 for row in rows for number in row):
        raise ValueError("all numbers must be 1 or more")
    if any(number % 2 == 0 for kernel in wanted.get("kernels", ()) for number in kernel):
        raise ValueError("kernels must be odd")
    strides = wanted.get("strides")
    if strides is None:
        return
    if strides and any(number != 1 for number in strides[0]):
        raise ValueError("the first stride must be 1 along every axis")
    if len(strides) < 2 or any(len(stride) != ndim for stride in strides):
        raise ValueError("strides need two stages or more, and one entry per axis in each")


def _network_decisions(name: str, this: Draft, asked: Asked, network: NetworkSpec) -> None:
    rules, stages = this.budget.rules, network.num_stages
    asked.note("base_features", network.features[0])
    asked.note("network", network.plugin)
    for leaf in ("kind", "norm", *_NETWORK):
        asked.note(leaf, getattr(network, leaf))

    def decide(leaf: str, rule: str, bound: str = "", *others: str, **inputs: Any) -> None:
        options = [asked.option(one) for one in (*others, leaf)]
        asked.trace.decide(f"{name}.network.{leaf}", getattr(network, leaf), rule, bound, *options, **inputs)

    decide("kind", "kind", planner=rules.planner)
    decide("norm", "norm", planner=rules.planner)
    option, key = asked.option("network"), f"{name}.network.plugin"
    asked.trace.decide(key, network.plugin, "plugin", "", option, planner=rules.planner)
    decide("strides", "strides", **stride_inputs(this.spacing_mm, this.patch.size, network))
    flat = sum(1 in kernel for kernel in network.kernels)
    spacing = this.spacing_mm
    decide("kernels", "kernels", "coarse" if flat else "even", spacing_mm=spacing, strides=network.strides, flat=flat)
    cap = rules.max_features_2d if network.ndim == 2 else rules.max_features_3d
    bound = "cap" if network.features[-1] == cap else "stages"
    decide("features", "features", bound, "base_features", base_features=rules.base_features, cap=cap, stages=stages)
    blocks: dict[str, Any] = {"blocks": rules.encoder_convs} if network.kind == "residual" else {}
    decide("encoder_convs", f"encoder_{network.kind}", stages=stages, **blocks)
    decide("decoder_convs", f"decoder_{network.kind}", stages=stages)
    if network.kind == "mednext":
        asked.note("expansion", network.expansion)
        decide("expansion", "expansion")


def stride_inputs(spacing: tuple[float, ...], patch: tuple[int, ...], network: NetworkSpec) -> dict[str, Any]:
    """Return what the strides depend on, and what they leave of the patch."""
    lowest = [n // d for n, d in zip(patch, network.divisor, strict=True)]
    return {"spacing_mm": spacing, "patch_size": patch, "lowest_resolution_shape": lowest}
