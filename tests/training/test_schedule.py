from __future__ import annotations

from math import cos, pi

import pytest

from segfit.training.schedule import cooldown_start, forced_foreground, learning_rate, poly_learning_rate


def test_poly_learning_rate() -> None:
    assert poly_learning_rate(0, 0.02) == 0.02
    assert poly_learning_rate(0.5, 0.02, exponent=2) == pytest.approx(0.005)
    assert poly_learning_rate(1) == poly_learning_rate(1.2) == 0


def test_warm_up_rises_to_the_base_and_then_falls() -> None:
    assert learning_rate(0.3, 0.01) == poly_learning_rate(0.3, 0.01)
    rates = [learning_rate(share, 0.01, warmup_share=0.1) for share in (0, 0.05, 0.1, 0.55, 1)]
    assert rates == pytest.approx([0, 0.005, 0.01, 0.01 * 0.5**0.9, 0])


def test_forced_foreground() -> None:
    assert forced_foreground(1) == (False,)
    assert forced_foreground(2) == (False, True)
    assert forced_foreground(5) == (False, False, False, True, True)
    assert forced_foreground(3, 0) == (False,) * 3
    assert forced_foreground(3, 1) == (True,) * 3


def test_the_rate_is_constant_before_the_cool_down() -> None:
    rates = [learning_rate(share, 0.1, 1.0, 0.1, 0.5) for share in (0.0, 0.05, 0.1, 0.3, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.1, 0.1, 0.05, 0.0])


def test_a_cool_down_over_everything_is_the_polynomial() -> None:
    for share in (0.0, 0.2, 0.9, 1.0):
        assert learning_rate(share, 0.01) == pytest.approx(poly_learning_rate(share, 0.01))
    assert learning_rate(0.5, 0.1, 1.0, 0.2, 1.0) == pytest.approx(0.1 * 0.5 / 0.8)


def test_cosine_as_in_the_variant_of_the_reference() -> None:
    for epoch in (0, 1, 500, 999):
        assert learning_rate(epoch / 1000, 0.01, None) == pytest.approx(0.01 * (1 + cos(pi * epoch / 1000)) / 2)
    rates = [learning_rate(share, 0.1, None, 0.1, 0.5) for share in (0.05, 0.1, 0.5, 0.75, 1.0, 1.1)]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.05, 0.0, 0.0])
    assert cooldown_start(None, 0.1, 0.5) == 0.5
    assert cooldown_start(None, 0.1, 1.0) is None
