"""The table of rules: what each says, which bounds it knows, where it comes from and what would change it.

A decision names its rule and its bound; the words here are filled with its inputs. ``segfit plan --explain``, the
report and the page docs/rules.md are made of this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from segfit.planning.budget import (
    ENOUGH_STEPS,
    FINE_TUNING_SHARE,
    FINE_TUNING_WARMUP,
    LONG_STEPS,
    MANY_STEPS,
    MOST_FEATURES,
    NARROW,
    TOLERABLE_STEPS,
    WIDE_STEPS,
)
from segfit.planning.normalization import MASK_BELOW, SCHEME_NAMES
from segfit.planning.patch import LOWRES_SHARE, SMALLEST_BATCH
from segfit.planning.presets import AUTO_LARGE_GB, AUTO_MEDIUM_GB, AUTO_MOST_GB, RULES
from segfit.planning.spacing import ANISOTROPY
from segfit.planning.topology import SMALLEST_MAP
from segfit.text import listing

__all__ = ["CHANGES", "REPLAYED", "SET", "TABLE", "Rule"]

SET = "set by you"
"""How a value is called that the user set."""
_NNUNET = "nnU-Net 2.8.1"
_PLANNER = f"{_NNUNET} planning rules"
_MEDNEXT = "MedNeXt (Roy et al., MICCAI 2023)"
_TRAINING = f"{_NNUNET} training"
_SEGFIT = "segfit, preset auto"
_BUDGET = "segfit, docs/decisions/time-budget.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What is said of the decisions of one rule; names in braces are inputs of the decision."""

    says: str
    source: str
    changes: str  # what would change the value
    bounds: Mapping[str, str] = field(default_factory=dict)  # by the name that a decision gives; "" is its only one
    again: tuple[str, ...] = ()  # "memory", "cases": what the rules are followed again with, to tell what it changes


def _patch(volume: str, voxels: str, unit: str) -> Rule:
    return Rule(
        says=f"as much context as possible: a {volume} of {voxels} {unit} of equal physical edge, cut to the median "
        "shape and rounded up to what the network halves, then reduced along the axis that covers most of the image "
        "until its feature maps fit into memory",
        source=f"{_PLANNER}, patch size",
        changes="larger images, another target spacing, or the option planning.patch_size",
        bounds={
            "memory": "memory {memory_gb} GB",
            "median": "median shape {median_shape}",
            "start": f"start {volume} of {{start_volume}} {unit}",
            "mixed": f"median shape {{median_shape}} along some axes, start {volume} {{start_volume}} along the others",
            "fixed": "the size that was set",
        },
        again=("memory",),
    )


def _normalization(how: str) -> Rule:
    return Rule(
        says=how,
        source=f"{_PLANNER}, normalisation",
        changes="the option planning.normalization, or another name of the channel among " + listing(SCHEME_NAMES),
        bounds={
            "name": 'the name "{channel}" asks for it',
            "unknown_name": 'the name "{channel}" is no name of a scheme, which means zscore',
            "values": 'the values, which contradict the name "{channel}", ask for it (preset auto)',
        },
    )


def _spacing(says: str, **bounds: str) -> Rule:
    return Rule(
        says=says,
        source=f"{_PLANNER}, target spacing",
        changes="cases of other resolution, or the option planning.target_spacing_mm",
        bounds={"median": "median of the cases along every axis"} | bounds,
    )


def _network(
    says: str, option: str, changes: str = "another preset", *, source: str = f"{_PLANNER}, network", **bounds: str
) -> Rule:
    return Rule(
        says=says,
        source=source,
        changes=f"{changes}, or the option planning.{option}",
        bounds=bounds or {"": "preset"},
    )


def _dice(says: str, bounds: Mapping[str, str], *again: str) -> Rule:
    return Rule(
        says=says,
        source=f"{_PLANNER}, sequence of configurations",
        changes="the option planning.batch_dice",
        bounds=bounds,
        again=again,
    )


def _resampled(says: str, option: str) -> Rule:
    apart = (
        "; where the spacing of a case or the target is more than {separate_threshold} times coarser along one axis, "
        "that axis is resampled by itself to the nearest slice"
    )
    return Rule(
        says=says,
        source=f"{_NNUNET} preprocessing, resampling",
        changes=f"the options planning.{option}.*",
        bounds={"pictures": "preset", "volumes": f"preset{apart}"},
    )


