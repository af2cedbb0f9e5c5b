from __future__ import annotations

import numpy as np
import pytest
from planning_fakes import case, scheme

from segfit.fingerprint.fingerprint import CaseFingerprint
from segfit.labels import LabelScheme
from segfit.planning.mirroring import axis_evidence, left_right_pairs, value_names


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


def test_names_with_sides_keep_the_left_right_axis() -> None:
    cases = [case((10, 20, 20), (1, 1, 1))] * 10
    evidence = axis_evidence(cases, scheme("left kidney", "right kidney", "spleen"), 3)
    assert [item.mirrored for item in evidence] == [True, True, False]
    assert evidence[2].reason == 'the names "left kidney" and "right kidney" tell sides apart'


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
