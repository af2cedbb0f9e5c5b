"""Small components and holes: what is taken, and that the Dice counted for it is that of the changed label maps."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from segfit.connected_components import PostprocessingStep, apply_steps, fill_holes, holes, remove_small
from segfit.evaluation.metrics import case_metrics
from segfit.evaluation.pairs import Pair
from segfit.labels import LabelScheme
from segfit.selection.postprocess import PostprocessingDecision, decide_postprocessing
from segfit.selection.sizes_and_holes import _dice_with_each, decide_sizes_and_holes

TWO = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2})
IGNORE = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2, "ignore": 3})
NESTED = LabelScheme.from_declaration({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])


def square(labels: np.ndarray, value: int, start: int, size: int) -> np.ndarray:
    labels[start : start + size, start : start + size] = value
    return labels


def decide(pairs: list[Pair], scheme: LabelScheme = TWO) -> PostprocessingDecision:
    return decide_sizes_and_holes(decide_postprocessing(pairs, scheme), pairs, scheme, {})


def pairs_of(predictions: list[np.ndarray], references: list[np.ndarray]) -> list[Pair]:
    both = zip(predictions, references, strict=True)
    return [Pair(f"c{i}", lambda p=p: p, lambda r=r: r) for i, (p, r) in enumerate(both)]


def two_squares() -> np.ndarray:
    return square(square(np.zeros((32, 32), np.uint8), 1, 2, 8), 1, 20, 7)  # so that the largest alone is not enough


def test_specks_go_and_objects_stay() -> None:
    predictions = [square(two_squares(), 1, 14 + index % 3, 2) for index in range(6)]
    decision = decide(pairs_of(predictions, [two_squares()] * 6))
    assert [(step.kind, step.values, step.min_voxels) for step in decision.steps] == [("remove_small", (1,), 8)]
    assert decision.after.mean["a"].dice == 1.0


def test_holes_are_filled() -> None:
    predictions = [square(two_squares(), 0, 4, 2 + index % 2) for index in range(6)]
    decision = decide(pairs_of(predictions, [two_squares()] * 6))
    assert [(step.kind, step.values) for step in decision.steps] == [("fill_holes", (1,))]
    assert decision.after.mean["a"].dice == 1.0


def test_what_helps_one_case_of_many_is_not_taken() -> None:
    predictions = [two_squares() for _ in range(5)] + [square(two_squares(), 1, 14, 2)]
    assert decide(pairs_of(predictions, [two_squares()] * 6)).steps == ()


def test_true_holes_and_specks_are_kept() -> None:
    reference = square(square(two_squares(), 0, 4, 2), 1, 14, 2)
    assert decide(pairs_of([reference] * 6, [reference] * 6)).steps == ()


@pytest.mark.parametrize("shape", [(40, 40), (12, 14, 13)])
@pytest.mark.parametrize("scheme", [TWO, IGNORE, NESTED])
def test_the_dice_is_that_of_changed_label_maps(scheme: LabelScheme, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), 1.0)
    prediction = np.digitize(smooth, np.quantile(smooth, [0.6, 0.85])).astype(np.uint8)
    reference = np.roll(prediction, 1, 0)
    if scheme.ignore_value is not None:
        reference[:5] = scheme.ignore_value
    first = (PostprocessingStep.largest_of("b", (2,)),)
    found = _dice_with_each(scheme, first, Pair("x", lambda: prediction, lambda: reference))
    kinds = set()
    for class_, tried in zip(scheme.classes, found, strict=True):
        for step, value in tried.items():
            steps = first if step is None else (*first, step)
            metrics = case_metrics(apply_steps(prediction, steps), reference, scheme)[class_.name]
            assert value == pytest.approx(1.0 if metrics.dice is None else metrics.dice, abs=1e-12), step
            kinds.add(step and step.kind)
    assert kinds == {None, "remove_small", "fill_holes"}


@pytest.mark.parametrize("shape", [(30, 31), (12, 13, 14)])
def test_holes_are_those_of_scipy(shape: tuple[int, ...]) -> None:
    mask = np.random.default_rng(0).random(shape) < 0.65
    np.testing.assert_array_equal(holes(mask), ndimage.binary_fill_holes(mask) & ~mask)
    assert holes(mask).any()


def test_steps_leave_what_they_are_given_alone() -> None:
    labels = np.array([[1, 1, 1, 0, 2], [1, 0, 1, 0, 1], [1, 1, 1, 0, 0]], np.uint8)
    before = labels.copy()
    assert fill_holes(labels, 1)[1, 1] == 1
    assert remove_small(labels, (1,), 2).tolist() == [[1, 1, 1, 0, 2], [1, 0, 1, 0, 0], [1, 1, 1, 0, 0]]
    np.testing.assert_array_equal(labels, before)
    assert fill_holes(labels, 2) is labels
    assert remove_small(labels, (1,), 1) is labels
    assert remove_small(labels, (5,), 9) is labels
