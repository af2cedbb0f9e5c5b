"""Label schemes: what is declared, what is refused, and the way from scores to labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segfit.errors import InputError
from segfit.labels import LabelClass, LabelScheme

REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "inner": 3}


def test_exclusive_labels() -> None:
    scheme = LabelScheme.from_declaration({"b": 2, "background": 0, "a": [1]})
    assert not scheme.has_regions
    assert scheme.all_values == (0, 1, 2)
    assert scheme.foreground_values == (1, 2)
    assert [target.name for target in scheme.classes] == ["a", "b"]  # by value, not as declared
    assert scheme.num_outputs == 3
    assert scheme.num_declared == 3
    assert scheme.region_order is None


def test_regions_keep_their_order() -> None:
    scheme = LabelScheme.from_declaration(REGIONS | {"ignore": 4}, [1, 2, 3])
    assert scheme.has_regions
    assert scheme.classes == (
        LabelClass(name="whole", values=(1, 2, 3)),
        LabelClass(name="core", values=(2, 3)),
        LabelClass(name="inner", values=(3,)),
    )
    assert scheme.all_values == (0, 1, 2, 3)
    assert scheme.ignore_value == 4
    assert scheme.num_outputs == 3
    assert scheme.num_declared == 5


def test_values_with_gaps_become_consecutive_and_come_back() -> None:
    scheme = LabelScheme.from_declaration({"far": 500, "background": 0, "near": 7, "ignore": 255})
    assert scheme.all_values == (0, 1, 2)
    assert scheme.ignore_value == 3
    assert scheme.stored_values == (0, 7, 500, 255)
    assert [(target.name, target.values) for target in scheme.classes] == [("near", (1,)), ("far", (2,))]
    found = np.array([[0, 7, 500], [255, 6, -3]], np.int16)
    assert scheme.to_inner(found).tolist() == [[0, 1, 2], [3, 4, 4]]  # 4: of no class
    assert scheme.to_inner(np.array([2**31 - 1, 501, 7], np.int32)).tolist() == [4, 4, 1]
    scores = np.eye(3)[:, [2, 1, 0]]
    back = scheme.to_stored(scheme.to_labels(scores))
    assert back.dtype == np.uint16
    assert back.tolist() == [500, 7, 0]


def test_regions_with_gaps() -> None:
    scheme = LabelScheme.from_declaration({"background": 0, "whole": [10, 30], "core": 30}, [10, 30])
    assert [target.values for target in scheme.classes] == [(1, 2), (2,)]
    assert scheme.region_order == (1, 2)
    painted = scheme.to_stored(scheme.to_labels(np.array([[1.0, 1.0, -1.0], [-1.0, 1.0, -1.0]])))
    assert painted.dtype == np.uint8
    assert painted.tolist() == [10, 30, 0]


def test_consecutive_values_are_left_alone() -> None:
    scheme = LabelScheme.from_declaration({"background": 0, "a": 1, "ignore": 2})
    labels = np.array([0, 1, 2, 9], np.int16)
    assert scheme.stored is None
    assert scheme.stored_values == (0, 1, 2)
    assert scheme.to_inner(labels) is labels


@given(
    st.sets(st.integers(1, 65535), min_size=1, max_size=300)
    | st.sets(st.integers(-(2**31), 2**31 - 1).filter(bool), min_size=1, max_size=20),
    st.randoms(use_true_random=False),
)
def test_the_way_there_and_back_is_the_identity(values: set[int], random: Any) -> None:
    scheme = LabelScheme.from_declaration({"background": 0} | {f"s{value}": value for value in values})
    stored = np.array([random.choice([0, *sorted(values)]) for _ in range(20)], np.int32)
    inner = scheme.to_inner(stored)
    assert inner.max() <= len(values)
    assert np.array_equal(scheme.to_stored(inner.astype(np.uint16)), stored)


def test_values_below_zero_and_unknown_ones() -> None:
    scheme = LabelScheme.from_declaration({"background": 0, "a": -7, "b": 100_000})
    assert scheme.stored_values == (0, -7, 100_000)
    assert scheme.to_inner(np.array([0, -7, 100_000, 5, -8], np.int32)).tolist() == [0, 1, 2, 3, 3]
    painted = scheme.to_stored(np.array([2, 0, 1], np.uint8))
    assert painted.dtype == np.int32
    assert painted.tolist() == [100_000, 0, -7]


@pytest.mark.parametrize(
    ("labels", "order", "message"),
    [
        ({}, None, '"labels" must map names to values'),
        (["background"], None, '"labels" must map names to values'),
        ({"tumour": 1}, None, 'must contain "background": 0'),
        ({"background": 1, "tumour": 0}, None, 'must contain "background": 0'),
        ({"background": False, "tumour": 1}, None, 'must contain "background": 0'),
        ({"background": [0], "tumour": 1}, None, 'must contain "background": 0'),
        ({"background": 0}, None, 'at least one class besides "background"'),
        ({"background": 0, "ignore": 1}, None, 'at least one class besides "background"'),
        ({"background": 0, "tumour": "1"}, None, "must be an integer or a list of integers, got '1'"),
        ({"background": 0, "tumour": 1.0}, None, "must be an integer or a list of integers, got 1.0"),
        ({"background": 0, "tumour": []}, None, r"must be an integer or a list of integers, got \[\]"),
        ({"background": 0, "tumour": 1, "ignore": [2]}, None, r'"ignore" must be one integer, got \[2\]'),
        ({"background": 0, "tumour": 1, "ignore": 1}, None, "a value of its own, 1 is that of a class"),
        (
            {"background": 0, "tumour": 1, "ignore": 2**31},
            None,
            '"ignore" must have values from -2147483648 to 2147483647, got',
        ),
        ({"background": 0, "a": 1, "b": -(2**32)}, None, 'label "b" must have values from -2147483648 to'),
        ({"background": 0, "a": 1, "b": 1}, None, 'labels "a" and "b" share the value 1'),
        (REGIONS, None, "one value for each of the 3 regions, got nothing"),
        (REGIONS, [1, 2], "one value for each of the 3 regions, got 2 values"),
        (REGIONS, [1, 2, "x"], "must list declared label values other than 0, got 'x'"),
        (REGIONS, [1, 2, 0], "must list declared label values other than 0, got 0"),
        ({"background": 0, " ": 1}, None, "1 has no name"),
        ({"background": 0, "": 2}, None, "2 has no name"),
        (REGIONS, [1, 2, 7], "must list declared label values other than 0, got 7"),
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


def test_values_that_regions_cannot_tell_are_known() -> None:
    nested = {"background": 0, "core": [5], "whole": [3, 5]}
    assert LabelScheme.from_declaration(nested, [5, 3]).lost_values() == ((5, 3),)
    assert LabelScheme.from_declaration(dict(reversed(nested.items())), [3, 5]).lost_values() == ()
    overlapping = {"background": 0, "a": [1, 2], "b": [2, 3]}
    assert LabelScheme.from_declaration(overlapping, [1, 3]).lost_values() == ((2, 3),)
    assert LabelScheme.from_declaration(overlapping, [1, 3]).lossless_regions() is None


@given(
    cuts=st.lists(st.sets(st.integers(1, 5), min_size=1), min_size=1, max_size=4), data=st.data(), stored=st.booleans()
)
def test_the_order_that_is_advised_loses_no_value(cuts: list[set[int]], data: st.DataObject, stored: bool) -> None:
    times = 10 if stored else 1
    values = {1, 2, 3, 4, 5}
    regions: dict[str, int | list[int]] = {"background": 0, "all": [times * value for value in sorted(values)]}
    for number, cut in enumerate(cuts):  # each lies inside the one before
        values &= cut
        if values:
            regions[f"r{number}"] = [times * value for value in sorted(values)]
    shuffled = dict(data.draw(st.permutations(list(regions.items()))))
    order = [times] * (len(regions) - 1)
    found = LabelScheme.from_declaration(shuffled, order).lossless_regions()
    assert found is not None
    names, painted = found
    advised = {"background": 0} | {name: regions[name] for name in names}
    assert LabelScheme.from_declaration(advised, painted).lost_values() == ()


@pytest.mark.parametrize(("name", "action"), [("Background", 'call "Background" "background"'), ("a", 'call "a"')])
def test_a_background_of_another_name_is_to_be_renamed(name: str, action: str) -> None:
    with pytest.raises(InputError) as raised:
        LabelScheme.from_declaration({name: 0, "b": 1})
    assert raised.value.action.startswith(action)


def test_the_order_for_nested_regions_that_are_declared_large_first() -> None:
    nested = {"background": 0, "whole": [1, 2, 3, 4], "core": [1, 2, 3], "enhancing": 1}
    scheme = LabelScheme.from_declaration(nested, [1, 2, 3])
    assert scheme.lossless_regions() == (("whole", "core", "enhancing"), (4, 2, 1))


def test_outputs_change_places_with_their_values() -> None:
    plain = LabelScheme.from_declaration({"background": 0, "spine": 5, "right": 20, "left": 10, "ignore": 99})
    assert plain.exchanged_outputs([(2, 3)]) == (0, 1, 3, 2)
    regions = LabelScheme.from_declaration({"background": 0, "l": [1, 2], "core": 2, "r": [3, 4]}, [1, 2, 3])
    with pytest.raises(ValueError, match="is not in list"):
        regions.exchanged_outputs([(1, 3), (2, 4)])


@pytest.mark.parametrize(
    ("labels", "unnamed"),
    [
        ({"label 1": 1, "label 7": 7}, True),
        ({"label 7": 7, "label -2": -2}, True),  # in any order
        ({"label 1": 1, "label 2": 7}, False),
        ({"label 1": 1, "organ": 2}, False),
        ({"label 1": 1, "ignore": 2}, False),
    ],
)
def test_names_after_values_are_none(labels: dict[str, int], unnamed: bool) -> None:
    assert LabelScheme.from_declaration({"background": 0, **labels}).is_unnamed == unnamed
