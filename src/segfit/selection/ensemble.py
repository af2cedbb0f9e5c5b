"""Ensembles of configurations: the mean of their probabilities on the grid of the image.

Folds of one configuration are averaged as logits by the predictor; here different configurations meet, whose logits
live on different grids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.errors import InputError
from segfit.evaluation.metrics import Metrics, case_metrics
from segfit.evaluation.pairs import Pair, predicted_bytes
from segfit.evaluation.summary import Summary, summarize
from segfit.execution.execution import LOCAL, Execution
from segfit.labels import LabelScheme
from segfit.text import count

__all__ = [
    "EnsembleMember",
    "StoredProbabilities",
    "average_probabilities",
    "evaluate_ensembles",
    "merge_labels",
    "merged_pairs",
]

# Voxels per slab of a merged label map.
_SLAB = 1 << 20


_Loader = Callable[[], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class StoredProbabilities:
    """Loads probabilities from a file of numpy; they stay on disk until they are sliced."""

    path: Path

    def __call__(self) -> NDArray[Any]:
        """Return the probabilities (num_outputs, *spatial), mapped."""
        probabilities: NDArray[Any] = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return probabilities

    def predicted_bytes(self) -> int:
        """Return the size of the file: all of it is looked at, and stays in memory while there is room."""
        return self.path.stat().st_size


@dataclass(frozen=True, slots=True)
class EnsembleMember:
    """One configuration and its cross-validated probabilities.

    Parameters
    ----------
    name : name of the configuration
    probabilities : by case id, a function that loads ``(num_outputs, *spatial)`` floats on the grid of the reference;
        anything that slices like an array will do. Those of `StoredProbabilities` may be loaded by other processes
    """

    name: str
    probabilities: Mapping[str, _Loader]


def average_probabilities(members: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """Return the mean of probability arrays ``(num_outputs, *spatial)``, added in float32 in the order given.

    Raises `InputError` where their shapes differ.
    """
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


def merged_pairs(members: Sequence[EnsembleMember], references: Sequence[Pair], scheme: LabelScheme) -> list[Pair]:
    """Return pairs whose prediction is the members' ensemble, computed when it is loaded.

    `references` gives the cases and their references; its predictions are not looked at.
    """
    _check_cases(members, references)
    return [
        replace(pair, load_prediction=_Merged(_loaders(members, pair.case), scheme), prediction_file="")
        for pair in references
    ]


@dataclass(frozen=True, slots=True)
class _Merged:
    """Computes the label map of an ensemble."""

    members: tuple[_Loader, ...]
    scheme: LabelScheme

    def __call__(self) -> NDArray[Any]:
        """Return the inner label values, (*spatial)."""
        return merge_labels([load() for load in self.members], self.scheme)

    def predicted_bytes(self) -> int:
        """Return what the members take; the label map, slabs and whole, takes less than the first of them."""
        return predicted_bytes((*self.members, self.members[0]))


def _loaders(members: Sequence[EnsembleMember], case: str) -> tuple[_Loader, ...]:
    return tuple(member.probabilities[case] for member in members)


def evaluate_ensembles(
    members: Sequence[EnsembleMember], references: Sequence[Pair], scheme: LabelScheme, *, execution: Execution = LOCAL
) -> dict[tuple[str, str], Summary]:
    """Score the ensemble of every two members by cross-validation, in the order of `itertools.combinations`.

    Every case is loaded once for all pairs and averaged slab by slab, so little beside the members' arrays is held.
    Raises `InputError` if a member lacks a case.
    """
    _check_cases(members, references)
    names = tuple(member.name for member in members)
    results = execution.map(
        partial(_evaluate_couples, names, scheme),
        [_Item(pair.case, pair.load_reference, _loaders(members, pair.case)) for pair in references],
        description="evaluating ensembles",
        name=lambda item: item.case,
        size=lambda item: predicted_bytes((item.reference, *item.members, item.members[0])),
    )
    found = {item.case: metrics for item, metrics in results}
    computed = [replace(pair, prediction_file="") for pair in references]
    return {
        couple: summarize([pair.with_metrics(found[pair.case][index]) for pair in computed], scheme.classes)
        for index, couple in enumerate(combinations(names, 2))
    }


@dataclass(frozen=True, slots=True)
class _Item:
    """A case and what loads its arrays."""

    case: str
    reference: _Loader
    members: tuple[_Loader, ...]


def _evaluate_couples(names: Sequence[str], scheme: LabelScheme, item: _Item) -> list[dict[str, Metrics]]:
    """Return the metrics of every two members, which have these names."""
    reference = item.reference()
    arrays = [load() for load in item.members]
    expected = (scheme.num_outputs, *reference.shape)
    for name, array in zip(names, arrays, strict=True):
        if array.shape != expected:
            raise InputError(
                f"case {item.case}: the probabilities of {name} have shape {array.shape}, expected {expected}",
                "validate this configuration again",
            )
    return [case_metrics(merge_labels(couple, scheme), reference, scheme) for couple in combinations(arrays, 2)]


def _check_cases(members: Sequence[EnsembleMember], references: Sequence[Pair]) -> None:
    for member in members:
        missing = [pair.case for pair in references if pair.case not in member.probabilities]
        if missing:
            raise InputError(
                f"{member.name} has no probabilities of {count(len(missing), 'case')}, first {missing[0]}",
                "validate all folds of it or leave it out of the ensemble",
            )
