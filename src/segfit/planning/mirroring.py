"""Which axes may be flipped: those along which a flipped image could still be one of the dataset's.

Flipping every axis, as the reference does, costs accuracy where labels differ by their place only: a flipped left
kidney is a right kidney. The rule here reads that from label names and from where the labels lie in the cases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from segfit.fingerprint.fingerprint import CaseFingerprint
from segfit.labels import LabelScheme

__all__ = ["AxisEvidence", "axis_evidence", "left_right_pairs", "value_names"]

FEWEST_CASES = 5
"""A pair of labels must be present together in this many cases before its order counts as known."""
SEPARATION = 2.0
"""The mean distance of two labels along an axis, in standard deviations, from which on their order is informative."""
SMALLEST_DISTANCE = 0.03
"""Smaller mean distances, as a share of the image's extent, are no order."""

_SIDES = {"left": "right", "l": "r", "lt": "rt", "lh": "rh", "sin": "dex", "sinister": "dexter"}
_SWAPPED = _SIDES | {right: left for left, right in _SIDES.items()}


@dataclass(frozen=True, slots=True)
class AxisEvidence:
    """What speaks against flipping one axis (array order); `reason` is empty where nothing does."""

    axis: int
    reason: str

    @property
    def mirrored(self) -> bool:
        """Whether the axis may be flipped."""
        return not self.reason


def value_names(labels: LabelScheme) -> dict[int, str]:
    """Return a readable name for every foreground label value."""
    names = {value: f"label {labels.stored_values[value]}" for value in labels.foreground_values}
    names |= {target.values[0]: target.name for target in labels.labels if len(target.values) == 1}
    names.pop(0, None)
    return names


def left_right_pairs(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return pairs of names that differ only by left and right: ``left kidney``, ``KidneyLeft``, ``l_kidney``..."""
    words = {name: tuple(_words(name)) for name in names}
    by_words = {value: name for name, value in words.items()}
    pairs: set[tuple[str, str]] = set()
    for name, parts in words.items():
        swapped = tuple(_SWAPPED.get(part, part) for part in parts)
        partner = by_words.get(swapped)
        if swapped != parts and partner is not None:
            left_first = any(part in _SIDES for part in parts)
            pairs.add((name, partner) if left_first else (partner, name))
    return tuple(sorted(pairs))


def axis_evidence(cases: Sequence[CaseFingerprint], labels: LabelScheme, ndim: int) -> tuple[AxisEvidence, ...]:
    """Return for every axis (array order) whether flipping it would destroy what tells two labels apart.

    An axis is kept as it is when label names hold a left/right pair and it is the left-right axis (the last one), or
    when two labels keep their order along it: the mean of their distance over cases is more than twice its standard
    deviation and more than 3 % of the extent.
    """
    reasons = [_order_along(axis, cases, value_names(labels)) for axis in range(ndim)]
    pairs = left_right_pairs([target.name for target in labels.targets])
    if pairs:
        left, right = pairs[0]
        reasons[-1] = f'the names "{left}" and "{right}" tell sides apart'
    return tuple(AxisEvidence(axis, reason) for axis, reason in enumerate(reasons))


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def _order_along(axis: int, cases: Sequence[CaseFingerprint], names: Mapping[int, str]) -> str:
    """Return the sentence about the two labels whose order along `axis` is clearest, or an empty string.

    Sums over cases are matrix products over label pairs: with n cases of L labels that is one (L, n) x (n, L) each.
    """
    values = sorted(names)
    if len(values) < 2:
        return ""
    place = np.array([[case.label_centroids.get(v, (np.nan,) * 3)[axis] for v in values] for case in cases])
    present = np.isfinite(place).astype(float)
    place = np.where(present > 0, place, 0.0)
    together = present.T @ present
    total = place.T @ present - present.T @ place  # [a, b]: sum of place a - place b over cases with both
    squares = (place**2).T @ present - 2 * place.T @ place + present.T @ (place**2)
    known = together >= FEWEST_CASES
    count = np.where(known, together, 2.0)
    mean = total / count
    variance = np.maximum(squares - count * mean**2, 0.0) / (count - 1)
    std = np.sqrt(variance)
    informative = known & (mean > SEPARATION * std) & (mean > SMALLEST_DISTANCE)
    if not informative.any():
        return ""
    clarity = np.where(informative, mean / np.maximum(std, 1e-6), -1.0)
    a, b = np.unravel_index(int(clarity.argmax()), clarity.shape)
    return (
        f'"{names[values[a]]}" lies {mean[a, b]:.0%} of the extent beyond "{names[values[b]]}" '
        f"(standard deviation {std[a, b]:.0%}, {int(together[a, b])} cases)"
    )
