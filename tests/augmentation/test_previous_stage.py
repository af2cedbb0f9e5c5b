from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from segfit.augmentation.previous_stage import Changes, Operator, change, draw_changes, label_channels, morphed
from segfit.planning.recipe import _PREVIOUS
from segfit.specs import AugmentationSpec

SPEC = AugmentationSpec.model_validate(_PREVIOUS)
REFERENCE = Path(__file__).with_name("previous_stage_reference.json")
"""What batchgeneratorsv2 0.3.6 makes of label 1 of two, as bits: by operator and radius, one mask per label."""


def packed(mask: Tensor) -> str:
    return np.packbits(mask.numpy().ravel()).tobytes().hex()


@pytest.mark.parametrize("example", json.loads(REFERENCE.read_text()), ids=lambda item: f"{len(item['shape'])}d")
def test_operators_give_the_values_of_the_reference(example: dict[str, Any]) -> None:
    labels = torch.tensor([int(digit) for digit in example["labels"]], dtype=torch.int16).view(1, *example["shape"])
    assert {operator for operator, *_ in example["changed"]} == set(get_args(Operator))
    for operator, radius, *expected in example["changed"]:
        channels = label_channels(labels, torch.tensor([1, 2]))[0]
        change(channels, Changes(operators=((0, operator, radius),)))
        assert [packed(mask) for mask in channels] == expected, (operator, radius)


def test_labels_become_channels() -> None:
    labels = torch.tensor([[[0, 1], [-1, 3]]], dtype=torch.int16)
    first, second = label_channels(labels, torch.tensor([1, 3]))[0].tolist()
    assert (first, second) == ([[False, True], [False, False]], [[False, False], [False, True]])


def test_a_border_neither_grows_nor_erodes() -> None:
    full, empty = torch.ones(9, 9, dtype=torch.bool), torch.zeros(9, 9, dtype=torch.bool)
    for operator in get_args(Operator):
        assert morphed(full, operator, 2.0).all()
        assert not morphed(empty, operator, 2.0).any()


def test_a_component_is_removed_unless_it_is_large() -> None:
    mask = torch.zeros(1, 10, 10, dtype=torch.bool)
    mask[0, :6, :6] = True  # 36 %
    mask[0, 8, 0] = mask[0, 8, 8] = mask[0, 9, 9] = True  # the latter two share a corner
    removed = []
    for which in (0.0, 0.99):
        channels = mask.clone()
        change(channels, Changes(removals=((0, which),), removed_share=0.15))
        removed.append((mask & ~channels).nonzero().tolist())
    assert sorted(removed) == [[[0, 8, 0]], [[0, 8, 8], [0, 9, 9]]]
    only = mask[:, :6].clone()
    change(only, Changes(removals=((0, 0.5),), removed_share=0.15))
    assert (only == mask[:, :6]).all()


def test_changes_are_drawn_as_often_as_in_nnunet() -> None:
    drawn = draw_changes(SPEC, 4000, 2, np.random.default_rng(0))
    operators = [item for one in drawn for item in one.operators]
    assert np.mean([bool(one.operators) for one in drawn]) == pytest.approx(0.4 * 0.75, abs=0.03)
    assert len(operators) / 4000 == pytest.approx(0.4, abs=0.03)
    assert np.mean([bool(one.removals) for one in drawn]) == pytest.approx(0.2 * 0.75, abs=0.03)
    assert min(Counter(operator for _, operator, _ in operators).values()) > 0.22 * len(operators)
    radii = [radius for *_, radius in operators]
    assert (min(radii), max(radii)) == (pytest.approx(1, abs=0.1), pytest.approx(8, abs=0.1))
    assert Counter(label for label, *_ in operators)[0] == pytest.approx(len(operators) / 2, rel=0.1)
    first = [one.operators[0][0] for one in drawn if len(one.operators) == 2]
    assert 0.4 < np.mean(first) < 0.6  # the order is random too
    assert {one.removed_share for one in drawn} == {0.15}


def test_equal_generators_give_equal_changes_and_no_augmentation_none() -> None:
    assert draw_changes(SPEC, 5, 3, np.random.default_rng(3)) == draw_changes(SPEC, 5, 3, np.random.default_rng(3))
    assert set(draw_changes(AugmentationSpec(), 5, 3, np.random.default_rng(3))) == {Changes()}
