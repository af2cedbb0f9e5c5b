"""Whether removing small components, and filling holes, of classes helps, decided on the cross-validation predictions.

Not a rule of nnU-Net: it is asked after nnU-Net's own (`segfit.selection.postprocess`), and takes only what wins by
more than chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.connected_components import PostprocessingStep, apply_steps, components, holes, inside, label_boxes
from segfit.evaluation.metrics import Metrics, case_metrics, joint_histogram
from segfit.evaluation.pairs import Pair
from segfit.evaluation.statistics import difference
from segfit.evaluation.summary import Summary, summarize
from segfit.execution.execution import LOCAL, Execution
from segfit.labels import LabelClass, LabelScheme
from segfit.selection.postprocess import PostprocessingDecision

__all__ = ["decide_sizes_and_holes"]

_SIZES = tuple(2**power for power in range(2, 17))
"""Components below these many voxels may go. Steps by two: what separates noise from objects is an order of size."""


def decide_sizes_and_holes(
    decision: PostprocessingDecision,
    pairs: Sequence[Pair],
    scheme: LabelScheme,
    groups: Mapping[str, str],
    *,
    execution: Execution = LOCAL,
) -> PostprocessingDecision:
    """Return the decision with the steps that remove small components or fill holes and help by more than chance.

    A step helps its class where the mean Dice rises and the 95 % interval of its mean difference, over groups of cases
    drawn with replacement, lies above 0; of sizes the best counts. All that help are taken together, if no class has a
    lower mean Dice with them. A class of several labels (a region) has no label to fill its holes with.

    Parameters
    ----------
    decision : nnU-Net's on these pairs; its steps come first
    groups : group by case; others are groups of their own
    """
    tried = dict(_map(partial(_dice_with_each, scheme, decision.steps), pairs, "post-processing by size", execution))
    largest = {step.values for step in decision.steps}
    steps = [
        step
        for index, class_ in enumerate(scheme.classes)
        for kind in _kinds(class_, has_largest=class_.values in largest)
        if (step := _best(kind, {pair.case: tried[pair.case][index] for pair in pairs}, groups))
    ]
    if not steps:
        return decision
    # Removing first: what is enclosed by a component that goes is no hole.
    together = (*decision.steps, *sorted(steps, key=lambda step: step.kind == "fill_holes"))
    scored = dict(_map(partial(_score, scheme, together), pairs, "scoring post-processing", execution))
    after = summarize([pair.with_metrics(scored[pair.case]) for pair in pairs], scheme.classes)
    return PostprocessingDecision(together, decision.before, after) if _harms_none(decision.after, after) else decision


def _map(work: Any, pairs: Sequence[Pair], description: str, execution: Execution) -> Iterator[tuple[str, Any]]:
    results = execution.map(
        work, pairs, description=description, name=lambda pair: pair.case, size=Pair.predicted_bytes
    )
    return ((pair.case, result) for pair, result in results)


_Kind = tuple[PostprocessingStep, ...]  # of which one is taken at most
_Tried = dict[PostprocessingStep | None, float]  # Dice with a step, and without; both empty counts as 1


def _kinds(class_: LabelClass, *, has_largest: bool = False) -> Iterator[_Kind]:
    if not has_largest:
        yield tuple(PostprocessingStep.from_size(class_.name, class_.values, size) for size in _SIZES)
    if len(class_.values) == 1:
        yield (PostprocessingStep.filling(class_.name, class_.values[0]),)


def _best(kind: _Kind, by_case: Mapping[str, _Tried], groups: Mapping[str, str]) -> PostprocessingStep | None:
    """Return the step with the highest mean Dice, if that is above the mean without it by more than chance."""
    means = {step: float(np.mean([tried[step] for tried in by_case.values()])) for step in (None, *kind)}
    best = max(kind, key=lambda step: means[step])
    if not means[best] > means[None]:
        return None
    gain = difference(
        {case: tried[best] for case, tried in by_case.items()},
        {case: tried[None] for case, tried in by_case.items()},
        groups,
    )
    return best if gain.low is not None and gain.low > 0 else None


def _harms_none(before: Summary, after: Summary) -> bool:
    pairs = [(one.dice, after.mean[name].dice) for name, one in before.mean.items()]
    return not any(old is not None and new is not None and new < old for old, new in pairs)


def _score(scheme: LabelScheme, steps: Sequence[PostprocessingStep], pair: Pair) -> dict[str, Metrics]:
    prediction, reference = pair.load()
    return case_metrics(apply_steps(prediction, steps), reference, scheme)


def _dice_with_each(scheme: LabelScheme, steps: Sequence[PostprocessingStep], pair: Pair) -> list[_Tried]:
    """Return, by class, its Dice in one case after `steps`, and after each further step that is tried."""
    loaded, reference = pair.load()
    prediction = apply_steps(loaded, steps)
    of_value = joint_histogram(prediction, reference, scheme).sum(axis=1)
    boxes = label_boxes(prediction)
    tried: list[_Tried] = []
    for class_ in scheme.classes:
        num_reference = int(of_value[list(class_.values)].sum())
        found = inside(prediction, class_.values, boxes)
        if found is None:
            steps_of_class = (step for kind in _kinds(class_) for step in kind)
            tried.append(dict.fromkeys((None, *steps_of_class), _dice(0, 0, num_reference)))
        else:
            box, mask = found
            tried.append(_tried(class_, mask, prediction[box], reference[box], num_reference, scheme.ignore_value))
    return tried


def _tried(
    class_: LabelClass,
    mask: NDArray[np.bool_],
    prediction: NDArray[Any],
    reference: NDArray[Any],
    num_reference: int,
    ignore: int | None,
) -> _Tried:
    """Return the Dice of a class with each step, from the box around what was predicted of it."""
    wanted = np.isin(reference, class_.values)
    counts = np.ones_like(wanted) if ignore is None else reference != ignore
    numbers, sizes = components(mask)
    predicted = np.bincount(numbers[counts], minlength=len(sizes))  # voxels that count, by component
    right = np.bincount(numbers[wanted], minlength=len(sizes))
    tried: _Tried = {None: _dice(right[1:].sum(), predicted[1:].sum(), num_reference)}
    for step in (step for kind in _kinds(class_) for step in kind):
        if step.kind == "remove_small":
            kept = sizes >= step.min_voxels
            kept[0] = False
            tried[step] = _dice(right[kept].sum(), predicted[kept].sum(), num_reference)
        else:
            filled = holes(mask) & (prediction == 0)
            more, more_right = (filled & counts).sum(), (filled & wanted).sum()
            tried[step] = _dice(right[1:].sum() + more_right, predicted[1:].sum() + more, num_reference)
    return tried


def _dice(true: int, predicted: int, reference: int) -> float:
    total = int(predicted) + int(reference)
    return 2 * int(true) / total if total else 1.0
