"""What is measured of a structure in a prediction, and how far that is from the truth.

The margins are conformal: from how far measurements of predictions that a network made of cases it never saw are from
those of the references. They hold for cases of the same kind, whatever the errors look like.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from segfit.connected_components import components
from segfit.files import Record
from segfit.geometry import Grid
from segfit.labels import LabelClass

__all__ = ["Margin", "Margins", "Measurement", "MeasurementKind", "measure", "outline_of"]

MeasurementKind = Literal["volume", "area", "diameter", "circumference"]
_LEVELS = (0.95, 0.9)  # a margin of the first that there are groups enough for is told
_CONVEX = 0.9
"""Share of the convex hull that a convex structure fills, rough edges of pixels allowed for."""


class Margin(Record):
    """By what factor a measurement may be off, either way, in 90 and in 95 % of new cases.

    None where there are too few groups of cases for that (9 and 19 are needed), or errors have no bound because
    structures were missed or made up in too many.
    """

    groups: int
    factor_90: float | None
    factor_95: float | None

    @classmethod
    def of(cls, pairs: Mapping[str, tuple[float, float]], groups: Mapping[str, str]) -> Margin:
        """Return the margin from measurements of predictions and references by case.

        Groups count alike, however many cases they have (hierarchical conformal prediction, Lee, Barber and Willett
        2023): an interval holds for a case of a group never seen. A case that is in none of `groups` is its own.
        """
        scores: dict[str, list[float]] = defaultdict(list)
        for case, (predicted, true) in pairs.items():
            if predicted or true:
                ratio = abs(math.log(true / predicted)) if predicted and true else math.inf
                scores[groups.get(case) or f"\0{case}"].append(ratio)
        return cls(groups=len(scores), factor_90=_factor(scores, 0.9), factor_95=_factor(scores, 0.95))


Margins = dict[str, dict[MeasurementKind, Margin]]
"""By class."""


def _factor(scores: Mapping[str, Sequence[float]], confidence: float) -> float | None:
    """Return the factor within which a new case lies with this confidence."""
    weighted = sorted((score, 1 / len(group)) for group in scores.values() for score in group)
    wanted, reached = confidence * (len(scores) + 1), 0.0
    for score, weight in weighted:
        reached += weight
        if reached >= wanted - 1e-9:
            return math.exp(score) if math.isfinite(score) else None
    return None


class Measurement(Record):
    """One measurement of a class in a prediction; `low` to `high` holds the true one with `confidence`, or is None."""

    name: str  # of the class
    kind: MeasurementKind
    unit: str  # ml, mm2, mm; voxels, px2, px where the image does not say how large they are
    value: float
    low: float | None = None
    high: float | None = None
    confidence: float | None = None


def measure(
    labels: NDArray[Any], grid: Grid, classes: Sequence[LabelClass], margins: Margins | None = None
) -> list[Measurement]:
    """Measure the classes of a label map (*spatial), inner values.

    Volume or area always; diameter and circumference of a picture's class where `margins` has any.
    """
    counts = np.bincount(labels.reshape(-1))
    known, picture = grid.spacing_known, grid.ndim == 2
    voxel = math.prod(grid.spacing_mm) if known else 1.0
    found = []
    for class_ in classes:
        own = (margins or {}).get(class_.name, {})
        number = int(sum(counts[value] for value in class_.values if value < len(counts)))
        kind: MeasurementKind = "area" if picture else "volume"
        unit = ("mm2" if known else "px2") if picture else ("ml" if known else "voxels")
        size = number * voxel / (1000 if unit == "ml" else 1)
        found.append(_with_margin(class_.name, kind, unit, size, own.get(kind)))
        if picture and "diameter" in own:
            outline = outline_of(np.isin(labels, class_.values), grid.spacing_mm if known else (1.0, 1.0))
            for outer, value in (outline or {}).items():
                found.append(_with_margin(class_.name, outer, "mm" if known else "px", value, own.get(outer)))
    return found


def _with_margin(name: str, kind: MeasurementKind, unit: str, value: float, margin: Margin | None) -> Measurement:
    factors = () if margin is None else (margin.factor_95, margin.factor_90)
    for confidence, factor in zip(_LEVELS, factors, strict=False):
        if factor is not None and value > 0:
            low, high = value / factor, value * factor
            return Measurement(name=name, kind=kind, unit=unit, value=value, low=low, high=high, confidence=confidence)
    return Measurement(name=name, kind=kind, unit=unit, value=value)


def outline_of(mask: NDArray[np.bool_], spacing: Sequence[float]) -> dict[MeasurementKind, float] | None:
    """Return the longest diameter and the circumference of one convex structure (y, x), in units of `spacing`.

    They are those of the ellipse with its area and second moments, which rough edges change little. None where the
    structure is not one, not convex, or of fewer than 9 pixels.
    """
    from scipy.spatial import ConvexHull

    _, sizes = components(mask)
    if len(sizes) != 2 or sizes[1] < 9:
        return None
    points = np.argwhere(mask)
    if (np.ptp(points, axis=0) < 2).any():
        return None
    corners = np.concatenate([points + offset for offset in ((0, 0), (0, 1), (1, 0), (1, 1))])
    if sizes[1] / ConvexHull(corners).volume < _CONVEX:
        return None
    scaled = points * np.asarray(spacing)
    moments = np.cov(scaled.T, bias=True) + np.diag(np.asarray(spacing) ** 2 / 12)  # pixels are squares, not points
    short, long = 2 * np.sqrt(np.linalg.eigvalsh(moments))
    h = ((long - short) / (long + short)) ** 2
    ramanujan = math.pi * (long + short) * (1 + 3 * h / (10 + math.sqrt(4 - 3 * h)))
    return {"diameter": float(2 * long), "circumference": float(ramanujan)}
