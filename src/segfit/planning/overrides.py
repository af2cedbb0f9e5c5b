"""Values that the user set: put into a configuration in place of the derived ones.

Patch, spacing, order of axes, kind and width of the network are already set when a configuration is designed; here
follow the rest, and what depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from pydantic import ValidationError

from segfit.errors import InputError
from segfit.feature_maps import network_elements
from segfit.options import ConfigurationOptions, PlanningOptions, ResamplingOptions, StatisticsOptions
from segfit.planning.design import Design, batch_size
from segfit.planning.reasons import by_axis
from segfit.planning.topology import kernels_for
from segfit.specs import Configuration, NetworkSpec, Normalization, PreprocessingSpec, ResamplingSpec

__all__ = ["option_key", "overridden"]

_NETWORK = ("features", "strides", "kernels", "encoder_convs", "decoder_convs")
_RESAMPLED = ("resample_image", "resample_label", "resample_scores")


def option_key(asked: PlanningOptions, name: str, leaf: str) -> str:
    """Return the option that sets a value (a dotted name, like ``resample_image.order``) of a configuration."""
    for owner in (name, "3d_fullres") if name == "3d_cascade_fullres" else (name,):
        value: Any = next((item for key, item in asked.by_configuration.items() if key == owner), None)
        for part in leaf.split("."):
            value = getattr(value, part, None)
        if value is not None:
            return f"planning.{owner}.{leaf}"
    return f"planning.{leaf}"


def overridden(item: Configuration, planning: PlanningOptions, this: Design) -> Configuration:
    """Return the configuration with what was asked for, and all that follows from it: patch, batch, memory estimate.

    A derived patch is rounded up to what other strides divide. Raises `InputError` for values that do not go together.
    """
    asked = planning.of(item.name)
    network = _network(item, asked, planning, this)
    patch = _patch(item, asked, planning, network)
    estimate, batch = item.memory_estimate, item.batch_size
    if network != item.network or patch != item.patch_size:
        estimate = network_elements(network, patch, this.budget.heads)
        batch, _ = batch_size(patch, estimate, this.dataset_voxels, this.budget)
    return item.model_copy(
        update={
            "network": network,
            "patch_size": patch,
            "memory_estimate": estimate,
            "batch_size": asked.batch_size or batch,
            "batch_dice": item.batch_dice if asked.batch_dice is None else asked.batch_dice,
            "preprocessing": _preprocessing(item, asked, planning),
        }
    )


def _network(item: Configuration, asked: ConfigurationOptions, planning: PlanningOptions, this: Design) -> NetworkSpec:
    wanted: dict[str, Any] = {name: value for name in _NETWORK if (value := getattr(asked, name)) is not None}
    keys = ", ".join(option_key(planning, item.name, name) for name in wanted)
    numbers = [
        number
        for value in wanted.values()
        for entry in value
        for number in (entry if isinstance(entry, tuple) else (entry,))
    ]
    if asked.features and asked.base_features not in (None, asked.features[0]):
        raise InputError(
            f"{option_key(planning, item.name, 'base_features')} is {asked.base_features}, but "
            f"{option_key(planning, item.name, 'features')} starts with {asked.features[0]}; set one of them"
        )
    try:
        if any(number < 1 for number in numbers):
            raise ValueError("all numbers must be 1 or more")
        if any(number % 2 == 0 for kernel in wanted.get("kernels", ()) for number in kernel):
            raise ValueError("kernels must be odd")
        if any(number != 1 for number in wanted.get("strides", ((1,),))[0]):
            raise ValueError("the first stride must be 1 along every axis")
        values = item.network.model_dump()
        if asked.strides is not None:
            values |= _following(item, asked.strides, this)
        return NetworkSpec.model_validate(values | wanted)
    except ValueError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ") if isinstance(error, ValidationError) else error
        stages = item.network.num_stages if asked.strides is None else len(asked.strides)
        raise InputError(
            f"{keys} cannot be had in {item.name}, a network of {item.network.ndim} axes and {stages} stages: "
            f"{reason}; set what belongs to one configuration as planning.{item.name}.VALUE"
        ) from None


def _following(item: Configuration, strides: tuple[tuple[int, ...], ...], this: Design) -> dict[str, Any]:
    """Return what the rules give for strides that were set; raises `ValueError` where they are not this network's."""
    ndim, stages = item.network.ndim, len(strides)
    if stages < 2 or any(len(stride) != ndim for stride in strides):
        raise ValueError("strides need two stages or more, and one entry per axis in each")
    encoder_convs, decoder_convs = this.budget.rules.convs(stages)
    return {
        "features": this.budget.rules.features(ndim, stages),
        "kernels": kernels_for(item.spacing_mm, strides),
        "encoder_convs": encoder_convs,
        "decoder_convs": decoder_convs,
    }


