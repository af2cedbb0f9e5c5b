"""The reasons behind a plan: one `Decision` per derived value, in words a person can check.

`segfit.planning.planner` decides; this module only writes down rule, inputs, active bound and what would change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from segfit.fingerprint.fingerprint import Fingerprint
from segfit.planning.design import LOWRES_SHARE, Budget, DatasetDesign, Design, batch_size, design
from segfit.planning.mirroring import AxisEvidence
from segfit.planning.normalization import ChannelScheme, scheme_of
from segfit.planning.plan import Configuration, Decision, Normalization, ResamplingSpec, TrainingSpec

__all__ = [
    "cascade_decisions",
    "configuration_decisions",
    "dataset_decisions",
    "mirroring_decision",
    "normalization_decisions",
    "orientation_decision",
    "training_decisions",
]

_REFERENCE = "nnU-Net 2.8.1 planning rules"
_ASKED = "asked for"


def orientation_decision(orientation: str, *, preset: str) -> Decision:
    """Why images are (or are not) brought to the canonical axes."""
    rule = (
        "volumes are brought to the closest RAS+ axes on reading, so that an axis means the same in every case"
        if orientation == "canonical"
        else "axes stay as they are stored, as the reference leaves them"
    )
    return _decision(
        "orientation",
        orientation,
        rule,
        inputs={"preset": preset},
        bound="preset",
        source="segfit" if orientation == "canonical" else "nnU-Net 2.8.1",
        would_change="the option planning.orientation",
    )


def dataset_decisions(
    fingerprint: Fingerprint, dataset: DatasetDesign, configurations: Sequence[str]
) -> Iterator[Decision]:
    """Why this target spacing, this order of axes, and these configurations."""
    axes = slice(-fingerprint.ndim, None)
    spacings = [case.spacing_mm for case in fingerprint.cases]
    yield _decision(
        "target_spacing_mm",
        dataset.target_mm[axes],
        "the median spacing of the cases; along an axis more than three times coarser than the others the 10th "
        "percentile (array order)",
        inputs={
            "cases": len(spacings),
            "finest_mm": [min(axis) for axis in zip(*spacings, strict=True)],
            "coarsest_mm": [max(axis) for axis in zip(*spacings, strict=True)],
        },
        bound="data",
        source=f"{_REFERENCE}, target spacing",
        would_change="cases of other resolution, or the option planning.target_spacing_mm",
    )
    if fingerprint.ndim == 3:
        yield _decision(
            "transpose",
            dataset.transpose,
            "the axis of the largest target spacing comes first, the others keep their order",
            inputs={"target_spacing_mm": dataset.target_mm},
            bound="data",
            source=f"{_REFERENCE}, transposition",
            would_change="another target spacing",
        )
    yield _lowres_decision(fingerprint, dataset, configurations)


def _lowres_decision(fingerprint: Fingerprint, dataset: DatasetDesign, configurations: Sequence[str]) -> Decision:
    full = dataset.fullres
    inputs: dict[str, Any] = {"axes": fingerprint.ndim}
    if full is None:
        rule = "images of a single slice get the 2D configuration only"
    else:
        share = prod(full.patch) / prod(full.median_shape)
        inputs["patch_share_of_median_image"] = round(share, 4)
        if dataset.lowres is not None and share >= LOWRES_SHARE:
            rule = "a target spacing was set for 3d_lowres: a configuration of lower resolution and a cascade are added"
        elif dataset.lowres is not None:
            rule = (
                f"one patch sees {share:.1%} of the median image, less than {LOWRES_SHARE:.0%}: a configuration of "
                "lower resolution and a cascade are added"
            )
        elif share < LOWRES_SHARE:
            rule = (
                f"one patch sees {share:.1%} of the median image; the lower resolution that would see "
                f"{LOWRES_SHARE:.0%} has more than half the voxels and is not worth a configuration"
            )
        else:
            rule = f"one patch sees {share:.1%} of the median image, {LOWRES_SHARE:.0%} or more: no lower resolution"
    return _decision(
        "configurations",
        sorted(configurations),
        rule,
        inputs=inputs,
        bound="data" if full is None else "patch size",
        source=f"{_REFERENCE}, sequence of configurations",
        would_change="a volume with more slices" if full is None else "another memory target, or larger images",
    )


def normalization_decisions(
    fingerprint: Fingerprint, normalization: Sequence[Normalization], schemes: Sequence[ChannelScheme]
) -> Iterator[Decision]:
    """Why each channel is normalised as it is."""
    for index, (name, how, found) in enumerate(zip(fingerprint.channel_names, normalization, schemes, strict=True)):
        by_values = how.scheme != scheme_of(name)
        rule = (
            "the channel's name decides: ct clips and scales by the foreground of all cases, rgb_to_0_1, "
            "rescale_to_0_1 and nonorm do what they say, any other name is z-scored per case, inside the non-zero mask "
            "where cropping removes more than a quarter"
        )
        if by_values:
            rule = (
                "the channel's values decide, because they contradict its name: Hounsfield units are clipped and "
                "scaled by the foreground of all cases, values without a common scale are z-scored per case"
            )
        yield _decision(
            f"normalization.{index}",
            how.scheme + (" inside the non-zero mask" if how.use_mask else ""),
            rule,
            inputs={
                "channel": name,
                "median_relative_size_after_crop": fingerprint.median_relative_size_after_crop,
                **({"remark": found.remark} if found.remark else {}),
            },
            bound="data",
            source="segfit preset auto" if by_values else f"{_REFERENCE}, normalisation",
            would_change="the option planning.normalization, or another channel name in the dataset: ct, zscore, "
            "nonorm, rescale_to_0_1 or rgb_to_0_1",
        )


def mirroring_decision(axes: Sequence[int], ndim: int, evidence: Sequence[AxisEvidence]) -> Decision:
    """Why these axes (array order) are flipped."""
    names = "zyx"[-ndim:]
    kept = {names[item.axis]: item.reason for item in evidence if item.reason}
    if evidence:
        rule = (
            "an axis is flipped unless label names tell left from right, or two labels keep their order along it in "
            "the cases (array order)"
        )
    else:
        rule = "every axis is flipped"
    return _decision(
        "mirror_axes",
        list(axes),
        rule,
        inputs={f"{name} is not flipped": reason for name, reason in kept.items()},
        bound="data" if kept else "all axes",
        source="segfit preset auto" if evidence else "nnU-Net 2.8.1 training",
        would_change="the option planning.mirror_axes",
    )


def configuration_decisions(configuration: Configuration, this: Design) -> Iterator[Decision]:
    """Why the numbers of one configuration are what they are."""
    name, network, budget = configuration.name, configuration.network, this.budget
    yield _decision(
        f"{name}.spacing_mm",
        configuration.spacing_mm,
        "coarsened in steps of 3 %, finer axes first, until a patch covers a quarter of the median image"
        if name == "3d_lowres"
        else "the target spacing of the axes the network sees, after transposition",
        bound="patch size" if name == "3d_lowres" else "data",
        source=f"{_REFERENCE}, sequence of configurations",
        would_change="another target spacing" + (" or memory target" if name == "3d_lowres" else ""),
    )
    yield _decision(
        f"{name}.median_shape",
        configuration.median_shape,
        "the median over cases of the size after cropping and resampling",
        bound="data",
        source=f"{_REFERENCE}, median shape",
        would_change="larger images, or a finer target spacing",
    )
    yield _patch_decision(configuration, this, budget)
    yield _batch_decision(configuration, this, budget)
    yield _decision(
        f"{name}.network.kind",
        network.kind,
        "the preset's network: plain convolutions, or a residual encoder",
        inputs={"planner": budget.rules.planner},
        bound="preset",
        source=f"{_REFERENCE}, network",
        would_change="another preset, or the option planning.kind",
    )
    yield _decision(
        f"{name}.network.strides",
        network.strides,
        "axes are halved, the finest first, while at least 4 voxels remain; axes within a factor of two of the finest "
        "together",
        inputs={"spacing_mm": configuration.spacing_mm, "patch_size": configuration.patch_size},
        bound="patch size",
        source=f"{_REFERENCE}, topology",
        would_change="another patch size or target spacing",
    )
    yield _decision(
        f"{name}.network.kernels",
        network.kernels,
        "size 3 along axes whose spacing is within a factor of two of the finest at that stage, else 1; the bottleneck "
        "always 3",
        inputs={"spacing_mm": configuration.spacing_mm},
        bound="data",
        source=f"{_REFERENCE}, topology",
        would_change="another target spacing",
    )
    yield _decision(
        f"{name}.network.features",
        network.features,
        f"{budget.rules.base_features} features at full resolution, doubled per stage up to the preset's cap",
        inputs={"stages": network.num_stages},
        bound="preset",
        source=f"{_REFERENCE}, network",
        would_change="the option planning.base_features",
    )
    yield _decision(
        f"{name}.network.encoder_convs",
        network.encoder_convs,
        "the preset's residual blocks per stage" if network.kind == "residual" else "two convolutions per stage",
        inputs={"kind": network.kind},
        bound="preset",
        source=f"{_REFERENCE}, network",
        would_change="another preset, or the option planning.encoder_convs",
    )
    yield _decision(
        f"{name}.network.decoder_convs",
        network.decoder_convs,
        "one convolution per decoder level beside a residual encoder"
        if network.kind == "residual"
        else "two convolutions per decoder level",
        inputs={"kind": network.kind},
        bound="preset",
        source=f"{_REFERENCE}, network",
        would_change="another preset, or the option planning.decoder_convs",
    )
    yield from _resampling_decisions(configuration)
    yield _decision(
        f"{name}.batch_dice",
        configuration.batch_dice,
        "the Dice loss pools the samples of a batch in 2D, and in 3D at full resolution where a patch sees so little "
        "that a lower resolution exists",
        bound="data",
        source=f"{_REFERENCE}, sequence of configurations",
        would_change="another set of configurations",
    )
    yield _decision(
        f"{name}.memory_estimate",
        configuration.memory_estimate,
        "feature-map elements of one sample's forward pass, in closed form",
        inputs={"budget": budget.elements(network.ndim), "memory_gb": budget.memory_gb, "labels": budget.heads},
        bound="patch size",
        source=f"{_REFERENCE}, memory estimate",
        would_change="another patch size or preset",
    )


_RESAMPLING = {
    "resample_image": "cubic splines",
    "resample_label": "linear interpolation of each label, the largest share wins",
    "resample_scores": "linear interpolation",
}


def _resampling_decisions(configuration: Configuration) -> Iterator[Decision]:
    spec = configuration.preprocessing
    for kind, how in _RESAMPLING.items():
        value: ResamplingSpec = getattr(spec, kind)
        yield _decision(
            f"{configuration.name}.{kind}",
            value.model_dump() | {"force_separate": "auto" if value.force_separate is None else value.force_separate},
            f"{how}; where the spacing of a case or the target is more than {value.separate_threshold:g} times coarser "
            "along one axis, that axis is resampled by itself to the nearest slice",
            inputs={"target_spacing_mm": [v if v is not None else "as it is" for v in spec.spacing_mm]},
            bound="preset",
            source="nnU-Net 2.8.1 preprocessing, resampling",
            would_change=f"the option planning.{kind}",
        )


def cascade_decisions(configuration: Configuration, num_foreground: int) -> Iterator[Decision]:
    """Why there is a cascade and what its network sees."""
    yield _decision(
        f"{configuration.name}.previous_stage",
        configuration.previous_stage,
        "the full resolution refines what the lower resolution found; everything else is that of 3d_fullres",
        bound="patch size",
        source=f"{_REFERENCE}, cascade",
        would_change="another memory target, or smaller images",
    )
    yield _decision(
        f"{configuration.name}.network.in_channels",
        configuration.network.in_channels,
        "the image's channels and one channel per foreground label of the previous stage",
        inputs={"foreground_labels": num_foreground},
        bound="data",
        source=f"{_REFERENCE}, cascade",
        would_change="another number of labels",
    )


def training_decisions(
    name: str, recipe: TrainingSpec, asked: Mapping[str, Any], changed: Mapping[str, Any], stages: int
) -> Iterator[Decision]:
    """Why the recipe of one configuration is what it is; `asked` and `changed` of recipe and augmentation were set."""
    augmentation = recipe.augmentation
    yield _decision(
        f"{name}.training",
        {key: getattr(recipe, key) for key in ("optimizer", "learning_rate", "momentum", "weight_decay", "precision")},
        "the reference's training recipe" + (" with what was asked for" if asked else ""),
        inputs=asked,
        bound=_ASKED if asked else "preset",
        source="nnU-Net 2.8.1 training",
        would_change="the options training.*, or a time budget",
    )
    yield _decision(
        f"{name}.training.deep_supervision",
        recipe.deep_supervision,
        "every decoder level but the lowest is supervised; with fewer than three stages that leaves nothing to add",
        inputs={"stages": stages},
        bound=_ASKED if "deep_supervision" in asked else "topology",
        source="nnU-Net 2.8.1 training",
        would_change="larger images",
    )
    yield _decision(
        f"{name}.augmentation",
        {
            "rotation_degrees": augmentation.rotation_degrees,
            "dummy_2d": augmentation.dummy_2d,
            "sample_patch": augmentation.sample_patch,
            "mirror_axes": augmentation.mirror_axes,
            **{key: getattr(augmentation, key) for key in changed},
        },
        "a patch more than three times flatter than wide is transformed in its plane only; the patch that is cut out "
        "is large enough for the rotation (axes as the network sees them)",
        inputs=changed,
        bound=_ASKED if changed else "patch size",
        source="nnU-Net 2.8.1 training, patch geometry",
        would_change="another patch size, or the options planning.mirror_axes and augmentation.strength",
    )


def _patch_decision(configuration: Configuration, this: Design, budget: Budget) -> Decision:
    memory = f"memory {budget.memory_gb:g} GB"
    if this.patch_bound == "memory":
        bound = memory
        outlook = "memory: " + ", ".join(
            f"with {gb:g} GB it would be {_size(patch)}" for gb, patch in _with_more_memory(this, budget)
        )
    elif this.patch_bound == "median shape":
        bound = f"median shape {_size(this.median_shape)}"
        outlook = "larger images or a finer target spacing; more memory would not change it"
    elif this.patch_bound == "start volume":
        bound = f"start volume of {'2048x2048' if len(this.patch) == 2 else '256x256x256'} voxels"
        outlook = "another target spacing, or the option planning.patch_size; more memory would not change it"
    else:
        bound, outlook = _ASKED, "the option planning.patch_size"
    return _decision(
        f"{configuration.name}.patch_size",
        configuration.patch_size,
        "the patch that was asked for, rounded up to what the network's strides must divide"
        if this.patch_bound == "fixed"
        else "as much physical context as possible: from a large volume of equal edge, cut to the median shape, "
        "reduced along the axis that covers most of the image until its feature maps fit",
        inputs={"start": this.start_patch, "median_shape": this.median_shape, "memory_gb": budget.memory_gb},
        bound=bound,
        source=f"{_REFERENCE}, patch size",
        would_change=outlook,
    )


def _with_more_memory(this: Design, budget: Budget) -> list[tuple[float, tuple[int, ...]]]:
    """Run the rule again with two and three times the memory."""
    targets = [factor * budget.memory_gb for factor in (2, 3)]
    return [
        (gb, design(this.spacing_mm, this.median_shape, this.dataset_voxels, replace(budget, memory_gb=gb)).patch)
        for gb in targets
    ]


def _batch_decision(configuration: Configuration, this: Design, budget: Budget) -> Decision:
    outlook = {
        "memory": "more memory, or a smaller patch",
        "dataset coverage": "more training cases, or a smaller patch",
        "minimum": "a smaller patch; two is the smallest batch, more memory goes into the patch first",
    }
    bounds = {
        "memory": f"memory {budget.memory_gb:g} GB",
        "dataset coverage": f"at most {budget.rules.coverage:.0%} of the dataset's voxels in one batch",
        "minimum": "smallest batch size",
    }
    _, bound = batch_size(configuration.patch_size, configuration.memory_estimate, this.dataset_voxels, budget)
    return _decision(
        f"{configuration.name}.batch_size",
        configuration.batch_size,
        "as many samples as fit into memory, no more than the dataset's size supports, at least two",
        inputs={"memory_estimate": configuration.memory_estimate, "dataset_voxels": this.dataset_voxels},
        bound=bounds[bound],
        source=f"{_REFERENCE}, batch size",
        would_change=outlook[bound],
    )


def _size(shape: Sequence[float]) -> str:
    return "x".join(f"{n:g}" for n in shape)


def _decision(
    key: str,
    value: Any,
    rule: str,
    *,
    inputs: Mapping[str, Any] | None = None,
    bound: str,
    source: str,
    would_change: str,
) -> Decision:
    return Decision(
        key=key,
        value=_plain(value),
        rule=rule,
        inputs=_plain(inputs or {}),
        bound=bound,
        source=source,
        would_change=would_change,
    )


def _plain(value: Any) -> Any:
    """Return the value as JSON has it, so that a plan read back is equal to the one written."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
