"""Labels that number objects instead of naming classes: how they are told, and the classes that are made of them.

Programs that separate cells, and people who count lesions, give every object of an image a number of its own. Such
numbers run from 1 in every image, or no image has one of another; each is one connected area, and how many there are
differs from case to case. Classes, left out in some cases as they may be, leave gaps, lie in several parts, end at the
same value, and come back in other cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.labels import LabelScheme

__all__ = ["FEWEST_OBJECTS", "ObjectNumbers", "as_classes", "count_areas", "object_numbers"]

_FEWEST_COUNTED = 3  # different values of a case whose areas are counted: with fewer they tell nothing
_FEWEST_CASES = 3
FEWEST_OBJECTS = 5  # in the case with most, to be sure; with 3 or 4 there is a doubt (assumption)
_EXACT_BELOW = 10  # objects; numbers of so few have no gaps
_COMPACT = 0.8  # share of the numbers up to the highest that occur: some objects are cropped away (assumption)
_PARTS = 1.25  # connected areas per number, at most: some objects are cut in two by others (assumption)
_UNIQUE = 0.9  # share of different ones among the numbers of all cases, where they are never used again (assumption)
_SPREAD = 1.5  # highest number of one case to that of another, from which on they differ (assumption)


@dataclass(frozen=True, slots=True)
class ObjectNumbers:
    """That label files number objects, by two of them."""

    fewest: tuple[str, int]  # the case with fewest objects, and how many it has
    most: tuple[str, int]
    certain: bool  # False: there are so few that they may be classes


def count_areas(labels: NDArray[np.integer[Any]], values: Iterable[int]) -> int | None:
    """Return how many connected areas the values of a label map (1, *spatial) form; None for few values."""
    if sum(value > 0 for value in values) < _FEWEST_COUNTED:
        return None
    import cc3d

    found = labels[0] if labels.min() >= 0 else np.maximum(labels[0], 0)
    neighbours = 26 if found.ndim == 3 else 8
    _, areas = cc3d.connected_components(np.ascontiguousarray(found), connectivity=neighbours, return_N=True)
    return int(areas)


def object_numbers(cases: Mapping[str, tuple[Iterable[int], int | None]]) -> ObjectNumbers | None:
    """Return whether the label files of a dataset number objects; None if they do not.

    Parameters
    ----------
    cases : of each labelled case its values, and what `count_areas` returned for them
    """
    values = {name: sorted(value for value in found if value > 0) for name, (found, _) in cases.items()}
    values = {name: found for name, found in values.items() if found}
    counts = {name: len(found) for name, found in values.items()}
    if len(values) < _FEWEST_CASES or len(set(counts.values())) < _FEWEST_CASES:
        return None
    counted = [(counts[name], areas) for name, (_, areas) in cases.items() if areas is not None and name in counts]
    if not counted or sum(areas for _, areas in counted) > _PARTS * sum(number for number, _ in counted):
        return None
    if not (_run_from_one(list(values.values())) or _are_unique(list(values.values()))):
        return None
    fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    return ObjectNumbers((fewest, counts[fewest]), (most, counts[most]), counts[most] >= FEWEST_OBJECTS)


def _run_from_one(cases: Sequence[Sequence[int]]) -> bool:
    """Whether the numbers of every case run from 1 to another one, so that no case only lacks some of many classes."""
    highest = [found[-1] for found in cases]
    exact = [len(found) == found[-1] for found in cases]
    if not all(
        whole or (top >= _EXACT_BELOW and len(found) >= _COMPACT * top)
        for found, top, whole in zip(cases, highest, exact, strict=True)
    ):
        return False
    ends = {top for top, whole in zip(highest, exact, strict=True) if whole}
    differ = 2 * sum(exact) >= len(cases) and len(ends) >= _FEWEST_CASES
    return differ or max(highest) >= _SPREAD * min(highest)


def _are_unique(cases: Sequence[Sequence[int]]) -> bool:
    """Whether hardly a number of any case is in another one too, as classes are."""
    several = max(map(len, cases)) >= FEWEST_OBJECTS
    return several and len({value for found in cases for value in found}) >= _UNIQUE * sum(map(len, cases))


def as_classes(labels: NDArray[np.integer[Any]], scheme: LabelScheme, *, boundary: bool) -> NDArray[np.integer[Any]]:
    """Return inner values (1, *spatial) of one that numbers objects: 1 for all; with `boundary` 1 inside, 2 at the rim.

    The rim of an object is one voxel wide and lies inside it: its voxels that share a face with another object, with
    the background or with the edge of the image, as in the nuclei of the Data Science Bowl with interior and boundary.
    Values below 0 become one that no class has; the ignore value stays.

    Parameters
    ----------
    scheme : that of `LabelScheme.of_objects`
    """
    ignored = np.zeros(labels.shape, bool)
    if scheme.ignore_value is not None:
        ignored = labels == scheme.stored_values[scheme.ignore_value]
    objects = (labels > 0) & ~ignored
    result: NDArray[np.integer[Any]] = objects.astype(np.int16)
    if boundary:
        rim = np.zeros(labels.shape, bool)
        for axis in range(1, labels.ndim):
            numbers, at = np.moveaxis(labels, axis, 0), np.moveaxis(rim, axis, 0)
            apart = numbers[:-1] != numbers[1:]
            at[:-1] |= apart
            at[1:] |= apart
            at[0] = at[-1] = True
        result[objects & rim] = 2
    result[labels < 0] = len(scheme.stored_values)
    if scheme.ignore_value is not None:
        result[ignored] = scheme.ignore_value
    return result
