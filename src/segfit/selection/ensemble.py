"""Ensembles of configurations: the mean of their probabilities on the grid of the image.

Folds of one configuration are averaged as logits by the predictor; here different configurations meet, whose logits
live on different grids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.errors import InputError
from segfit.evaluation.metrics import Scores, case_metrics
from segfit.evaluation.summary import Pair, Summary, summarize
from segfit.execution.pool import map_cases
from segfit.labels import LabelScheme
from segfit.progress import SILENT, Progress

__all__ = ["Member", "average_probabilities", "evaluate_ensembles", "merge_labels", "merged_pairs"]

# Voxels per slab of a merged label map.
_SLAB = 1 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """One configuration and its cross-validated probabilities.

    Parameters
    ----------
    name : name of the configuration
    probabilities : by case id, a function that loads ``(num_outputs, *spatial)`` floats on the grid of the reference;
        anything that slices like an array will do, so that large volumes can stay on disk
    """

    name: str
    probabilities: Mapping[str, Callable[[], NDArray[Any]]]


def average_probabilities(members: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """Return the mean of probability arrays of equal shape, added in float32 in the order given."""
    total = np.array(members[0], dtype=np.float32)
    for member in members[1:]:
        if member.shape != total.shape:
            raise InputError(f"members of an ensemble must have equal shapes, got {total.shape} and {member.shape}")
        total += member
    total /= np.float32(len(members))
    return total


def merge_labels(members: Sequence[NDArray[Any]], scheme: LabelScheme) -> NDArray[np.unsignedinteger[Any]]:
    """Return the label map of the averaged probabilities ``(num_outputs, *spatial)``, slab by slab along axis 1."""
    thickness = max(1, _SLAB // int(np.prod(members[0].shape[2:])))
    slabs = [
        scheme.to_labels(average_probabilities([member[:, i : i + thickness] for member in members]), activated=True)
        for i in range(0, members[0].shape[1], thickness)
    ]
    return np.concatenate(slabs)


def merged_pairs(members: Sequence[Member], references: Sequence[Pair], scheme: LabelScheme) -> list[Pair]:
    """Return pairs whose prediction is the members' ensemble, computed when it is loaded.

    `references` gives the cases and their references; its predictions are not looked at.
    """
    _check_cases(members, references)

    def merge(case: str) -> Callable[[], NDArray[Any]]:
        return lambda: merge_labels([member.probabilities[case]() for member in members], scheme)

    return [
        Pair(pair.case, merge(pair.case), pair.load_reference, reference_file=pair.reference_file)
        for pair in references
    ]


def evaluate_ensembles(
    members: Sequence[Member],
    references: Sequence[Pair],
    scheme: LabelScheme,
    *,
    workers: int | None = None,
    progress: Progress = SILENT,
) -> dict[tuple[str, str], Summary]:
    """Score the ensemble of every two members by cross-validation, in the order of `itertools.combinations`.

    Every case is loaded once for all pairs and averaged slab by slab, so little beside the members' arrays is held.
    Raises `InputError` if a member lacks a case.
    """
    _check_cases(members, references)
    chosen = list(combinations(range(len(members)), 2))

    def score(pair: Pair) -> list[dict[str, Scores]]:
        reference = pair.load_reference()
        arrays = [member.probabilities[pair.case]() for member in members]
        for member, array in zip(members, arrays, strict=True):
            expected = (scheme.num_outputs, *reference.shape)
            if array.shape != expected:
                raise InputError(
                    f"case {pair.case}: the probabilities of {member.name} have shape {array.shape}, expected "
                    f"{expected}; validate this configuration again"
                )
        return [case_metrics(merge_labels([arrays[a], arrays[b]], scheme), reference, scheme) for a, b in chosen]

    results = map_cases(
        score,
        references,
        description="evaluating ensembles",
        name=lambda pair: pair.case,
        workers=workers,
        progress=progress,
    )
    found = {pair.case: scores for pair, scores in results}
    computed = [replace(pair, prediction_file="") for pair in references]
    return {
        (members[a].name, members[b].name): summarize(
            [pair.scored(found[pair.case][index]) for pair in computed], scheme.targets
        )
        for index, (a, b) in enumerate(chosen)
    }


def _check_cases(members: Sequence[Member], references: Sequence[Pair]) -> None:
    for member in members:
        missing = [pair.case for pair in references if pair.case not in member.probabilities]
        if missing:
            raise InputError(
                f"{member.name} has no probabilities of {len(missing)} case(s), first {missing[0]}; "
                "validate all folds of it or leave it out of the ensemble"
            )
