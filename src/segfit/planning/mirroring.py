"""Which axes may be flipped: those along which a flipped image could still be one of the dataset's.

Flipping every axis, as nnU-Net does, costs accuracy where labels differ by their place only: a flipped left
kidney is a right kidney. The rule here reads that from label names and from where the labels lie in the cases. Where
names come in pairs of left and right, the left-right axis may be flipped if the labels of each pair change places.

The last axis is taken for the left-right one: it is, on canonical axes and in upright pictures. Pairs by name that are
no mirror images, as the ventricles of the heart, are told from true ones only by the place of other labels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segfit.fingerprint.fingerprint import CaseFingerprint
from segfit.labels import LabelClass, LabelScheme

__all__ = ["AxisEvidence", "axis_evidence", "exchanged_values", "left_right_pairs", "value_names"]

FEWEST_CASES = 5
"""A pair of labels must be present together in this many cases before its order counts as known."""
SEPARATION = 2.0
"""The mean distance of two labels along an axis, in standard deviations, from which on their order is informative."""
SMALLEST_DISTANCE = 0.03
"""Smaller mean distances, as a share of the image's extent, are no order."""

_SIDES = {"left": "right", "l": "r", "lt": "rt", "lh": "rh", "sin": "dex", "sinister": "dexter"}
_Places = NDArray[np.float64]
_SWAPPED = _SIDES | {right: left for left, right in _SIDES.items()}


@dataclass(frozen=True, slots=True)
class AxisEvidence:
    """What speaks against flipping one axis (array order); `reason` is empty where nothing does."""

    axis: int
    reason: str
    exchanged: tuple[tuple[int, int], ...] = ()  # inner label values that change places when it is flipped
    two_sided: tuple[str, ...] = ()  # names of one side whose labels lie on both

    @property
    def mirrored(self) -> bool:
        """Whether the axis may be flipped."""
        return not self.reason


def value_names(labels: LabelScheme) -> dict[int, str]:
    """Return a readable name for every foreground label value."""
    stored = labels.stored_values
    names = {value: f"label {stored[value]}" for value in labels.foreground_values}
    names |= {class_.values[0]: class_.name for class_ in labels.labels if len(class_.values) == 1}
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


def exchanged_values(labels: LabelScheme) -> tuple[tuple[int, int], ...]:
    """Return pairs of inner values that change places with left and right, ascending; empty where there are none.

    Empty too where regions do not pair up: every value must have exactly one partner in the partners of its regions.
    """
    pairs = left_right_pairs([class_.name for class_ in labels.classes])
    partner = dict(pairs) | {right: left for left, right in pairs}
    if len(partner) < 2 * len(pairs):
        return ()  # two names that read alike
    regions = {v: {item.name for item in labels.classes if v in item.values} for v in labels.foreground_values}
    result = set()
    for value, names in regions.items():
        wanted = {partner.get(name, name) for name in names}
        found = [other for other, theirs in regions.items() if theirs == wanted]
        if wanted != names and len(found) != 1:
            return ()
        if wanted != names:
            result.add((min(value, found[0]), max(value, found[0])))
    return tuple(sorted(result))


def axis_evidence(
    cases: Sequence[CaseFingerprint], labels: LabelScheme, ndim: int, *, sides_known: bool = True
) -> tuple[AxisEvidence, ...]:
    """Return for every axis (array order) whether flipping it would destroy what tells two labels apart.

    An axis is kept as it is when two labels keep their order along it: the mean of their distance over cases is more
    than twice its standard deviation and more than 3 % of the extent. The left-right axis, the last one, is judged with
    the pairs of left and right merged into one label each, at the middle between the two, because these change places;
    the order of two pairs does not count. It is kept where a name says one side and none the other, unless that label
    is seen to lie on both sides: on average at most 3 % of the extent from the middle of the pairs.

    `sides_known` False: the last axis need not be the left-right one, so that nothing may change places.
    """
    places = [_places(axis, cases, labels.foreground_values) for axis in range(ndim)]
    names = value_names(labels)
    titles = [f'"{names[value]}"' for value in labels.foreground_values]
    evidence = [AxisEvidence(axis, _clearest_order(places[axis], titles)) for axis in range(ndim - 1)]
    return (*evidence, _left_right_evidence(ndim - 1, places[-1], titles, labels, sides_known=sides_known))


