"""How far measurements of predictions are from the truth, from the validation predictions of what is handed over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.connected_components import PostprocessingStep, apply_steps
from segfit.evaluation.measurement import Margin, Margins, MeasurementKind, outline_of
from segfit.evaluation.pairs import Pair
from segfit.evaluation.summary import Summary
from segfit.execution.execution import LOCAL, Execution
from segfit.labels import LabelScheme

__all__ = ["margins_of"]

_Outline = dict[MeasurementKind, float] | None
_CONVEX_CASES = 0.9
"""Share of the references with a class whose outline is convex, for the class to count as convex."""


def margins_of(
    summary: Summary,
    steps: Sequence[PostprocessingStep],
    pairs: Sequence[Pair],
    scheme: LabelScheme,
    groups: Mapping[str, str],
    *,
    pictures: bool,
    spacing_of: Callable[[str], Sequence[float]],
    execution: Execution = LOCAL,
) -> Margins:
    """Return the margins of volumes or areas, and of outlines of classes that are convex in pictures.

    Parameters
    ----------
    summary : metrics of the predictions after `steps`
    pairs : predictions before `steps`, with their references
    groups : group by case
    pictures : whether they are 2D: outlines are measured then
    spacing_of : size of the pixels of a case
    """
    size: MeasurementKind = "area" if pictures else "volume"
    margins: Margins = {}
    for class_ in scheme.classes:
        counts = {case.case: case.metrics[class_.name] for case in summary.cases}
        of_size = {case: (float(one.n_pred), float(one.n_ref)) for case, one in counts.items()}
        margins[class_.name] = {size: Margin.of(of_size, groups)}
    if pictures:
        outlines = dict(_outlines(steps, pairs, scheme, spacing_of, execution))
        for class_ in scheme.classes:
            margins[class_.name] |= _of_outlines({case: found[class_.name] for case, found in outlines.items()}, groups)
    return margins


def _of_outlines(
    found: Mapping[str, tuple[bool, _Outline, _Outline]], groups: Mapping[str, str]
) -> dict[MeasurementKind, Margin]:
    there = {case: (predicted, true) for case, (is_there, predicted, true) in found.items() if is_there}
    if sum(true is not None for _, true in there.values()) < max(1, _CONVEX_CASES * len(there)):
        return {}
    kinds: tuple[MeasurementKind, ...] = ("diameter", "circumference")
    return {
        kind: Margin.of({case: ((p or {}).get(kind, 0.0), r[kind]) for case, (p, r) in there.items() if r}, groups)
        for kind in kinds
    }


def _outlines(
    steps: Sequence[PostprocessingStep],
    pairs: Sequence[Pair],
    scheme: LabelScheme,
    spacing_of: Callable[[str], Sequence[float]],
    execution: Execution,
) -> Any:
    spacings = {pair.case: tuple(spacing_of(pair.case)) for pair in pairs}
    results = execution.map(
        partial(_outlines_of_case, scheme, tuple(steps), spacings),
        pairs,
        description="measuring outlines",
        name=lambda pair: pair.case,
        size=Pair.predicted_bytes,
    )
    return ((pair.case, found) for pair, found in results)


def _outlines_of_case(
    scheme: LabelScheme, steps: Sequence[PostprocessingStep], spacings: Mapping[str, Sequence[float]], pair: Pair
) -> dict[str, tuple[bool, _Outline, _Outline]]:
    """Return by class whether the reference has it, and the outline in prediction and reference."""
    loaded, reference = pair.load()
    prediction, spacing = apply_steps(loaded, steps), spacings[pair.case]

    def outline(labels: NDArray[Any], values: Sequence[int]) -> _Outline:
        return outline_of(np.isin(labels, values), spacing)

    return {
        one.name: (
            bool(np.isin(reference, one.values).any()),
            outline(prediction, one.values),
            outline(reference, one.values),
        )
        for one in scheme.classes
    }
