"""Which cases train and which validate.

The reference's splits, exactly: five folds of scikit-learn's shuffled ``KFold`` on the sorted case ids, seed 12345
(``splits_final.json``). Where it gives up (fewer than five cases), fewer folds are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segfit.errors import InputError
from segfit.files import Document, Record, read_json

__all__ = ["Fold", "Splits", "fallback_split", "make_splits", "read_reference_splits"]

_SEED = 12345  # the reference's
_FALLBACK_SHARE = 0.8  # the reference's share of training cases for a fold that its file does not list


class Fold(Record):
    """Case ids of one cross-validation fold."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


class Splits(Document):
    """The folds of a dataset."""

    folds: tuple[Fold, ...]

    def to_reference(self) -> list[dict[str, list[str]]]:
        """Return the content of the reference's ``splits_final.json``."""
        return [{"train": list(fold.train), "val": list(fold.validation)} for fold in self.folds]


def make_splits(case_ids: Sequence[str], num_folds: int = 5, seed: int = _SEED) -> Splits:
    """Return `num_folds` folds; every case validates in exactly one of them.

    With fewer cases than folds each case is left out once; a single case trains and validates itself. The order of
    `case_ids` does not matter. Raises `InputError` without any case.
    """
    ids = _sorted_unique(case_ids)
    if len(ids) == 1:
        return Splits(folds=(Fold(train=ids, validation=ids),))
    # Legacy generator: only it reproduces the reference's folds.
    shuffled = np.arange(len(ids))
    np.random.RandomState(seed).shuffle(shuffled)
    folds: list[Fold] = []
    for part in np.array_split(shuffled, min(num_folds, len(ids))):
        chosen = set(part.tolist())
        train = tuple(name for i, name in enumerate(ids) if i not in chosen)
        folds.append(Fold(train=train, validation=tuple(ids[i] for i in sorted(chosen))))
    return Splits(folds=tuple(folds))


def fallback_split(case_ids: Sequence[str], fold: int, seed: int = _SEED) -> Fold:
    """Return the reference's 80:20 split for a fold number that a splits file does not list; `train` is as drawn."""
    ids = _sorted_unique(case_ids)
    generator = np.random.RandomState(seed + fold)  # legacy, as above
    drawn = generator.choice(len(ids), int(_FALLBACK_SHARE * len(ids)), replace=False)
    train = tuple(ids[i] for i in drawn)
    return Fold(train=train, validation=tuple(name for name in ids if name not in set(train)))


def read_reference_splits(path: Path, case_ids: Sequence[str]) -> Splits:
    """Read a ``splits_final.json`` that came with a dataset, with any number of folds.

    Raises `InputError` if it is not in the reference's form, names unknown cases, or has an empty part.
    """
    raw: Any = read_json(path)
    form = '[{"train": [CASE, ...], "val": [CASE, ...]}, ...]'
    known = set(case_ids)
    folds: list[Fold] = []
    for number, entry in enumerate(raw if isinstance(raw, list) else ()):
        parts = [entry.get(key) if isinstance(entry, dict) else None for key in ("train", "val")]
        for part in parts:
            if not isinstance(part, list) or not part or not all(isinstance(name, str) for name in part):
                raise InputError(f"fold {number} of {path} must be like {form}; correct it or delete the file")
            unknown = [name for name in part if name not in known]
            if unknown:
                raise InputError(f"fold {number} of {path} names the case {unknown[0]!r}, which the dataset lacks")
        folds.append(Fold(train=tuple(parts[0] or ()), validation=tuple(parts[1] or ())))
    if not folds:
        raise InputError(f"{path} must hold folds like {form}; correct it or delete the file")
    return Splits(folds=tuple(folds))


def _sorted_unique(case_ids: Sequence[str]) -> tuple[str, ...]:
    ids = tuple(sorted(set(case_ids)))
    if not ids:
        raise InputError("a split needs at least one case; the dataset has none")
    return ids