def _left_right_evidence(
    axis: int, place: _Places, titles: Sequence[str], labels: LabelScheme, *, sides_known: bool
) -> AxisEvidence:
    """Return the evidence on the left-right axis; `place` and `titles` are those of the foreground values."""
    pairs, exchanged = left_right_pairs([class_.name for class_ in labels.classes]), exchanged_values(labels)
    column = {value: index for index, value in enumerate(labels.foreground_values)}
    middles = [(place[:, column[a]] + place[:, column[b]]) / 2 for a, b in exchanged]
    two_sided = []
    for class_ in _without_partner(labels.classes, pairs):
        if len(class_.values) > 1 or not _in_the_middle(place[:, column[class_.values[0]]], middles):
            return AxisEvidence(axis, f'the name "{class_.name}" says one side, and none says the other')
        two_sided.append(class_.name)
    if pairs and not (exchanged and sides_known):
        left, right = pairs[0]
        why = "their regions do not pair up" if sides_known else "on stored axes none is known to run left to right"
        return AxisEvidence(axis, f'the names "{left}" and "{right}" tell sides apart, and {why}')
    alone = [value for value in column if not any(value in pair for pair in exchanged)]
    merged = np.column_stack([*(place[:, column[value]] for value in alone), *middles])
    merged_titles = [titles[column[value]] for value in alone]
    merged_titles += [f"the middle of {titles[column[a]]} and {titles[column[b]]}" for a, b in exchanged]
    order = _clearest_order(merged, merged_titles, pairs_from=len(alone))
    return AxisEvidence(axis, order) if order else AxisEvidence(axis, "", exchanged, tuple(two_sided))


def _without_partner(classes: Sequence[LabelClass], pairs: Sequence[tuple[str, str]]) -> list[LabelClass]:
    """Return what is named after one side while no name is for the other; a letter alone says none (vertebra L1)."""
    paired = {name for pair in pairs for name in pair}
    words = {word for word in _SWAPPED if len(word) > 1}
    return [item for item in classes if item.name not in paired and not words.isdisjoint(_words(item.name))]


def _in_the_middle(place: _Places, middles: Sequence[_Places]) -> bool:
    """Whether a label `(cases,)` lies on both sides of the mean middle of the pairs, as far as its centre tells."""
    if not middles:
        return False
    known = np.isfinite(middles)
    count = known.sum(0)
    midline = np.where(known, middles, 0.0).sum(0) / np.where(count > 0, count, np.nan)
    offset = (place - midline)[np.isfinite(place - midline)]
    return len(offset) >= FEWEST_CASES and abs(float(offset.mean())) <= SMALLEST_DISTANCE


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def _places(axis: int, cases: Sequence[CaseFingerprint], values: Sequence[int]) -> _Places:
    """Return where the labels lie along an axis, `(cases, values)` in shares of the extent; NaN where they do not."""
    rows = [[case.label_centroids[v][axis] if v in case.label_centroids else np.nan for v in values] for case in cases]
    return np.array(rows, dtype=float).reshape(len(cases), len(values))


def _clearest_order(place: _Places, titles: Sequence[str], *, pairs_from: int | None = None) -> str:
    """Return the sentence about the two labels whose order is clearest, or an empty string.

    From column `pairs_from` on they are middles of pairs: their order among each other says nothing, since none of the
    labels could be taken for one of another pair, and a head held aslant is enough for it.
    Sums over cases are matrix products over label pairs: with n cases of L labels that is one (L, n) x (n, L) each.
    """
    if len(titles) < 2:
        return ""
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
    if pairs_from is not None:
        informative[pairs_from:, pairs_from:] = False
    if not informative.any():
        return ""
    clarity = np.where(informative, mean / np.maximum(std, 1e-6), -1.0)
    a, b = divmod(int(clarity.argmax()), len(titles))
    return (
        f"{titles[a]} lies {mean[a, b]:.0%} of the extent beyond {titles[b]} "
        f"(standard deviation {std[a, b]:.0%}, {int(together[a, b])} cases)"
    )
