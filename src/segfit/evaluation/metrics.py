"""Overlap of a predicted and a reference label map, per class.

Everything is read off one joint histogram of reference and predicted values, so the cost is one pass over the voxels
however many classes there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from segfit.errors import InputError
from segfit.files import GrownRecord
from segfit.labels import LabelClass, LabelScheme

__all__ = ["Metrics", "case_metrics", "joint_histogram", "metrics_from_histogram"]

# Voxels per block of the histogram: its temporaries stay in the processor's cache.
_BLOCK = 1 << 18


class Metrics(GrownRecord):
    """Agreement in one class of one case, in voxels. `dice` and `iou` are None where both masks are empty.

    `measures` are those of `segfit.evaluation.measures`, by name, as far as they were asked for.
    """

    LATER: ClassVar[frozenset[str]] = frozenset({"measures"})

    tp: int
    fp: int
    fn: int
    tn: int
    n_pred: int
    n_ref: int
    dice: float | None
    iou: float | None
    measures: dict[str, float | None] = {}

    @classmethod
    def from_counts(cls, tp: int, fp: int, fn: int, tn: int) -> Metrics:
        """Derive the remaining values: Dice = 2TP / (2TP + FP + FN), IoU = TP / (TP + FP + FN)."""
        union = tp + fp + fn
        return cls(
            tp=tp,
            fp=fp,
            fn=fn,
            tn=tn,
            n_pred=tp + fp,
            n_ref=tp + fn,
            dice=2 * tp / (union + tp) if union else None,
            iou=tp / union if union else None,
        )

    @property
    def values(self) -> dict[str, float | None]:
        """Dice, IoU and whatever else was measured, by name."""
        return {"dice": self.dice, "iou": self.iou, **self.measures}

    def with_measures(self, measures: Mapping[str, float | None]) -> Metrics:
        """Return them with more that was measured."""
        return self.model_copy(update={"measures": dict(measures)})


def case_metrics(prediction: NDArray[Any], reference: NDArray[Any], scheme: LabelScheme) -> dict[str, Metrics]:
    """Score a prediction against its reference, by name of the class.

    Parameters
    ----------
    prediction, reference : integer label maps of equal shape, any number of axes
    scheme : its classes are evaluated; a region is the union of its labels

    Voxels whose reference carries the ignore label are left out. Values that the scheme does not know count as
    background. Raises `InputError` for label maps that are not integer, that are negative somewhere, or whose shapes
    differ.
    """
    return metrics_from_histogram(joint_histogram(prediction, reference, scheme), scheme.classes)


def joint_histogram(prediction: NDArray[Any], reference: NDArray[Any], scheme: LabelScheme) -> NDArray[np.int64]:
    """Count the voxels for every pair of values: entry ``[r, p]`` has reference value r and predicted value p.

    The last row and column collect the values that the scheme does not know; the row of the ignore label is zero.
    Histograms of disjoint parts of an image can be added. Errors as in `case_metrics`.
    """
    if prediction.shape != reference.shape:
        raise InputError(f"the prediction has shape {prediction.shape} and the reference {reference.shape}")
    for role, array in (("prediction", prediction), ("reference", reference)):
        if array.dtype.kind not in "biu":
            raise InputError(f"the {role} must be an integer label map, it has the type {array.dtype}")
    unknown = max(*scheme.all_values, scheme.ignore_value or 0) + 1
    size = unknown + 1
    histogram = np.zeros(size * size, dtype=np.int64)
    predicted, expected = prediction.reshape(-1), reference.reshape(-1)
    for start in range(0, predicted.size, _BLOCK):
        p = _known(predicted[start : start + _BLOCK], unknown)
        r = _known(expected[start : start + _BLOCK], unknown)
        histogram += np.bincount(r * size + p, minlength=size * size)
    result = histogram.reshape(size, size)
    if scheme.ignore_value is not None:
        result[scheme.ignore_value] = 0
    return result


def metrics_from_histogram(histogram: NDArray[np.int64], classes: Sequence[LabelClass]) -> dict[str, Metrics]:
    """Read the metrics of the classes off a joint histogram, by name."""
    total = int(histogram.sum())
    found: dict[str, Metrics] = {}
    for class_ in classes:
        values = list(class_.values)
        tp = int(histogram[np.ix_(values, values)].sum())
        n_ref = int(histogram[values].sum())
        n_pred = int(histogram[:, values].sum())
        fp, fn = n_pred - tp, n_ref - tp
        found[class_.name] = Metrics.from_counts(tp, fp, fn, total - tp - fp - fn)
    return found


def _known(block: NDArray[Any], unknown: int) -> NDArray[np.int64]:
    """Return the values as int64, those above the known ones replaced by `unknown`."""
    values = block.astype(np.int64)
    if values.min() < 0:
        raise InputError(f"label values must not be negative, found {values.min()}", "store the labels as unsigned")
    return np.minimum(values, unknown, out=values)
