"""The folds that are asked for, and whether a cascade can be trained with them."""

from __future__ import annotations

from collections.abc import Sequence

from segfit.dataset.splits import Splits
from segfit.errors import InputError
from segfit.options import CASCADE

__all__ = ["cascade_problem", "folds_of"]


def folds_of(asked: tuple[int, ...] | None, num_folds: int) -> tuple[int, ...]:
    """Return the folds that were asked for, or all."""
    folds = tuple(range(num_folds)) if asked is None else asked
    if not folds or not set(folds) <= set(range(num_folds)):
        raise InputError(f"planning.folds must be among 0 to {num_folds - 1} for this dataset, got {list(folds)}")
    return folds


def cascade_problem(splits: Splits, folds: Sequence[int]) -> InputError | None:
    """Return why a cascade cannot be trained, if so: each case needs a network of the first stage that never saw it."""
    number, asked = len(splits.folds), len(set(folds))
    if asked < number:
        return InputError(
            f"{CASCADE} is trained on what all {number} folds of 3d_lowres predict, planning.folds has {asked}",
            f"leave planning.folds out, or set planning.folds={','.join(str(fold) for fold in range(number))}",
        )
    held_out = {case for fold in splits.folds for case in fold.validation}
    never = sorted({case for fold in splits.folds for case in fold.train} - held_out)
    if never:
        return InputError(
            f"{CASCADE} is trained on what 3d_lowres predicts for held-out cases, and no fold holds out {never[0]}",
            "use folds that hold out every case once",
        )
    return None
