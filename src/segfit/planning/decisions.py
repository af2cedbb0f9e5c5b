"""The reasons behind what a plan decides for the whole dataset: one `Decision` per derived value, in words a person
can check.

`segfit.planning.planner` decides; this module only writes down rule, inputs, active bound and what would change it.
The values of single configurations are explained in `segfit.planning.configuration_decisions`, the recipe in
`segfit.planning.recipe_decisions`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np

from segfit.fingerprint.fingerprint import Fingerprint
from segfit.planning.design import LOWRES_SHARE, DatasetDesign
from segfit.planning.mirroring import AxisEvidence
from segfit.planning.normalization import MASK_BELOW, SCHEME_NAMES, ChannelScheme, scheme_of
from segfit.planning.plan import Decision
from segfit.planning.reasons import REFERENCE, SET, Alternative, by_axis, reason, with_more_memory
from segfit.planning.spacing import ANISOTROPY, coarse_axis
from segfit.specs import Normalization
from segfit.words import listing

__all__ = [
    "configurations_decision",
    "dataset_decisions",
    "exchange_decision",
    "mirroring_decision",
    "normalization_decisions",
    "orientation_decision",
]

_NORMALIZED = {
    "ct": "values are clipped to the 0.5 and 99.5 percentiles of the foreground of all cases, its mean is subtracted, "
    "and the result divided by its standard deviation",
    "zscore": "the mean of each image is subtracted, and the result divided by its standard deviation",
    "none": "values stay as they are",
    "rescale_to_0_1": "each image is scaled from its own smallest and largest value to 0 and 1",
    "rgb_to_0_1": "values of 0 to 255 are divided by 255",
}


def orientation_decision(orientation: str, *, preset: str, ndim: int) -> Decision:
    """Why images are (or are not) brought to the canonical axes."""
    if ndim == 2:
        rule, bound = "pictures have no orientation: their axes stay as they are stored", "pictures"
    elif orientation == "canonical":
        rule = "volumes are brought to the closest RAS+ axes on reading, so that an axis means the same in every case"
        bound = "preset"
    else:
        rule, bound = "axes stay as they are stored, as the reference leaves them", "preset"
    other = "stored" if orientation == "canonical" else "canonical"
    return reason(
        "orientation",
        orientation,
        rule,
        inputs={"preset": preset},
        bound=bound,
        source="segfit" if orientation == "canonical" else "nnU-Net 2.8.1",
        would_change="volumes instead of pictures" if ndim == 2 else f"the option planning.orientation={other}",
    )


def dataset_decisions(fingerprint: Fingerprint, dataset: DatasetDesign) -> Iterator[Decision]:
    """Why this target spacing and this order of axes."""
    yield _spacing_decision(fingerprint, dataset)
    if fingerprint.ndim == 3:
        yield _transpose_decision(dataset)


def _spacing_decision(fingerprint: Fingerprint, dataset: DatasetDesign) -> Decision:
    spacings = np.array([case.spacing_mm for case in fingerprint.cases])
    median_mm = np.median(spacings, axis=0).tolist()
    median_shape = np.median([case.shape_after_crop for case in fingerprint.cases], axis=0).tolist()
    target = dataset.target_mm[-fingerprint.ndim :]
    inputs: dict[str, Any] = {
        "cases": len(spacings),
        "median_mm": median_mm,
        "finest_mm": spacings.min(axis=0).tolist(),
        "coarsest_mm": spacings.max(axis=0).tolist(),
        "median_shape_after_crop": median_shape,
    }
    rule = "the median spacing of the cases, per axis in array order"
    bound = "median of the cases along every axis"
    outlook = "cases of other resolution, or the option planning.target_spacing_mm"
    if fingerprint.ndim == 3:
        rule += (
            f"; an axis more than {ANISOTROPY:g} times coarser than the others, with less than a third of their "
            "voxels, gets the 10th percentile instead, but nothing finer than the others"
        )
        coarse = coarse_axis(median_mm, median_shape)
        if coarse is not None:
            axis, percentile = "zyx"[coarse], float(np.percentile(spacings[:, coarse], 10))
            inputs["percentile_10_mm"] = percentile
            finer = target[coarse] > percentile
            bound = f"10th percentile along {axis}" + (", kept from getting finer than the other axes" if finer else "")
            outlook += f"; the median, {by_axis(median_mm)}, if {axis} were at most {ANISOTROPY:g} times coarser"
    return reason(
        "target_spacing_mm",
        target,
        rule,
        inputs=inputs,
        bound=bound,
        source=f"{REFERENCE}, target spacing",
        would_change=outlook,
    )


def _transpose_decision(dataset: DatasetDesign) -> Decision:
    largest = max(dataset.target_mm)
    coarsest = ["zyx"[axis] for axis, mm in enumerate(dataset.target_mm) if mm == largest]
    return reason(
        "transpose",
        dataset.transpose,
        "the axis of the largest target spacing, the first of several, comes first; the others keep their order",
        inputs={"target_spacing_mm": dataset.target_mm},
        bound=f"{coarsest[0]} is the coarsest axis"
        if len(coarsest) == 1
        else f"{listing(coarsest)} are the coarsest axes, {coarsest[0]} is the first of them",
        source=f"{REFERENCE}, transposition",
        would_change="a target spacing whose coarsest axis is another, or the option planning.transpose",
    )


def configurations_decision(
    names: Sequence[str],
    ndim: int,
    dataset: DatasetDesign,
    alternatives: Sequence[Alternative],
    *,
    preset: str,
    lowres_set: bool = False,
    dropped: Sequence[str] = (),
) -> Decision:
    """Why there are these configurations.

    Parameters
    ----------
    names : of the configurations of the plan
    preset : whose rules apply
    lowres_set : the user set a target spacing of 3d_lowres, which calls for one
    dropped : a sentence on each configuration that is too small to be trained
    """
    full = dataset.fullres
    inputs: dict[str, Any] = {"axes": ndim}
    if full is None:
        rule = "pictures" if ndim == 2 else "volumes of a single slice in the median"
        rule, bound = f"{rule} get the 2D configuration only", "one slice"
        outlook = "volumes of more slices"
    else:
        share = prod(full.patch) / prod(full.median_shape)
        inputs |= {"patch_size": full.patch, "median_shape": full.median_shape, "patch_share_of_median_image": share}
        sees = f"a patch of 3d_fullres has {share:.1%} of the median image's voxels"
        if lowres_set:
            rule = "a target spacing was set for 3d_lowres: a lower resolution and a cascade are added"
            bound = "target spacing of 3d_lowres"
        elif dataset.lowres is not None:
            rule = f"{sees}, less than {LOWRES_SHARE:.0%}: a lower resolution and a cascade are added"
            bound = f"patch below {LOWRES_SHARE:.0%} of the median image"
        elif share < LOWRES_SHARE:
            rule = (
                f"{sees}; the lower resolution at which it would have {LOWRES_SHARE:.0%} keeps more than half of the "
                "voxels and is not worth a configuration"
            )
            bound = "a lower resolution must have half the voxels at most"
        else:
            rule = f"{sees}, {LOWRES_SHARE:.0%} or more: no lower resolution is needed"
            bound = f"patch of {LOWRES_SHARE:.0%} of the median image or more"
        outlook = "larger or smaller images; "
        outlook += with_more_memory(
            listing(sorted(names)), alternatives, lambda other: listing(sorted(other)), preset=preset
        )
    if dropped:
        rule = f"{rule}; {'; '.join(dropped)}"
    return reason(
        "configurations",
        sorted(names),
        rule,
        inputs=inputs,
        bound=bound,
        source=f"{REFERENCE}, sequence of configurations",
        would_change=outlook,
    )


def normalization_decisions(
    fingerprint: Fingerprint, normalization: Sequence[Normalization], schemes: Sequence[ChannelScheme]
) -> Iterator[Decision]:
    """Why each channel is normalised as it is."""
    for index, (name, how, found) in enumerate(zip(fingerprint.channel_names, normalization, schemes, strict=True)):
        by_values = how.scheme != scheme_of(name)
        inputs: dict[str, Any] = {"channel": name}
        if by_values:
            rule = f'the values, which contradict the name "{name}", ask for {how.scheme}'
            bound = "values of the channel"
        else:
            known = name.casefold() in SCHEME_NAMES
            reading = f"asks for {how.scheme}" if known else f"is no name of a scheme, which means {how.scheme}"
            rule, bound = f'the name "{name}" {reading}', "name of the channel"
        rule += f": {_NORMALIZED[how.scheme]}"
        outlook = f"the option planning.normalization, or another name of the channel among {listing(SCHEME_NAMES)}"
        if how.scheme == "zscore":
            kept = fingerprint.median_relative_size_after_crop
            inputs["median_relative_size_after_crop"] = kept
            rule += (
                f"; inside the non-zero mask only, because cropping leaves less than {MASK_BELOW:.0%} of the image"
                if how.use_mask
                else f"; over the whole cropped image, because cropping leaves {MASK_BELOW:.0%} of it or more"
            )
            bound += f"; cropping leaves {kept:.0%}"
            other = f"{MASK_BELOW:.0%} or more" if how.use_mask else f"less than {MASK_BELOW:.0%}"
            outlook += f"; the mask: cropping that leaves {other}"
        if how.statistics is not None:
            inputs |= how.statistics.model_dump(include={"mean", "std", "percentile_00_5", "percentile_99_5"})
        if found.remark:
            inputs["remark"] = found.remark
        yield reason(
            f"normalization.{index}",
            how.scheme + (" inside the non-zero mask" if how.use_mask else ""),
            rule,
            inputs=inputs,
            bound=bound,
            source="segfit preset auto" if by_values else f"{REFERENCE}, normalisation",
            would_change=outlook,
        )


def mirroring_decision(
    axes: Sequence[int], ndim: int, evidence: Sequence[AxisEvidence], *, augmented: bool = True
) -> Decision:
    """Why these axes (array order) are flipped; without augmentation none is."""
    names = "zyx"[-ndim:]
    kept = {names[item.axis]: item.reason for item in evidence if item.reason}
    when = "in training with probability one half, and in prediction"
    source = "segfit preset auto" if evidence else "nnU-Net 2.8.1 training"
    bound = f"{listing(list(kept))} {'is' if len(kept) == 1 else 'are'} not flipped" if kept else "all axes"
    outlook = "the option planning.mirror_axes"
    if not augmented:
        axes, kept, rule, bound = (), {}, "without augmentation no axis is flipped", SET
        source, outlook = "options", "the option augmentation.strength"
    elif evidence:
        rule = (
            f"an axis is flipped, {when}, unless two labels keep their order along it in the cases, pairs of left and "
            "right taken as one, or it is x and a label names one side without a label for the other"
        )
    else:
        rule = f"every axis is flipped, {when}"
    return reason(
        "mirror_axes",
        list(axes),
        rule,
        inputs={"array order": ", ".join(f"{axis} is {name}" for axis, name in enumerate(names))}
        | {f"{name} is not flipped": why for name, why in kept.items()},
        bound=bound,
        source=source,
        would_change=outlook,
    )


def exchange_decision(pairs: Sequence[tuple[str, str]], two_sided: Sequence[str]) -> Decision:
    """Why these labels change places when x is flipped; `two_sided` are the names that say one side in vain."""
    inputs: dict[str, Any] = {"pairs": len(pairs)}
    if two_sided:
        inputs["lie on both sides in spite of their names"] = listing(list(two_sided))
    return reason(
        "exchanged_labels",
        [f"{left} with {right}" for left, right in pairs],
        "where x is flipped, labels whose names differ by left and right only change places: in training in the labels "
        "of the flipped samples, in prediction in the outputs of the flipped views",
        inputs=inputs,
        bound="names of labels",
        source="segfit preset auto",
        would_change="other names, or the option planning.mirror_axes without x",
    )
