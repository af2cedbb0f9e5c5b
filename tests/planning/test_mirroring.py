from __future__ import annotations

import numpy as np
import pytest
from planning_fakes import case, scheme

from segfit.fingerprint.fingerprint import CaseFingerprint
from segfit.labels import LabelScheme
from segfit.planning.mirroring import axis_evidence, exchanged_values, left_right_pairs, value_names


def _cases(offset: tuple[float, float, float], noise: float, count: int = 12) -> list[CaseFingerprint]:
    """Two labels, the second at `offset` from the first plus noise."""
    rng = np.random.default_rng(0)
    cases = []
    for index in range(count):
        first = rng.uniform(0.3, 0.6, 3)
        second = first + np.array(offset) + rng.normal(0, noise, 3)
        centroids = {1: tuple(map(float, first)), 2: tuple(map(float, second))}
        cases.append(case((10, 20, 20), (1, 1, 1), name=f"case_{index}", centroids=centroids))
    return cases


def _kept(cases: list[CaseFingerprint], labels: LabelScheme) -> list[int]:
    return [item.axis for item in axis_evidence(cases, labels, 3) if not item.mirrored]


def test_an_axis_along_which_labels_keep_their_order_is_not_flipped() -> None:
    cases = _cases((0.0, -0.2, 0.0), noise=0.02)
    evidence = axis_evidence(cases, scheme("anterior", "posterior"), 3)
    assert [item.mirrored for item in evidence] == [True, False, True]
    assert evidence[1].reason.startswith('"anterior" lies 2')
    assert 'beyond "posterior"' in evidence[1].reason
    assert "12 cases" in evidence[1].reason


def test_spread_out_or_close_labels_say_nothing() -> None:
    labels = scheme("organ", "lesion")
    assert _kept(_cases((0.0, -0.2, 0.0), noise=0.2), labels) == []
    assert _kept(_cases((0.02, 0.02, 0.02), noise=0.001), labels) == []


def test_few_cases_say_nothing() -> None:
    labels = scheme("a", "b")
    assert _kept(_cases((0.3, 0.0, 0.0), noise=0.01, count=4), labels) == []
    assert _kept(_cases((0.3, 0.0, 0.0), noise=0.01, count=5), labels) == [0]


def test_cases_without_one_of_the_labels_are_left_out() -> None:
    cases = _cases((0.3, 0.0, 0.0), noise=0.01, count=6)
    only_one = case((10, 20, 20), (1, 1, 1), centroids={2: (0.01, 0.5, 0.5)})
    assert _kept([*cases, *[only_one] * 20], scheme("a", "b")) == [0]


def test_one_label_never_keeps_an_axis() -> None:
    cases = [case((10, 20, 20), (1, 1, 1), centroids={1: (0.1, 0.2, 0.3)})] * 10
    assert _kept(cases, scheme("spleen")) == []


def _placed(*x: float, count: int = 12, noise: float = 0.01) -> list[CaseFingerprint]:
    """Labels 1, 2... at these places along x, moved together by 10 % and alone by the noise."""
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(count):
        places = np.array(x) + rng.uniform(-0.1, 0.1) + rng.normal(0, noise, len(x))
        centroids = {i + 1: (0.5, 0.5, float(place)) for i, place in enumerate(places)}
        cases.append(case((10, 20, 20), (1, 1, 1), centroids=centroids))
    return cases


def test_labels_of_both_sides_change_places() -> None:
    labels = scheme("left kidney", "right kidney", "left lung", "right lung", "spine")
    evidence = axis_evidence(_placed(0.3, 0.7, 0.2, 0.8, 0.5), labels, 3)
    assert [item.mirrored for item in evidence] == [True, True, True]
    assert [item.exchanged for item in evidence] == [(), (), ((1, 2), (3, 4))]


def test_where_an_unpaired_label_keeps_its_side_nothing_is_flipped() -> None:
    names = ("left kidney", "right kidney", "liver", "spleen")
    both = axis_evidence(_placed(0.3, 0.7, 0.65, 0.25), scheme(*names), 3)[2]
    assert not both.mirrored
    assert both.exchanged == ()
    assert both.reason.startswith('"liver" lies 40% of the extent beyond "spleen"')
    one = axis_evidence(_placed(0.3, 0.7, 0.65), scheme(*names[:3]), 3)[2]
    assert one.reason.startswith('"liver" lies 15% of the extent beyond the middle of "left kidney" and "right kidney"')


