"""What is measured of a class beside its Dice and IoU, where it is asked for.

One rule for empty masks. Of two empty masks nothing is measured, and no share is taken of nothing: precision without a
predicted voxel, recall, volume error and sensitivity to objects without a reference. Otherwise, where one of the two is
empty, it is as wrong as can be: shares are 0 and distances the diagonal of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from segfit.connected_components import Slices, label_boxes
from segfit.errors import InputError, nearest
from segfit.evaluation.metrics import Metrics
from segfit.evaluation.objects import object_measures
from segfit.evaluation.surfaces import surface_measures
from segfit.files import Record, first_fault
from segfit.labels import LabelClass, LabelScheme

__all__ = ["TOLERANCE_MM", "TOLERANCE_PX", "MeasureKind", "Measures", "Sizes", "Unit", "measure"]

MeasureKind = Literal["surface", "centreline", "objects"]
Unit = Literal["mm", "px"]

TOLERANCE_MM, TOLERANCE_PX = 1.0, 2.0
"""Of surface Dice, unless set; in pixels for images that do not say how large theirs are."""


class Measures(Record):
    """What to measure beside overlap, and how."""

    kinds: tuple[MeasureKind, ...] = ()
    tolerance: float | None = Field(None, gt=0)  # of surface Dice, in the unit of the images; None: as above
    matched_iou: float = Field(0.5, ge=0, lt=1)  # above which objects match

    @classmethod
    def asked(cls, kinds: Sequence[str], tolerance: float | None = None, matched_iou: float = 0.5) -> Self:
        """Return what a user asked for: `InputError` where it cannot be."""
        known = get_args(MeasureKind)
        strange = [kind for kind in kinds if kind not in known]
        if isinstance(kinds, str) or strange:
            got = kinds if isinstance(kinds, str) else strange[0]
            problem = f"what can be measured is {', '.join(known)}, got {got!r}"
            raise InputError(problem + (nearest(got, known) if isinstance(got, str) else ""))
        if "centreline" in kinds:
            _skeletonize()
        try:
            return cls(kinds=tuple(kinds), tolerance=tolerance, matched_iou=matched_iou)
        except ValidationError as error:
            raise InputError(f"measures: {first_fault(error)}", "tolerance > 0, 0 <= IoU of a match < 1") from None

    @property
    def needs_sizes(self) -> bool:
        """Whether the voxel size bears on them."""
        return "surface" in self.kinds

    def within(self, tolerance: float) -> Self:
        """Return them with a tolerance where none is set."""
        return self.model_copy(update={"tolerance": self.tolerance or tolerance})


class Sizes(Record):
    """The voxel size of an image per axis, in array order, and whether it is in mm; else in voxels."""

    spacing: tuple[float, ...]
    known: bool = True

    @classmethod
    def unknown(cls, shape: Sequence[int]) -> Self:
        """Return those of an image that does not say any: all measures are in voxels."""
        return cls(spacing=(1.0,) * len(shape), known=False)

    @property
    def tolerance(self) -> float:
        """Of surface Dice, where none is set."""
        return TOLERANCE_MM if self.known else TOLERANCE_PX


def measure(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    scheme: LabelScheme,
    metrics: Mapping[str, Metrics],
    sizes: Sizes,
    asked: Measures,
    threads: int = 1,
) -> dict[str, Metrics]:
    """Return the metrics of two label maps with what was asked for; voxels to be ignored count in no mask.

    More `threads` change no value.
    """
    if not asked.kinds:
        return {name: one.with_measures(_overlap(one)) for name, one in metrics.items()}
    spacing = sizes.spacing
    if prediction.ndim == 3 and 1 in prediction.shape:  # a picture: its surface is its outline, not its faces
        axis = prediction.shape.index(1)
        prediction, reference = prediction.take(0, axis), reference.take(0, axis)
        spacing = (*spacing[:axis], *spacing[axis + 1 :])
    highest = max(scheme.all_values)
    boxes = [label_boxes(labels, highest) for labels in (prediction, reference)]
    tolerance = asked.tolerance or sizes.tolerance
    diagonal = float(np.linalg.norm(np.array(prediction.shape) * spacing))
    found = {}
    for class_ in scheme.classes:
        one = metrics[class_.name]
        values = _overlap(one)
        if not one.n_pred or not one.n_ref:
            values |= _of_empty(one, asked, diagonal)
        box = _box(class_, [each[v - 1] for each in boxes for v in class_.values if v], prediction.shape)
        if box is not None:
            masks = [_mask(labels[box], class_) for labels in (prediction, reference)]
            ignored = None if scheme.ignore_value is None else reference[box] == scheme.ignore_value
            if ignored is not None:
                masks[0] &= ~ignored
            if one.n_pred and one.n_ref:
                if "surface" in asked.kinds:
                    values |= surface_measures(masks[0], masks[1], spacing, tolerance, ignored, threads)
                if "centreline" in asked.kinds:
                    values["centreline_dice"] = _centreline_dice(masks[0], masks[1])
            if "objects" in asked.kinds:
                values |= object_measures(masks[0], masks[1], asked.matched_iou)
        found[class_.name] = one.with_measures(values)
    return found


def _overlap(one: Metrics) -> dict[str, float | None]:
    return {
        "precision": one.tp / one.n_pred if one.n_pred else None,
        "recall": one.tp / one.n_ref if one.n_ref else None,
        "volume_error": (one.n_pred - one.n_ref) / one.n_ref if one.n_ref else None,
    }


def _of_empty(one: Metrics, asked: Measures, diagonal: float) -> dict[str, float | None]:
    """Return the values where one mask or both are empty."""
    nothing = not one.n_pred and not one.n_ref
    values: dict[str, float | None] = {}
    if "surface" in asked.kinds:
        values = {"surface_dice": 0.0, "hd95": diagonal, "average_surface_distance": diagonal}
    if "centreline" in asked.kinds:
        values["centreline_dice"] = 0.0
    if nothing:
        values = dict.fromkeys(values)
        if "objects" in asked.kinds:
            values |= {"object_sensitivity": None, "false_objects": 0.0, "panoptic_quality": None}
    return values


def _box(class_: LabelClass, parts: Sequence[Slices | None], shape: Sequence[int]) -> Slices | None:
    """Return the box around a class in both label maps, and a voxel around it; None where it is in neither."""
    if 0 in class_.values:
        return tuple(slice(0, length) for length in shape)
    present = [part for part in parts if part is not None]
    if not present:
        return None
    return tuple(
        slice(max(0, min(part.start for part in axis) - 1), min(length, max(part.stop for part in axis) + 1))
        for axis, length in zip(zip(*present, strict=True), shape, strict=True)
    )


def _mask(labels: NDArray[Any], class_: LabelClass) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = labels == class_.values[0]
    for value in class_.values[1:]:
        mask |= labels == value
    return mask


def _centreline_dice(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """Return the harmonic mean of how much of each centre line lies in the other mask (Shit et al. 2021)."""
    skeletonize = _skeletonize()
    lines = [skeletonize(mask) for mask in (prediction, reference)]
    first, second = (
        int(np.count_nonzero(line & other)) / max(1, int(np.count_nonzero(line)))
        for line, other in zip(lines, (reference, prediction), strict=True)
    )
    return 2 * first * second / (first + second) if first + second else 0.0


def _skeletonize() -> Any:
    try:
        from skimage.morphology import skeletonize
    except ImportError:
        raise InputError("centre lines need scikit-image, which is not installed", _SKELETONS) from None
    return skeletonize


_SKELETONS = 'pip install "segfit[skeletons]"'