def _patch(
    item: Configuration, asked: ConfigurationOptions, planning: PlanningOptions, network: NetworkSpec
) -> tuple[int, ...]:
    """Return the patch as a multiple of the strides: that which was set, if both were."""
    divisor = network.divisor
    patch = item.patch_size
    if asked.strides is not None and asked.patch_size is not None and len(asked.patch_size) == item.ndim:
        order = item.preprocessing.transpose if item.ndim == 3 else (0, 1)
        patch = tuple(asked.patch_size[axis] for axis in order)
        if any(size % d for size, d in zip(patch, divisor, strict=True)):
            raise InputError(
                f"{option_key(planning, item.name, 'patch_size')} is {by_axis(patch)} as the network sees it, which "
                f"{option_key(planning, item.name, 'strides')} does not divide; give multiples of {by_axis(divisor)}"
            )
    patch = tuple(-(-size // d) * d for size, d in zip(patch, divisor, strict=True))
    if prod(size // d for size, d in zip(patch, divisor, strict=True)) < 2:
        patch_key, strides_key = (option_key(planning, item.name, leaf) for leaf in ("patch_size", "strides"))
        raise InputError(
            f"{strides_key} leaves one voxel of the patch {by_axis(patch)} at the lowest resolution, where nothing "
            f"can be normalised; set fewer strides, or a larger {patch_key}"
        )
    return patch


def _preprocessing(item: Configuration, asked: ConfigurationOptions, planning: PlanningOptions) -> PreprocessingSpec:
    def key(leaf: str) -> str:
        return option_key(planning, item.name, leaf)

    spec = item.preprocessing
    normalization = _masked(spec.normalization, asked.use_mask, key("use_mask"))
    normalization = _measured_otherwise(normalization, asked.statistics, key("statistics"))
    method = asked.resample_image.method
    resampling = {
        name: _resampling(getattr(spec, name), getattr(asked, name), method, key, name) for name in _RESAMPLED
    }
    without = [name for name, how in resampling.items() if how.method == "none"]
    if len(without) not in (0, len(resampling)):
        raise InputError(
            f"{item.name}: {', '.join(key(f'{name}.method') for name in without)} cannot be none alone: image, label "
            f"and scores share one grid; set {key('resample_image.method')} and leave the others"
        )
    return spec.model_copy(update={"normalization": normalization, **resampling})


def _resampling(
    spec: ResamplingSpec, asked: ResamplingOptions, image_method: str | None, key: Callable[[str], str], name: str
) -> ResamplingSpec:
    """Return how one kind of volume is resampled; without resampling of images there is none at all."""
    wanted = asked.model_dump(exclude_none=True)
    if image_method == "none":
        wanted.setdefault("method", "none")
    if wanted.get("force_separate") == "auto":
        wanted["force_separate"] = None
    method = wanted.get("method", spec.method)
    fixed = {"torch": {"order": 1, "order_separate_axis": 0}, "none": {"order": 0, "order_separate_axis": 0}}
    for leaf, value in fixed.get(method, {}).items():
        if wanted.setdefault(leaf, value) != value:
            how = "is linear, and nearest along a separate axis" if method == "torch" else "interpolates nothing"
            raise InputError(
                f"{key(f'{name}.{leaf}')} is {wanted[leaf]}, but the method {method} {how}; leave {leaf} out, or use "
                "the method spline"
            )
    return ResamplingSpec.model_validate(spec.model_dump() | wanted)


def _masked(
    normalization: tuple[Normalization, ...], asked: tuple[bool, ...] | None, key: str
) -> tuple[Normalization, ...]:
    if asked is None:
        return normalization
    _check_count(asked, normalization, key)
    for channel, (how, mask) in enumerate(zip(normalization, asked, strict=True)):
        if mask and how.scheme != "zscore":
            raise InputError(
                f"{key} asks for the mask in channel {channel}, which is normalised as {how.scheme}; only zscore "
                "has one"
            )
    return tuple(how.model_copy(update={"use_mask": mask}) for how, mask in zip(normalization, asked, strict=True))


def _measured_otherwise(
    normalization: tuple[Normalization, ...], asked: tuple[StatisticsOptions | None, ...] | None, key: str
) -> tuple[Normalization, ...]:
    """Return the normalisation with other statistics; those that are not given stay as they were measured."""
    if asked is None:
        return normalization
    _check_count(asked, normalization, key)
    result = []
    for channel, (how, given) in enumerate(zip(normalization, asked, strict=True)):
        values = {} if given is None else given.model_dump(exclude_none=True)
        if values and how.statistics is None:
            raise InputError(
                f"{key} has values for channel {channel}, which is normalised as {how.scheme}; only ct has statistics"
            )
        statistics = None if how.statistics is None else how.statistics.model_copy(update=values)
        if statistics is not None and statistics.percentile_00_5 >= statistics.percentile_99_5:
            raise InputError(
                f"{key} clips channel {channel} to {statistics.percentile_00_5:g} to {statistics.percentile_99_5:g}; "
                "percentile_00_5 must be below percentile_99_5"
            )
        result.append(how.model_copy(update={"statistics": statistics}))
    return tuple(result)


def _check_count(values: Sequence[Any], normalization: Sequence[Normalization], key: str) -> None:
    if len(values) != len(normalization):
        raise InputError(f"{key} needs one value for each of {len(normalization)} channels, got {len(values)}")