def test_the_order_of_two_pairs_says_nothing() -> None:
    labels = scheme("left eye", "right eye", "left ear", "right ear")
    assert axis_evidence(_placed(0.4, 0.6, 0.35, 0.75), labels, 3)[2].exchanged == ((1, 2), (3, 4))


@pytest.mark.parametrize("names", [("left kidney",), ("KidneyRight", "liver"), ("lt_eye", "nose"), ("spleen", "LH")])
def test_one_side_without_the_other_is_not_flipped(names: tuple[str, ...]) -> None:
    sided = next(name for name in names if name not in ("liver", "nose", "spleen"))
    item = axis_evidence(_placed(*[0.5] * len(names)), scheme(*names), 3)[2]
    assert item.reason == f'the name "{sided}" says one side, and none says the other'


def test_letters_alone_say_no_side() -> None:
    assert _kept(_placed(0.5, 0.5), scheme("vertebra L1", "R")) == []


@pytest.mark.parametrize(
    ("place", "count", "two_sided"), [(0.52, 12, True), (0.48, 12, True), (0.55, 12, False), (0.5, 4, False)]
)
def test_a_name_of_one_side_in_the_middle_of_the_pairs_says_nothing(
    place: float, count: int, *, two_sided: bool
) -> None:
    labels = scheme("Left Thalamus", "Right Thalamus", "Left Brain Stem")
    item = axis_evidence(_placed(0.4, 0.6, place, count=count), labels, 3)[2]
    assert item.mirrored is two_sided
    assert item.exchanged == (((1, 2),) if two_sided else ())
    assert item.two_sided == (("Left Brain Stem",) if two_sided else ())


def test_nothing_changes_places_along_an_unknown_axis() -> None:
    item = axis_evidence(_placed(0.3, 0.7), scheme("left eye", "right eye"), 3, sides_known=False)[2]
    assert item.exchanged == ()
    assert item.reason == (
        'the names "left eye" and "right eye" tell sides apart, and on stored axes none is known to run left to right'
    )


_KIDNEYS = {"background": 0, "left kidney": [1, 2], "left tumour": 2, "right kidney": [3, 4], "right tumour": 4}


@pytest.mark.parametrize(
    ("declared", "pairs"),
    [
        (_KIDNEYS, ((1, 3), (2, 4))),
        (_KIDNEYS | {"all": [1, 2, 3, 4]}, ((1, 3), (2, 4))),
        (_KIDNEYS | {"cysts": [5, 6]}, ((1, 3), (2, 4))),
        (_KIDNEYS | {"right kidney": 3, "right tumour": 4}, ()),  # a tumour inside the kidney on one side only
        ({key: _KIDNEYS[key] for key in ("background", "left kidney", "right kidney")}, ()),  # 1 with 3 or with 4
        (_KIDNEYS | {"left half": [1, 2, 5]}, ()),
        ({"background": 0, "left": 10, "right": 30, "ignore": 99}, ((1, 2),)),
        ({"background": 0, "left eye": 1, "left_eye": 2, "right eye": 3}, ()),
        ({"background": 0, "a": 1, "b": 2}, ()),
    ],
)
def test_values_that_change_places(declared: dict[str, object], pairs: tuple[tuple[int, int], ...]) -> None:
    regions = sum(name != "background" for name in declared)
    labels = LabelScheme.from_declaration(declared, [1] * regions)
    assert exchanged_values(labels) == pairs


def test_regions_that_do_not_pair_up_keep_the_axis() -> None:
    labels = LabelScheme.from_declaration(_KIDNEYS | {"right kidney": 3, "right tumour": 4}, [1, 2, 3, 4])
    item = axis_evidence(_placed(0.3, 0.3, 0.7, 0.7), labels, 3)[2]
    assert (
        item.reason == 'the names "left kidney" and "right kidney" tell sides apart, and their regions do not pair up'
    )


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (("kidney_left", "kidney_right"), (("kidney_left", "kidney_right"),)),
        (("LeftLung", "RightLung"), (("LeftLung", "RightLung"),)),
        (("r_atrium", "l_atrium"), (("l_atrium", "r_atrium"),)),
        (("eye.R", "eye.L", "nose"), (("eye.L", "eye.R"),)),
        (("left ventricle", "right atrium"), ()),
        (("liver", "tumour"), ()),
        (("leftover", "rightover"), ()),
    ],
)
def test_left_right_pairs(names: tuple[str, ...], pairs: tuple[tuple[str, str], ...]) -> None:
    assert left_right_pairs(names) == pairs


def test_values_of_regions_have_names() -> None:
    labels = LabelScheme.from_declaration({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
    assert value_names(labels) == {1: "label 1", 2: "core"}