def _geometry(says: str, ratio: str) -> Rule:
    return Rule(
        says=f"{says}; the patch that is cut out first is large enough for the turned one at a scale of 0.85 (axes as "
        "the network sees them); channels with a mask are set to 0 outside it",
        source=f"{_TRAINING}, patch geometry",
        changes="another patch size, or the options planning.mirror_axes and augmentation.*",
        bounds={"": ratio},
    )


def _sized(says: str, option: str) -> Rule:
    return Rule(
        says=says,
        source=_BUDGET,
        changes=f"a longer time budget, a faster machine, or the option planning.{option}",
        bounds={"time": "time budget", "steps": "steps asked for"},
    )


def _folds(says: str, source: str, **bounds: str) -> Rule:
    return Rule(
        says=says,
        source=source,
        changes="the option planning.splits (--splits balanced, reference or FILE)",
        bounds=bounds,
    )


_OTHER_PRESETS = f"another preset ({', '.join(RULES)})"
_POOLED = "the Dice loss is computed over all samples of a batch together"
_EACH = "the Dice loss is computed for each sample by itself"

TABLE: dict[str, Rule] = {
    "preset": Rule(
        says="planning rules of {planner}",
        source=f"{_NNUNET} planner presets",
        changes=_OTHER_PRESETS,
        bounds={"asked": "the preset that was asked for"},
    ),
    "preset_auto": Rule(
        says="planning rules of {planner}, by the memory of the GPU",
        source=_SEGFIT,
        changes=f"the memory of the GPU: none or less than {AUTO_MEDIUM_GB} GB: stock, from {AUTO_MEDIUM_GB} GB on "
        f"resenc-m, from {AUTO_LARGE_GB} GB on resenc-l; or {_OTHER_PRESETS}",
        bounds={
            "no_gpu": "no GPU: plain U-Net, the cheapest to train",
            "small": f"{{memory_gb}} GB of device memory, less than {AUTO_MEDIUM_GB} GB",
            "medium": f"{{memory_gb}} GB of device memory, {AUTO_MEDIUM_GB} to {AUTO_LARGE_GB} GB",
            "large": f"{{memory_gb}} GB of device memory, at least {AUTO_LARGE_GB} GB",
        },
    ),
    "memory": Rule(
        says="memory in GB that one training may take; the budget of feature maps scales linearly with it",
        source=f"{_PLANNER}, memory target",
        changes="the option memory_gb (--memory)",
        bounds={
            "preset": "the preset's own target",
            "asked": "asked for",
            "free": "nine tenths of the {free_gb:.1f} GB that are free on {device}, rounded down",
            "cpu": "nnU-Net's target; on a CPU time is short, not memory",
            "capped": f"auto plans for at most {AUTO_MOST_GB} GB, of {{there_gb}} GB",
        },
    ),
    "orientation_2d": Rule(
        says="pictures have no orientation: their axes stay as they are stored",
        source="segfit",
        changes="volumes instead of pictures",
        bounds={"": "pictures"},
    ),
    "orientation_3d": Rule(
        says="auto brings volumes to the closest RAS+ axes on reading, so that an axis means the same in every case; "
        "nnU-Net's presets leave the axes as they are stored",
        source=f"{_NNUNET}; segfit, preset auto",
        changes="the option planning.orientation",
        bounds={"canonical": "preset auto", "stored": "preset of nnU-Net"},
    ),
    "target_spacing_2d": _spacing("the median spacing of the cases, per axis in array order"),
    "target_spacing_3d": _spacing(
        f"the median spacing of the cases, per axis in array order; an axis more than {ANISOTROPY:g} times coarser "
        "than the others, with less than a third of their voxels, gets the 10th percentile instead, but nothing finer "
        "than the others",
        percentile="10th percentile along {coarse_axis}",
        capped_percentile="10th percentile along {coarse_axis}, kept from getting finer than the other axes",
    ),
    "transpose": Rule(
        says="the axis of the largest target spacing, the first of several, comes first; the others keep their order",
        source=f"{_PLANNER}, transposition",
        changes="a target spacing whose coarsest axis is another, or the option planning.transpose",
        bounds={
            "coarsest": "{coarsest_axes} is the coarsest axis",
            "first": "{coarsest_axes} are the coarsest axes, the first of them counts",
        },
    ),
    "configurations_2d": Rule(
        says="pictures, and volumes of a single slice in the median, get the 2D configuration only",
        source=f"{_PLANNER}, sequence of configurations",
        changes="volumes of more slices",
        bounds={"pictures": "pictures", "one_slice": "one slice"},
    ),
    "configurations_3d": Rule(
        says=f"volumes get a 2D and a 3D configuration; where a patch of 3d_fullres has less than {LOWRES_SHARE:.0%} "
        "of the median image's voxels, a lower resolution and a cascade are added, unless the lower resolution would "
        "need less than 2x downsampling",
        source=f"{_PLANNER}, sequence of configurations",
        changes="larger or smaller images",
        bounds={
            "sees_enough": "a patch has {patch_share_of_median_image:.1%} of the voxels: no lower resolution is needed",
            "lowres_added": "a patch has {patch_share_of_median_image:.1%} of the voxels: a lower resolution is added",
            "lowres_close": "a patch has {patch_share_of_median_image:.1%} of the voxels; a low-resolution stage would "
            "need less than 2x downsampling, so none is added",
            "lowres_set": "a target spacing was set for 3d_lowres: a lower resolution and a cascade are added",
        },
        again=("memory",),
    ),
    "normalization_ct": _normalization(
        "values are clipped to the 0.5 and 99.5 percentiles of the foreground of all cases, its mean is subtracted, "
        "and the result divided by its standard deviation"
    ),
    "normalization_zscore": _normalization(
        "the mean of each image is subtracted, and the result divided by its standard deviation; over the whole "
        f"cropped image, because cropping leaves {MASK_BELOW:.0%} of it or more"
    ),
    "normalization_zscore_masked": _normalization(
        "the mean of each image is subtracted, and the result divided by its standard deviation; inside the non-zero "
        f"mask only, because cropping leaves less than {MASK_BELOW:.0%} of the image"
    ),
    "normalization_none": _normalization("values stay as they are"),
    "normalization_rescale_to_0_1": _normalization(
        "each image is scaled from its own smallest and largest value to 0 and 1"
    ),
    "normalization_rgb_to_0_1": _normalization("values of 0 to 255 are divided by 255"),
    "mirror_all": Rule(
        says="every axis is flipped, in training with probability one half, and in prediction",
        source=_TRAINING,
        changes="the option planning.mirror_axes",
        bounds={"all": "all axes"},
    ),
    "mirror_evidence": Rule(
        says="an axis is flipped, in training with probability one half, and in prediction, unless two labels keep "
        "their order along it in the cases, pairs of left and right taken as one, or it is x and a label names one "
        "side without a label for the other",
        source=_SEGFIT,
        changes="the option planning.mirror_axes",
        bounds={"all": "all axes", "kept": "not flipped: {kept_axes}"},
    ),
    "exchange": Rule(
        says="where x is flipped, labels whose names differ by left and right only change places: in training in the "
        "labels of the flipped samples, in prediction in the outputs of the flipped views",
        source=_SEGFIT,
        changes="other names, or the option planning.mirror_axes without x",
        bounds={"": "names of labels"},
    ),
    "spacing": Rule(
        says="the target spacing of the axes the network sees, after transposition",
        source=f"{_PLANNER}, sequence of configurations",
        changes="another target spacing",
        bounds={"": "target spacing"},
    ),
    "spacing_lowres": Rule(
        says=f"the target spacing, coarsened in steps of 3 % until a patch has {LOWRES_SHARE:.0%} of the median "
        "image's voxels; axes finer than half the coarsest spacing are coarsened first",
        source=f"{_PLANNER}, sequence of configurations",
        changes="another target spacing",
        bounds={"": f"patch of {LOWRES_SHARE:.0%} of the median image"},
        again=("memory",),
    ),
    "median_shape": Rule(
        says="the median over the cases of their size after cropping and resampling to the target spacing, each "
        "rounded",
        source=f"{_PLANNER}, median shape",
        changes="larger images, or a finer target spacing",
        bounds={"": "images and target spacing"},
    ),
    "median_shape_lowres": Rule(
        says="the median size at full resolution, scaled by the ratio of the spacings and rounded",
        source=f"{_PLANNER}, sequence of configurations",
        changes="larger images, or another spacing of 3d_lowres",
        bounds={"": "spacing of 3d_lowres"},
    ),
    "patch_size_2d": _patch("plane", "2048x2048", "pixels"),
    "patch_size_3d": _patch("volume", "256x256x256", "voxels"),
    "batch_size": Rule(
        says="as many samples as fit into memory, no more than {coverage:.0%} of the dataset's voxels, both rounded, "
        f"at least {SMALLEST_BATCH}",
        source=f"{_PLANNER}, batch size",
        changes="a smaller patch; more memory goes into the patch first",
        bounds={
            "memory": "memory {memory_gb} GB",
            "coverage": "at most {coverage:.0%} of the dataset's voxels in one batch",
            "least_memory": "smallest batch size: memory would give {memory_allows:.0f}",
            "least_coverage": "smallest batch size: {coverage:.0%} of the dataset would give {coverage_allows:.0f}",
        },
        again=("memory", "cases"),
    ),
    "memory_estimate": Rule(
        says="numbers in all feature maps of one sample's forward pass, counted in closed form; {memory_gb} GB hold a "
        "batch of {samples_of_the_budget} samples of the budget's size",
        source=f"{_PLANNER}, memory estimate",
        changes="another patch size, preset or number of labels",
        bounds={
            "": "patch and network",
            "two_samples": f"patch and network; a patch may need more, as long as {SMALLEST_BATCH} samples fit",
        },
    ),
    "kind": _network("the preset's network: plain convolutions, or a residual encoder", "kind"),
    "expansion": _network(
        "twice as many features within a block, as MedNeXt-S", "expansion", "nothing in the data", source=_MEDNEXT
    ),
    "plugin": _network("the network that is planned, not that of another package", "network", "nothing in the data"),
    "norm": _network("every sample by itself, as nnU-Net's planners have it", "norm", "nothing in the data"),
    "strides": _network(
        f"an axis is halved while {2 * SMALLEST_MAP} voxels or more are left, the finest first and with it those "
        f"within a factor of two of its spacing; a single axis only from {3 * SMALLEST_MAP} voxels on",
        "strides",
        "another patch size or target spacing",
        **{
            "": f"feature maps of at least {SMALLEST_MAP} voxels per axis",
            "kept": "decided for the planned patch {planned_patch_size}, and kept when the patch was reduced",
            "lost": "decided for the planned patch {planned_patch_size}, and kept but for the {lost_stages} lowest "
            "resolutions when the patch was reduced",
        },
    ),
    "kernels": _network(
        "size 3 along axes whose spacing is, at that stage or one before, within a factor of two of the finest, else "
        "1; the bottleneck always 3",
        "kernels",
        "another target spacing",
        coarse="spacing along the coarse axes, in the first stages: {flat}",
        even="no axis is twice as coarse as another",
    ),
    "features": _network(
        "{base_features} features at full resolution, doubled per stage up to {cap}",
        "features",
        "the option planning.base_features",
        cap="at most {cap} features",
        stages="number of stages",
    ),
    "encoder_plain": _network("two convolutions per stage", "encoder_convs"),
    "encoder_residual": _network(
        "residual blocks per stage: {blocks}, the last number for all further stages", "encoder_convs"
    ),
    "encoder_mednext": _network(
        "two blocks per stage, as MedNeXt-S, beside those that halve the size", "encoder_convs", source=_MEDNEXT
    ),
    "decoder_mednext": _network(
        "two blocks per decoder level, as MedNeXt-S, beside those that double the size, lowest resolution first",
        "decoder_convs",
        source=_MEDNEXT,
    ),
    "decoder_plain": _network("two convolutions per decoder level, lowest resolution first", "decoder_convs"),
    "decoder_residual": _network(
        "one convolution per decoder level beside a residual encoder, lowest resolution first", "decoder_convs"
    ),
    "inputs": Rule(
        says="one input per image channel; in the second stage of a cascade also one per foreground label of the first",
        source=f"{_PLANNER}, network",
        changes="another number of channels or, in a cascade, of labels",
        bounds={"": "channels of the dataset", "cascade": "channels and labels of the dataset"},
    ),
    "outputs": Rule(
        says="one output per label, background included, that exclude each other (softmax); with regions one per "
        "region, each on its own (sigmoid); an ignore label has none",
        source=f"{_PLANNER}, label semantics",
        changes="another declaration of labels",
        bounds={"labels": "labels of the dataset", "regions": "regions of the dataset"},
    ),
    "cascade": Rule(
        says="the full resolution refines what the lower resolution found; all other values are those of 3d_fullres",
        source=f"{_PLANNER}, cascade",
        changes="no 3d_lowres: more memory or smaller images",
        bounds={"": "a lower resolution exists"},
    ),
    "resample_image": _resampled("image values are interpolated by cubic splines", "resample_image"),
    "resample_label": _resampled("each label is interpolated linearly, the largest share wins", "resample_label"),
    "resample_logits": _resampled("the network's logits are interpolated linearly", "resample_logits"),
    "dice_2d": _dice(f"{_POOLED}: always in 2D", {"": "2D configuration"}),
    "dice_lowres": _dice(f"{_EACH}: always at the lower resolution", {"": "lower resolution"}),
    "dice_3d": _dice(
        f"where there is a 3d_lowres, a patch sees little of the image and {_POOLED}; else {_EACH}",
        {"lowres": "a lower resolution exists", "no_lowres": "no lower resolution exists"},
        "memory",
    ),
    "recipe_mednext": Rule(
        says="AdamW at the rate that MedNeXt was published with; all else is nnU-Net's recipe",
        source=_MEDNEXT,
        changes="the options training.*, or a time budget",
        bounds={"": "kind of network"},
    ),
    "recipe": Rule(
        says="the training recipe of nnU-Net",
        source=_TRAINING,
        changes="the options training.*, or a time budget",
        bounds={"": "preset"},
    ),
    "deep_supervision": Rule(
        says="every decoder level but the lowest is supervised; networks of two stages have one level and nothing to "
        "add",
        source=_TRAINING,
        changes="a patch that gives the network two stages, or more",
        bounds={
            "stages": "number of stages",
            "two_stages": "two stages",
            "plugin": "a plug-in's network has one output",
        },
    ),
    "geometry_2d": _geometry(
        "pictures are turned by any angle, by up to 15 degrees where one edge is more than 1.5 times the other",
        "longer edge {ratio:.3g} times the shorter",
    ),
    "geometry_3d": _geometry(
        "volumes are turned by up to 30 degrees about each axis; a patch with an axis more than three times the first "
        "one by any angle, in its plane only (dummy_2d)",
        "longest axis {ratio:.3g} times the first",
    ),
    "intensities": Rule(
        says="the probabilities and ranges of nnU-Net",
        source=f"{_TRAINING}, augmentation",
        changes="the options augmentation.*",
        bounds={"": "preset"},
    ),
    "wide_sizes": Rule(
        says="what is segmented is more than twice as large, along an edge, in large cases as in small ones: half of "
        "the samples are turned and half are scaled, further than nnU-Net does; else its probabilities and ranges",
        source=_BUDGET,
        changes="cases of more equal size, or the options augmentation.*",
        bounds={"": "large cases {spread:.2g} times the small ones"},
    ),
    "equal_sizes": Rule(
        says="what is segmented has nearly the same size, along an edge, in all cases: samples are scaled "
        "only by what the large cases are to the small ones, not by 0.7 to 1.4 as nnU-Net does",
        source=_BUDGET,
        changes="cases of less equal size, or the options augmentation.*",
        bounds={"": "large cases {spread:.3g} times the small ones"},
    ),
    "folds_balanced": _folds(
        "one fold for each group of cases (a case without group is its own), at most five; groups stay together, sites "
        "and classes are spread evenly, rare ones first",
        "segfit",
        groups="number of groups",
        most="at most {most_folds} folds",
    ),
    "folds_named": _folds(
        "one fold for each group of cases, at most five; the names of cases say the groups, as exam014_1 and exam014_2 "
        "those of exam014 (--groups none: no groups); groups stay together, sites and classes are spread evenly",
        "segfit",
        groups="number of groups",
        most="at most {most_folds} folds",
    ),
    "folds_nnunet": _folds(
        "the shuffled split of the sorted case ids that nnU-Net makes; groups and sites are not looked at",
        f"{_NNUNET}, KFold with seed 12345",
        cases="number of cases",
        most="{most_folds} folds",
    ),
    "folds_file": _folds("the folds in {file}", "the user", file="the file"),
    "sized_features": _sized(
        f"the widest network that still gets {WIDE_STEPS} training steps, its deep stages with at most {MOST_FEATURES} "
        "features",
        "base_features",
    ),
    "sized_batch": _sized(
        f"the largest batch that leaves {MANY_STEPS} training steps, once the network has its full width", "batch_size"
    ),
    "sized_patch": _sized(
        f"reduced along its longest axes until a network of {NARROW} features gets {TOLERABLE_STEPS} steps",
        "patch_size",
    ),
    "sized_spacing": _sized(
        "coarser than by the rules of the preset, so that a patch that leaves enough steps sees the whole image; "
        "larger voxels keep enough of the labels",
        "target_spacing_mm",
    ),
    "sized_memory": Rule(
        says="the largest whose training step, measured, fits into the memory that is free, smaller batches before "
        "smaller patches",
        source=_BUDGET,
        changes="more free memory, or the options planning.batch_size and planning.patch_size",
        bounds={"memory": "{free_gb:.1f} GB of free memory"},
    ),
    "sized_recipe": Rule(
        says=f"the recipe for a training of about {{expected_steps}} steps; below {LONG_STEPS} updates are "
        "orthogonalised and the learning rate falls in the last half; arithmetic and memory layout are those that were "
        "measured to be fastest; what you set stays",
        source=_BUDGET,
        changes="a longer time budget, or the options training.*",
        bounds={"time": "time budget", "steps": "steps asked for"},
    ),
    "taken_over": Rule(
        says="as in the model or the plan that is taken over",
        source="the option --from or --plan-from",
        changes="another model or plan, or the options planning.*",
        bounds={"": "taken over"},
    ),
    "fine_tuning": Rule(
        says=f"a network that starts from a model gets {FINE_TUNING_SHARE:g} of the rate of the recipe, reached after "
        f"a warm-up of {FINE_TUNING_WARMUP:g} of the training; what you set stays",
        source="docs/decisions/fine-tuning.md",
        changes="the options training.learning_rate and training.warmup_share",
        bounds={"": "starts from a model"},
    ),
    "run": Rule(
        says="one network first, of several that were tried the one that had learned most; another fold, then another "
        f"configuration, if every training still gets {ENOUGH_STEPS} steps",
        source=_BUDGET,
        changes="a longer time budget, or the options planning.configurations and planning.folds",
        bounds={"time": "time budget", "steps": "steps asked for"},
    ),
    "run_extended": Rule(
        says="the network of an earlier, shorter run goes on from where its learning rate began to fall",
        source=_BUDGET,
        changes="a longer time budget, or the options planning.configurations and planning.folds",
        bounds={"time": "time budget", "steps": "steps asked for"},
    ),
}

REPLAYED = {name: rule.again for name, rule in TABLE.items()}
"""By rule, what its decisions are followed again with."""

CHANGES = {
    "canonical": "axes are brought to the canonical orientation",
    "balanced": "folds are balanced over groups, sites and classes",
    "configurations": "configurations, as asked: {names}",
    "scheme": 'channel "{channel}" is normalised as {scheme}, not as {by_name}',
    "mirrored": "flipped axes: {axes}",
    "exchange": "left and right labels change places where x is flipped",
    "option": "{option} = {value}",
    "wide_sizes": "samples are turned and scaled more often and further, because sizes differ much between cases",
    "equal_sizes": "samples are scaled less, because sizes differ little between cases",
    "no_augmentation": "there is no augmentation",
    "unsupervised": "{name} is trained without deep supervision: it has only {stages} stages",
    "set": f"{{name}} {{value}} {SET}; the rules give none",
    "set_instead": f"{{name}} {{value}} {SET} instead of {{by_rule}}",
    "sized": "{name} {value} instead of {by_rule}",
}
"""How a plan differs from nnU-Net's, or from the preset."""
