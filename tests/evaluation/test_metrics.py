"""Metrics of tiny masks, worked out by hand, and against one Boolean pass per class."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from segfit.errors import InputError
from segfit.evaluation import metrics
from segfit.evaluation.metrics import Metrics, case_metrics
from segfit.labels import LabelScheme

TWO = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2})
IGNORE = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2, "ignore": 3})
REGIONS = LabelScheme.from_declaration({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])


def test_counts_and_ratios_of_a_hand_made_pair() -> None:
    reference = np.array([[1, 1, 1, 0], [2, 2, 0, 0]])
    prediction = np.array([[1, 1, 0, 1], [2, 1, 0, 0]])
    scores = case_metrics(prediction, reference, TWO)
    assert scores["a"] == Metrics(tp=2, fp=2, fn=1, tn=3, n_pred=4, n_ref=3, dice=4 / 7, iou=2 / 5)
    assert scores["b"] == Metrics(tp=1, fp=0, fn=1, tn=6, n_pred=1, n_ref=2, dice=2 / 3, iou=1 / 2)


def test_empty_masks() -> None:
    empty, one = np.zeros((2, 3), np.uint8), np.array([[1, 0, 0], [0, 0, 0]], np.uint8)
    both = case_metrics(empty, empty, TWO)["a"]
    assert (both.dice, both.iou, both.tn) == (None, None, 6)
    false_alarm = case_metrics(one, empty, TWO)["a"]
    assert (false_alarm.dice, false_alarm.iou, false_alarm.fp) == (0.0, 0.0, 1)
    missed = case_metrics(empty, one, TWO)["a"]
    assert (missed.dice, missed.iou, missed.fn) == (0.0, 0.0, 1)


def test_voxels_with_the_ignore_label_are_left_out() -> None:
    reference = np.array([3, 3, 1, 1, 0], np.int16)
    prediction = np.array([1, 2, 1, 0, 0], np.int16)
    scores = case_metrics(prediction, reference, IGNORE)
    assert scores["a"] == Metrics.from_counts(tp=1, fp=0, fn=1, tn=1)
    assert scores["b"] == Metrics.from_counts(tp=0, fp=0, fn=0, tn=3)


def test_a_region_is_the_union_of_its_labels() -> None:
    reference, prediction = np.array([1, 2, 2, 0, 0]), np.array([2, 2, 1, 1, 0])
    scores = case_metrics(prediction, reference, REGIONS)
    assert list(scores) == ["whole", "core"]
    assert scores["whole"] == Metrics.from_counts(tp=3, fp=1, fn=0, tn=1)
    assert scores["core"] == Metrics.from_counts(tp=1, fp=1, fn=1, tn=2)


def test_values_the_scheme_does_not_know_count_as_background() -> None:
    reference, prediction = np.array([1, 1, 900, 0]), np.array([1, 70, 1, 3000])
    assert case_metrics(prediction, reference, TWO)["a"] == Metrics.from_counts(tp=1, fp=1, fn=1, tn=1)


def test_unusable_arrays_are_refused() -> None:
    labels = np.zeros((2, 2), np.uint8)
    with pytest.raises(InputError, match=r"prediction has shape \(4,\) and the reference \(2, 2\)"):
        case_metrics(labels.reshape(-1), labels, TWO)
    with pytest.raises(InputError, match="reference must be an integer label map, it has the type float32"):
        case_metrics(labels, labels.astype(np.float32), TWO)
    with pytest.raises(InputError, match="must not be negative, found -1"):
        case_metrics(np.full((2, 2), -1), labels, TWO)


_LABELS = arrays(np.uint8, (3, 4, 5), elements=st.integers(0, 4))


@pytest.mark.parametrize("scheme", [TWO, IGNORE, REGIONS])
@given(prediction=_LABELS, reference=_LABELS)
def test_agrees_with_one_boolean_pass_per_structure(
    scheme: LabelScheme, prediction: np.ndarray, reference: np.ndarray
) -> None:
    use = reference != scheme.ignore_value if scheme.ignore_value is not None else np.ones(reference.shape, bool)
    for target in scheme.classes:
        p, r = np.isin(prediction, target.values), np.isin(reference, target.values)
        counts = [int((a & b & use).sum()) for a, b in ((p, r), (p, ~r), (~p, r), (~p, ~r))]
        assert case_metrics(prediction, reference, scheme)[target.name] == Metrics.from_counts(*counts)


def test_blocks_and_memory_order_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    prediction, reference = rng.integers(0, 3, (2, 5, 6, 7))
    expected = case_metrics(prediction, reference, TWO)
    monkeypatch.setattr(metrics, "_BLOCK", 11)
    assert case_metrics(np.asfortranarray(prediction), reference[::-1][::-1], TWO) == expected
