"""Label schemes: what is declared, what is refused, and the way from scores to labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segfit.errors import InputError
from segfit.labels import LabelScheme, Target

REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "inner": 3}


def test_exclusive_labels() -> None:
    scheme = LabelScheme.from_declaration({"b": 2, "background": 0, "a": [1]})
    assert not scheme.has_regions
    assert scheme.all_values == (0, 1, 2)
    assert scheme.foreground_values == (1, 2)
    assert [target.name for target in scheme.targets] == ["a", "b"]  # by value, not as declared
    assert scheme.num_outputs == 3
    assert scheme.num_declared == 3
    assert scheme.region_order is None


def test_regions_keep_their_order() -> None:
    scheme = LabelScheme.from_declaration(REGIONS | {"ignore": 4}, [1, 2, 3])
    assert scheme.has_regions
    assert scheme.targets == (
        Target(name="whole", values=(1, 2, 3)),
        Target(name="core", values=(2, 3)),
        Target(name="inner", values=(3,)),
    )
    assert scheme.all_values == (0, 1, 2, 3)
    assert scheme.ignore_value == 4
    assert scheme.num_outputs == 3
    assert scheme.num_declared == 5


@pytest.mark.parametrize(
    ("labels", "order", "message"),
    [
        ({}, None, '"labels" must map names to values'),
        (["background"], None, '"labels" must map names to values'),
        ({"tumour": 1}, None, 'must contain "background": 0'),
        ({"background": 1, "tumour": 0}, None, 'must contain "background": 0'),
        ({"background": False, "tumour": 1}, None, 'must contain "background": 0'),
        ({"background": [0], "tumour": 1}, None, 'must contain "background": 0'),
        ({"background": 0}, None, 'at least one structure besides "background"'),
        ({"background": 0, "ignore": 1}, None, 'at least one structure besides "background"'),
        ({"background": 0, "tumour": "1"}, None, "must be an integer or a list of integers, got '1'"),
        ({"background": 0, "tumour": 1.0}, None, "must be an integer or a list of integers, got 1.0"),
        ({"background": 0, "tumour": []}, None, r"must be an integer or a list of integers, got \[\]"),
        ({"background": 0, "tumour": 1, "ignore": [2]}, None, r'"ignore" must be one integer, got \[2\]'),
        ({"background": 0, "tumour": 1, "ignore": 3}, None, "must be the highest value \\+ 1 = 2, got 3"),
        ({"background": 0, "a": 1, "b": 3}, None, r"consecutive from 0, got \[0, 1, 3\]"),
        ({"background": 0, "a": 1, "b": -1}, None, r"consecutive from 0, got \[-1, 0, 1\]"),
        ({"background": 0, "a": 1, "b": 1}, None, 'labels "a" and "b" share the value 1'),
        (REGIONS, None, "one value for each of the 3 regions, got nothing"),
        (REGIONS, [1, 2], "one value for each of the 3 regions, got 2 values"),
        (REGIONS, [1, 2, "x"], "must list declared label values, got 'x'"),
        (REGIONS, [1, 2, 7], "must list declared label values, got 7"),
    ],
)
def test_broken_declarations_are_explained(labels: Any, order: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LabelScheme.from_declaration(labels, order)


def test_argmax_gives_ties_to_the_lowest_label() -> None:
    scheme = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2})
    scores = np.array([[0.5, 0.1, 0.2], [0.5, 0.7, 0.2], [0.1, 0.7, 0.9]])
    labels = scheme.to_labels(scores)
    assert labels.tolist() == [0, 1, 2]
    assert labels.dtype == np.uint8


def test_regions_are_painted_in_order_above_one_half() -> None:
    scheme = LabelScheme.from_declaration(REGIONS, [1, 2, 3])
    probabilities = np.array([[0.9, 0.9, 0.9, 0.5, 0.1], [0.2, 0.9, 0.9, 0.5, 0.9], [0.2, 0.2, 0.51, 0.5, 0.2]])
    assert scheme.to_labels(probabilities, activated=True).tolist() == [1, 2, 3, 0, 2]
    logits = np.log(probabilities / (1 - probabilities))
    assert scheme.to_labels(logits).tolist() == [1, 2, 3, 0, 2]


def test_many_labels_need_sixteen_bits() -> None:
    scheme = LabelScheme.from_declaration({"background": 0} | {f"s{i}": i for i in range(1, 256)})
    scores = np.zeros((256, 2))
    scores[255, 1] = 1
    labels = scheme.to_labels(scores)
    assert labels.dtype == np.uint16
    assert labels.tolist() == [0, 255]


@given(st.integers(1, 6), st.randoms(use_true_random=False))
def test_one_hot_scores_return_the_labels(count: int, random: Any) -> None:
    names = {"background": 0} | {f"s{i}": i for i in range(1, count + 1)}
    scheme = LabelScheme.from_declaration(names)
    truth = np.array([[random.randint(0, count) for _ in range(4)] for _ in range(3)])
    scores = (truth == np.arange(count + 1)[:, None, None]).astype(np.float32)
    assert np.array_equal(scheme.to_labels(scores), truth)


def test_survives_json() -> None:
    scheme = LabelScheme.from_declaration(REGIONS | {"ignore": 4}, [3, 1, 2])
    assert LabelScheme.model_validate_json(scheme.model_dump_json()) == scheme
