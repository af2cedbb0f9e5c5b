"""How good a prediction is likely to be, without a reference: a predicted Dice per class.

A class is described by three numbers of a prediction's probabilities (`Traits`). How they go with Dice is learned from
predictions of cases that the networks had not seen, as the odds of Dice: first of all what the probabilities
themselves expect, put right by a line of which no number can turn the wrong way.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.evaluation.measurement import Margin
from segfit.files import Record

__all__ = ["FEWEST_GROUPS", "LOW", "ClassQuality", "QualityFit", "Traits", "mean_traits"]

LOW = 0.7
"""Predicted Dice below which a case is to be looked at."""
FEWEST_GROUPS = 5  # say how traits go with Dice
_MOST = math.log(0.995 / 0.005)  # of the logarithm of odds: Dice of 0 and 1 have none
_EXPECTED = np.array([1.0, 0.0, 0.0])  # slopes, before anything was seen
_LOWER, _UPPER = (-np.inf, 0.0, 0.0, -np.inf), (np.inf, np.inf, np.inf, 0.0)  # of constant and slopes
_RIDGE = 1.0  # how many cases that lie 1 away the expected slopes are worth
_FARTHEST = 5.0  # deviations of a size that count


class Traits(Record):
    """What the probabilities of a prediction say of one class."""

    soft_dice: float  # that the probabilities expect of the labels made of them
    step: float  # mean change of the probability from voxel to voxel across the outline; 0 without one
    size: float  # mm^3 or mm^2, 0 where nothing was found


class ClassQuality(Record):
    """The predicted Dice of one class; `low` to `high` holds the true one with `confidence`.

    `dice` is None where nothing was found and there may be nothing; the interval is where there are too few groups.
    """

    name: str
    dice: float | None
    low: float | None = None
    high: float | None = None
    confidence: float | None = None


class QualityFit(Record):
    """How traits of a class go with its Dice."""

    constant: float
    slopes: tuple[float, float, float]  # of the logarithms of the odds of `soft_dice` and `step`, and of odd sizes
    log_size: float
    log_size_deviation: float
    margin: Margin  # by what factor the odds of Dice may be off
    always: bool  # whether every reference has the class

    @classmethod
    def of(
        cls, traits: Mapping[str, Traits], dice: Mapping[str, float], groups: Mapping[str, str], *, always: bool
    ) -> QualityFit | None:
        """Learn from cases; None if those in which something was found are of fewer than `FEWEST_GROUPS` groups.

        The margin is conformal, from how far fits without a group are off in that group.
        """
        cases = [case for case in traits if case in dice and traits[case].size > 0]
        of = np.array([groups.get(case) or f"\0{case}" for case in cases])
        names = sorted(set(of.tolist()))
        if len(names) < FEWEST_GROUPS:
            return None
        logs = np.log([traits[case].size for case in cases])
        middle, deviation = float(np.median(logs)), float(max(logs.std(), 0.05))
        rows = np.array([_row(traits[case], middle, deviation) for case in cases])
        wanted = np.array([_logit(dice[case]) for case in cases])
        pairs: dict[str, tuple[float, float]] = {}
        for name in names:
            own = of == name
            constant, slopes = _line(rows[~own], wanted[~own])
            predicted = (constant + rows[own] @ slopes).clip(-_MOST, _MOST)
            for case, one, true in zip(np.array(cases)[own].tolist(), predicted, wanted[own], strict=True):
                pairs[case] = math.exp(one), math.exp(true)
        constant, slopes = _line(rows, wanted)
        return cls(
            constant=constant,
            slopes=(float(slopes[0]), float(slopes[1]), float(slopes[2])),
            log_size=middle,
            log_size_deviation=deviation,
            margin=Margin.of(pairs, groups),
            always=always,
        )

    def predict(self, name: str, traits: Traits) -> ClassQuality:
        """Return the predicted Dice of a class of this name."""
        if traits.size <= 0:
            return ClassQuality(name=name, dice=0.0 if self.always else None)
        row = _row(traits, self.log_size, self.log_size_deviation)
        odds = math.exp(float(np.clip(self.constant + row @ self.slopes, -_MOST, _MOST)))
        factor, confidence = self.margin.factor_95, 0.95
        if factor is None:
            factor, confidence = self.margin.factor_90, 0.9
        if factor is None:
            return ClassQuality(name=name, dice=_share(odds))
        low, high = _share(odds / factor), _share(odds * factor)
        return ClassQuality(name=name, dice=_share(odds), low=low, high=high, confidence=confidence)


def mean_traits(members: Sequence[Mapping[str, Traits]]) -> dict[str, Traits]:
    """Return the mean traits by class of several configurations that predict together."""
    found: dict[str, list[Traits]] = defaultdict(list)
    for member in members:
        for name, traits in member.items():
            found[name].append(traits)
    return {
        name: Traits(**{key: math.fsum(getattr(one, key) for one in every) / len(every) for key in Traits.model_fields})
        for name, every in found.items()
    }


def _logit(share: float) -> float:
    share = min(max(share, 0.005), 0.995)
    return math.log(share / (1 - share))


def _share(odds: float) -> float:
    return odds / (1 + odds)


def _row(traits: Traits, log_size: float, deviation: float) -> NDArray[np.float64]:
    odd = min(abs(math.log(traits.size) - log_size) / deviation, _FARTHEST)
    return np.array([_logit(traits.soft_dice), _logit(traits.step), max(0.0, odd - 2)])


def _line(rows: NDArray[np.float64], wanted: NDArray[np.float64]) -> tuple[float, NDArray[Any]]:
    """Return constant and slopes by least squares that hold slopes near what is expected, and at the right sign."""
    from scipy.optimize import lsq_linear

    centre = rows.mean(axis=0)
    matrix = np.vstack([np.c_[np.ones(len(rows)), rows - centre], np.c_[np.zeros(3), math.sqrt(_RIDGE) * np.eye(3)]])
    target = np.concatenate([wanted, math.sqrt(_RIDGE) * _EXPECTED])
    found = lsq_linear(matrix, target, bounds=(_LOWER, _UPPER), method="bvls").x
    return float(found[0] - found[1:] @ centre), found[1:]
