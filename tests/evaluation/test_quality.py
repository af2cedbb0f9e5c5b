"""Predicted Dice: what is learned holds for cases that were not seen, and says when it does not know."""

from __future__ import annotations

import math

import numpy as np
import pytest

from segfit.evaluation.quality import ClassQuality, QualityFit, Traits, mean_traits


def cases(rng: np.random.Generator, number: int, bias: float = -0.5) -> tuple[dict[str, Traits], dict[str, float]]:
    """Cases whose probabilities expect too much of them by a constant factor of the odds."""
    traits, dice = {}, {}
    for index in range(number):
        expected = rng.normal(1.5, 0.8)
        case = f"c{index}"
        traits[case] = Traits(soft_dice=1 / (1 + math.exp(-expected)), step=0.3, size=float(rng.lognormal(5, 0.3)))
        dice[case] = 1 / (1 + math.exp(-(expected + bias + rng.normal(0, 0.3))))
    return traits, dice


def test_probabilities_that_expect_too_much_are_put_right() -> None:
    rng = np.random.default_rng(0)
    fit = QualityFit.of(*cases(rng, 40), {}, always=True)
    assert fit is not None
    traits, dice = cases(rng, 200)
    found = {case: fit.predict("a", one) for case, one in traits.items()}
    errors = [abs((found[case].dice or 0) - dice[case]) for case in traits]
    assert np.mean(errors) < 0.06  # 0.3 of the odds' logarithm cannot be foreseen
    held = [(one.low or 0) <= dice[case] <= (one.high or 1) for case, one in found.items()]
    assert {one.confidence for one in found.values()} == {0.95}
    assert 0.88 <= np.mean(held) <= 1.0


def test_few_groups_tell_less() -> None:
    rng = np.random.default_rng(1)
    traits, dice = cases(rng, 24)
    groups = {case: f"p{index % 6}" for index, case in enumerate(traits)}
    six = QualityFit.of(traits, dice, groups, always=True)
    assert six is not None
    assert six.margin.groups == 6
    found = six.predict("a", traits["c0"])
    assert found.dice is not None
    assert (found.low, found.high, found.confidence) == (None, None, None)
    assert (
        QualityFit.of(traits, dice, {case: f"p{index % 4}" for index, case in enumerate(traits)}, always=True) is None
    )


def test_less_certain_is_never_told_to_be_better() -> None:
    rng = np.random.default_rng(2)
    traits, dice = cases(rng, 12)
    turned = {case: 1 - value for case, value in dice.items()}  # the wrong way round
    fit = QualityFit.of(traits, turned, {}, always=True)
    assert fit is not None
    base = traits["c0"]
    values = [fit.predict("a", base.model_copy(update={"soft_dice": soft})).dice for soft in (0.2, 0.5, 0.8, 0.95)]
    assert values == sorted(values, key=lambda value: value or 0)
    steps = [fit.predict("a", base.model_copy(update={"step": step})).dice for step in (0.1, 0.3, 0.6)]
    assert steps == sorted(steps, key=lambda value: value or 0)
    sizes = [fit.predict("a", base.model_copy(update={"size": size})).dice for size in (150.0, 1500.0, 150000.0)]
    assert sizes == sorted(sizes, key=lambda value: -(value or 0))


def test_nothing_found() -> None:
    traits, dice = cases(np.random.default_rng(3), 12)
    nothing = Traits(soft_dice=0.0, step=0.0, size=0.0)
    for always, expected in ((True, 0.0), (False, None)):
        fit = QualityFit.of(traits, dice, {}, always=always)
        assert fit is not None
        assert fit.predict("a", nothing) == ClassQuality(name="a", dice=expected)


def test_members_count_alike() -> None:
    one, two = Traits(soft_dice=0.8, step=0.2, size=10), Traits(soft_dice=0.6, step=0.4, size=30)
    found = mean_traits([{"a": one}, {"a": two}])["a"]
    assert (found.soft_dice, found.step, found.size) == pytest.approx((0.7, 0.3, 20))
