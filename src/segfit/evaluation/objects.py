"""Objects of two masks, matched one to one: which were found, and what was found that is none."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from segfit.connected_components import components

__all__ = ["object_measures"]


def object_measures(
    prediction: NDArray[np.bool_], reference: NDArray[np.bool_], matched_iou: float
) -> dict[str, float | None]:
    """Return sensitivity, false objects and panoptic quality of the connected components of two masks.

    Components of both match where their IoU is above `matched_iou`; where one could match several, pairs with the
    largest IoU come first. Panoptic quality is the IoU of the matches, added up and divided by the mean number of
    objects in both masks. Sensitivity is None without objects in the reference, panoptic quality without any.
    """
    (found, found_sizes), (true, true_sizes) = components(prediction), components(reference)
    both = prediction & reference
    pairs = true[both].astype(np.int64) * len(found_sizes) + found[both]
    pairs, overlaps = np.unique(pairs, return_counts=True)
    rows, columns = np.divmod(pairs, len(found_sizes))
    ious = overlaps / (true_sizes[rows] + found_sizes[columns] - overlaps)
    matches: list[float] = []
    taken: tuple[set[int], set[int]] = set(), set()
    for place in np.argsort(-ious, kind="stable"):
        row, column, iou = int(rows[place]), int(columns[place]), float(ious[place])
        if iou > matched_iou and row not in taken[0] and column not in taken[1]:
            taken[0].add(row)
            taken[1].add(column)
            matches.append(iou)
    expected, predicted = len(true_sizes) - 1, len(found_sizes) - 1
    either = expected + predicted
    return {
        "object_sensitivity": len(matches) / expected if expected else None,
        "false_objects": float(predicted - len(matches)),
        "panoptic_quality": 2 * sum(matches) / either if either else None,
    }
