"""The reasons behind the numbers of one configuration: resolution, patch, batch, network and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import log, prod
from typing import Any

from segfit.fingerprint.fingerprint import Fingerprint
from segfit.labels import LabelScheme
from segfit.planning.design import (
    LOWRES_SHARE,
    SMALLEST_BATCH,
    START_VOXELS,
    Budget,
    Design,
    batch_size,
    reference_batch,
)
from segfit.planning.plan import Decision
from segfit.planning.reasons import REFERENCE, Alternative, by_axis, reason, with_more_memory
from segfit.planning.topology import SMALLEST_MAP
from segfit.specs import Configuration, ResamplingSpec

__all__ = ["cascade_decisions", "configuration_decisions", "network_ends", "stride_inputs"]

_STEP = 1.03


def configuration_decisions(
    configuration: Configuration,
    this: Design,
    *,
    fullres: Design | None,
    fingerprint: Fingerprint,
    alternatives: Sequence[Alternative],
    preset: str,
) -> Iterator[Decision]:
    """Why the numbers of one configuration are what they are.

    Parameters
    ----------
    this : what the configuration was made of
    fullres : the design of 3d_fullres, where 3d_lowres was coarsened from it
    alternatives : the same request with more memory
    preset : whose rules apply
    """
    budget, outlook = this.budget, _Outlook(configuration.name, alternatives, preset)
    if configuration.name == "3d_lowres" and fullres is not None:
        yield from _coarsened_decisions(configuration, this, fullres, outlook)
    else:
        yield from _resolution_decisions(configuration, fingerprint)
    yield _patch_decision(configuration, this, outlook)
    yield _batch_decision(configuration, this, outlook)
    yield _estimate_decision(configuration, budget)
    yield from _network_decisions(configuration, budget)
    yield from _resampling_decisions(configuration)
    yield _dice_decision(configuration, outlook)


class _Outlook:
    """What more memory would change of one configuration."""

    def __init__(self, name: str, alternatives: Sequence[Alternative], preset: str) -> None:
        self.name, self.alternatives, self.preset = name, alternatives, preset

    def __call__(self, now: str, value: Callable[[Configuration], str]) -> str:
        def of_this(configurations: Mapping[str, Configuration]) -> str | None:
            return value(configurations[self.name]) if self.name in configurations else None

        absent = f"there would be no {self.name}"
        return with_more_memory(now, self.alternatives, of_this, preset=self.preset, absent=absent)


def _resolution_decisions(configuration: Configuration, fingerprint: Fingerprint) -> Iterator[Decision]:
    yield reason(
        f"{configuration.name}.spacing_mm",
        configuration.spacing_mm,
        "the target spacing of the axes the network sees, after transposition",
        inputs={"transpose": configuration.preprocessing.transpose},
        bound="target spacing",
        source=f"{REFERENCE}, sequence of configurations",
        would_change="another target spacing",
    )
    yield reason(
        f"{configuration.name}.median_shape",
        configuration.median_shape,
        "the median over the cases of their size after cropping and resampling to the target spacing, each rounded",
        inputs={"cases": len(fingerprint.cases), "spacing_mm": configuration.spacing_mm},
        bound="images and target spacing",
        source=f"{REFERENCE}, median shape",
        would_change="larger images, or a finer target spacing",
    )


def _coarsened_decisions(
    configuration: Configuration, this: Design, fullres: Design, outlook: _Outlook
) -> Iterator[Decision]:
    # The two may see the axes in another order.
    full_mm, full_shape = (
        _in_order_of(this, fullres, fullres.spacing_mm),
        _in_order_of(this, fullres, fullres.median_shape),
    )
    ratio = [low / full for low, full in zip(configuration.spacing_mm, full_mm, strict=True)]
    size = [n / r for n, r in zip(full_shape, ratio, strict=True)]
    yield reason(
        f"{configuration.name}.spacing_mm",
        configuration.spacing_mm,
        f"the target spacing, coarsened in steps of 3 % until a patch has {LOWRES_SHARE:.0%} of the median image's "
        "voxels; axes less than half as coarse as the coarsest go first",
        inputs={
            "target_spacing_mm": full_mm,
            "steps": max(round(log(r) / log(_STEP)) for r in ratio),
            "patch_share_of_median_image": prod(this.patch) / prod(size),
        },
        bound=f"patch of {LOWRES_SHARE:.0%} of the median image",
        source=f"{REFERENCE}, sequence of configurations",
        would_change="another target spacing; "
        + outlook(by_axis(configuration.spacing_mm), lambda item: by_axis(item.spacing_mm)),
    )
    yield reason(
        f"{configuration.name}.median_shape",
        configuration.median_shape,
        "the median size at full resolution, scaled by the ratio of the spacings and rounded",
        inputs={
            "fullres_median_shape": full_shape,
            "fullres_spacing_mm": full_mm,
            "spacing_mm": configuration.spacing_mm,
        },
        bound="spacing of 3d_lowres",
        source=f"{REFERENCE}, sequence of configurations",
        would_change="larger images, or another spacing of 3d_lowres",
    )


def _in_order_of(this: Design, other: Design, values: Sequence[float]) -> list[float]:
    """Return values of the axes of another design in the order in which this one sees them."""
    return [values[other.transpose.index(axis)] for axis in this.transpose]


def _patch_decision(configuration: Configuration, this: Design, outlook: _Outlook) -> Decision:
    ndim, memory_gb = len(this.patch), this.budget.memory_gb
    rule = (
        f"as much context as possible: {_start(ndim)} of equal physical edge, cut to the median shape and rounded up "
        "to what the network halves, then reduced along the axis that covers most of the image until its feature maps "
        "fit into memory"
    )
    more = outlook(by_axis(configuration.patch_size), lambda item: by_axis(item.patch_size))
    if this.patch_bound == "memory":
        bound, change = f"memory {memory_gb:g} GB", more
    else:
        bound, change = _start_bound(configuration, this), f"larger images or a finer target spacing; {more}"
        if bound.startswith("start volume"):
            change = f"another target spacing, or the option planning.patch_size; {more}"
    if configuration.patch_size != this.patch:
        rule += "; at last rounded up to multiples of the strides, which you set"
        bound += ", strides"
    return reason(
        f"{configuration.name}.patch_size",
        configuration.patch_size,
        rule,
        inputs={
            "start": this.start_patch,
            "median_shape": this.median_shape,
            "memory_gb": memory_gb,
            "multiples_of": configuration.network.divisor,
        },
        bound=bound,
        source=f"{REFERENCE}, patch size",
        would_change=change,
    )


def _start(ndim: int) -> str:
    return "a volume of 256x256x256 voxels" if ndim == 3 else "a plane of 2048x2048 pixels"


def _start_bound(configuration: Configuration, this: Design) -> str:
    """Return which axes the median image bounds, and which the size of the start."""
    ndim = len(this.patch)
    edge = (START_VOXELS[ndim] * prod(this.spacing_mm)) ** (1 / ndim)
    wanted = [round(edge / mm) for mm in this.spacing_mm]
    cut = [m < n for m, n in zip(this.median_shape, wanted, strict=True)]
    if all(cut):
        return f"median shape {by_axis(this.median_shape)}"
    if not any(cut):
        return f"start volume of {by_axis(wanted)} {_unit(configuration)}"
    parts = [
        f"axis {axis}: " + (f"median shape {m:g}" if less else f"start volume {n}")
        for axis, (m, n, less) in enumerate(zip(this.median_shape, wanted, cut, strict=True))
    ]
    return ", ".join(parts)


def _unit(configuration: Configuration) -> str:
    return "voxels" if configuration.ndim == 3 else "pixels"


def _batch_decision(configuration: Configuration, this: Design, outlook: _Outlook) -> Decision:
    budget, patch, estimate = this.budget, configuration.patch_size, configuration.memory_estimate
    coverage = budget.rules.coverage
    affordable = budget.elements(len(patch)) / estimate * reference_batch(len(patch))
    covering = this.dataset_voxels * coverage / prod(patch)
    batch, limit = batch_size(patch, estimate, this.dataset_voxels, budget)
    more = outlook(str(batch), lambda item: str(item.batch_size))
    least = max(SMALLEST_BATCH, min(round(affordable), round(2 * covering)))
    cases = f"more training cases: with twice as many it would {'still ' if least == batch else ''}be {least}"
    if limit == "memory":
        bound, change = f"memory {budget.memory_gb:g} GB", f"a smaller patch; {more}"
        if this.patch_bound == "memory":
            change += "; more memory goes into the patch first"
    elif limit == "dataset coverage":
        bound, change = f"at most {coverage:.0%} of the dataset's voxels in one batch", f"{cases}; {more}"
    else:
        scarce = "memory" if affordable < covering else f"{coverage:.0%} of the dataset"
        bound = f"smallest batch size: {scarce} would give {min(round(affordable), round(covering))}"
        change = f"{cases}; {more}"
    return reason(
        f"{configuration.name}.batch_size",
        configuration.batch_size,
        f"as many samples as fit into memory, no more than {coverage:.0%} of the dataset's voxels, both rounded, at "
        f"least {SMALLEST_BATCH}",
        inputs={
            "memory_allows": affordable,
            f"{coverage:.0%}_of_the_dataset_is": covering,
            "dataset_voxels": this.dataset_voxels,
            "memory_estimate": estimate,
        },
        bound=bound,
        source=f"{REFERENCE}, batch size",
        would_change=change,
    )


def _estimate_decision(configuration: Configuration, budget: Budget) -> Decision:
    ndim = configuration.ndim
    batch = reference_batch(ndim)
    allowed = f"{budget.memory_gb:g} GB hold a batch of {batch} samples of the budget's size"
    if ndim == 2 and budget.rules.kind == "plain":
        allowed += f"; a patch may need more, as long as {SMALLEST_BATCH} samples fit"
    return reason(
        f"{configuration.name}.memory_estimate",
        configuration.memory_estimate,
        f"numbers in all feature maps of one sample's forward pass, counted in closed form; {allowed}",
        inputs={
            "budget_per_sample": budget.elements(ndim),
            "samples_of_the_budget": batch,
            "memory_gb": budget.memory_gb,
            "declared_labels": budget.heads,
        },
        bound="patch and network",
        source=f"{REFERENCE}, memory estimate",
        would_change="another patch size, preset or number of labels",
    )


def stride_inputs(configuration: Configuration) -> dict[str, Any]:
    """Return what the strides depend on, and what they leave of the patch."""
    divisor = configuration.network.divisor
    return {
        "spacing_mm": list(configuration.spacing_mm),
        "patch_size": list(configuration.patch_size),
        "lowest_resolution_shape": [n // d for n, d in zip(configuration.patch_size, divisor, strict=True)],
    }


def _network_decisions(configuration: Configuration, budget: Budget) -> Iterator[Decision]:
    name, network = configuration.name, configuration.network
    yield reason(
        f"{name}.network.kind",
        network.kind,
        "the preset's network: plain convolutions, or a residual encoder",
        inputs={"planner": budget.rules.planner},
        bound="preset",
        source=f"{REFERENCE}, network",
        would_change="another preset, or the option planning.kind",
    )
    yield reason(
        f"{name}.network.strides",
        network.strides,
        f"an axis is halved while {2 * SMALLEST_MAP} voxels or more are left, the finest first and with it those "
        f"within a factor of two of its spacing; a single axis only from {3 * SMALLEST_MAP} voxels on",
        inputs=stride_inputs(configuration),
        bound=f"feature maps of at least {SMALLEST_MAP} voxels per axis",
        source=f"{REFERENCE}, topology",
        would_change="another patch size or target spacing, or the option planning.strides",
    )
    flat = sum(1 in kernel for kernel in network.kernels)
    yield reason(
        f"{name}.network.kernels",
        network.kernels,
        "size 3 along axes whose spacing is, at that stage or one before, within a factor of two of the finest, else "
        "1; the bottleneck always 3",
        inputs={"spacing_mm": configuration.spacing_mm, "strides": network.strides},
        bound=f"spacing along the coarse axes, in the first {'stage' if flat == 1 else f'{flat} stages'}"
        if flat
        else "no axis is twice as coarse as another",
        source=f"{REFERENCE}, topology",
        would_change="another target spacing, or the option planning.kernels",
    )
    cap = budget.rules.max_features_2d if network.ndim == 2 else budget.rules.max_features_3d
    yield reason(
        f"{name}.network.features",
        network.features,
        f"{budget.rules.base_features} features at full resolution, doubled per stage up to {cap}",
        inputs={"stages": network.num_stages},
        bound=f"at most {cap} features" if network.features[-1] == cap else "number of stages",
        source=f"{REFERENCE}, network",
        would_change="the options planning.base_features and planning.features",
    )
    residual = network.kind == "residual"
    blocks = budget.rules.encoder_convs
    yield reason(
        f"{name}.network.encoder_convs",
        network.encoder_convs,
        f"residual blocks per stage: {', '.join(map(str, blocks))}, the last number for all further stages"
        if residual
        else "two convolutions per stage",
        inputs={"kind": network.kind, "stages": network.num_stages},
        bound="preset",
        source=f"{REFERENCE}, network",
        would_change="another preset, or the option planning.encoder_convs",
    )
    yield reason(
        f"{name}.network.decoder_convs",
        network.decoder_convs,
        "one convolution per decoder level beside a residual encoder, lowest resolution first"
        if residual
        else "two convolutions per decoder level, lowest resolution first",
        inputs={"kind": network.kind, "stages": network.num_stages},
        bound="preset",
        source=f"{REFERENCE}, network",
        would_change="another preset, or the option planning.decoder_convs",
    )


def network_ends(configuration: Configuration, channels: Sequence[str], labels: LabelScheme) -> Iterator[Decision]:
    """Why the network has so many inputs and outputs."""
    name, network = configuration.name, configuration.network
    inputs: dict[str, Any] = {"image_channels": len(channels)}
    rule = "one input per image channel"
    if configuration.previous_stage is not None:
        inputs["foreground_labels"] = len(labels.foreground_values)
        rule += ", and one per foreground label of the previous stage"
    yield reason(
        f"{name}.network.in_channels",
        network.in_channels,
        rule,
        inputs=inputs,
        bound="channels of the dataset",
        source=f"{REFERENCE}, cascade" if configuration.previous_stage else f"{REFERENCE}, network",
        would_change="another number of channels" + (" or labels" if configuration.previous_stage else ""),
    )
    declared = {"labels_with_background": len(labels.labels)}
    yield reason(
        f"{name}.network.num_outputs",
        network.num_outputs,
        "one output per region, each on its own (sigmoid)"
        if labels.has_regions
        else "one output per label, background included, that exclude each other (softmax); the ignore label has none",
        inputs=declared if labels.ignore_value is None else declared | {"ignore_label": labels.ignore_value},
        bound="labels of the dataset",
        source=f"{REFERENCE}, label semantics",
        would_change="another declaration of labels",
    )


_RESAMPLED = {
    "resample_image": "image values are interpolated by cubic splines",
    "resample_label": "each label is interpolated linearly, the largest share wins",
    "resample_scores": "the network's scores are interpolated linearly",
}


def _resampling_decisions(configuration: Configuration) -> Iterator[Decision]:
    spec = configuration.preprocessing
    kept = ["the case's own" if mm is None else mm for mm in spec.spacing_mm]
    for kind, how in _RESAMPLED.items():
        value: ResamplingSpec = getattr(spec, kind)
        rule = how
        if spec.image_ndim == 3:
            rule += (
                f"; where the spacing of a case or the target is more than {value.separate_threshold:g} times coarser "
                "along one axis, that axis is resampled by itself to the nearest slice"
            )
        yield reason(
            f"{configuration.name}.{kind}",
            value.model_dump() | {"force_separate": "auto" if value.force_separate is None else value.force_separate},
            rule,
            inputs={"target_spacing_mm": kept},
            bound="preset",
            source="nnU-Net 2.8.1 preprocessing, resampling",
            would_change=f"the options planning.{kind}.*",
        )


def _dice_decision(configuration: Configuration, outlook: _Outlook) -> Decision:
    pooled = "the Dice loss is computed over all samples of a batch together"
    each = "the Dice loss is computed for each sample by itself"
    change = "the option planning.batch_dice"
    if configuration.ndim == 2:
        rule, bound = f"{pooled}: always in 2D", "2D configuration"
    elif configuration.name == "3d_lowres":
        rule, bound = f"{each}: always at the lower resolution", "lower resolution"
    else:
        there = configuration.batch_dice
        rule = f"{pooled}, because" if there else f"{each}, because"
        rule += f" there is {'a' if there else 'no'} 3d_lowres: a patch sees {'little' if there else 'enough'} of the "
        rule += "image"
        bound = "a lower resolution exists" if there else "no lower resolution exists"
        change += "; " + outlook(_yes(there), lambda item: _yes(item.batch_dice))
    return reason(
        f"{configuration.name}.batch_dice",
        configuration.batch_dice,
        rule,
        inputs={"configuration": configuration.name},
        bound=bound,
        source=f"{REFERENCE}, sequence of configurations",
        would_change=change,
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def cascade_decisions(configuration: Configuration) -> Iterator[Decision]:
    """Why there is a cascade."""
    yield reason(
        f"{configuration.name}.previous_stage",
        configuration.previous_stage,
        "the full resolution refines what the lower resolution found; what is not told here is as in 3d_fullres",
        inputs={"previous_stage": configuration.previous_stage},
        bound="a lower resolution exists",
        source=f"{REFERENCE}, cascade",
        would_change="whatever removes 3d_lowres: more memory, or smaller images",
    )
