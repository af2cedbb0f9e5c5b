"""Every value that the planner derives can be fixed; the plan says so and stays consistent."""

from __future__ import annotations

from typing import Any

import pytest
from planning_fakes import STATISTICS, case, fingerprint, scheme

from segfit.errors import InputError
from segfit.feature_maps import feature_map_elements
from segfit.options import Options
from segfit.planning.plan import Plan
from segfit.planning.planner import derive

_LABELS = scheme("liver")


def _plan(**planning: Any) -> Plan:
    data = fingerprint([case((36, 50, 35), (1, 1, 1))] * 20, num_training=260)
    return derive(data, _LABELS, Options.model_validate({"preset": "stock", "planning": planning}))


def test_nothing_asked_is_stock() -> None:
    assert _plan().stock


def test_a_whole_network_can_be_given() -> None:
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    plan = _plan(
        configurations=["3d_fullres"],
        features=[8, 16, 24],
        strides=strides,
        kernels=[[1, 3, 3], [3, 3, 3], [3, 5, 3]],
        encoder_convs=[1, 2, 3],
        decoder_convs=[2, 1],
    )
    item = plan.configurations["3d_fullres"]
    assert item.network.features == (8, 16, 24)
    assert item.network.divisor == (2, 4, 4)
    assert all(size % d == 0 for size, d in zip(item.patch_size, item.network.divisor, strict=True))
    assert item.memory_estimate == feature_map_elements(
        "plain",
        item.patch_size,
        features=(8, 16, 24),
        strides=strides,
        encoder_convs=(1, 2, 3),
        decoder_convs=(2, 1),
        heads=2,
    )
    assert not plan.stock
    assert "3d_fullres: features 8, 16, 24 set by you instead of 32, 64, 128, 256" in plan.changes
    decision = next(one for one in plan.decisions if one.key == "3d_fullres.network.strides")
    assert (decision.value, decision.bound) == (strides, "set by you")
    assert decision.inputs["by_rule"] == [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert decision.would_change == "the option planning.strides"


def test_a_patch_is_rounded_up_to_what_the_strides_divide() -> None:
    plan = _plan(configurations=["3d_fullres"], strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2], [4, 4, 4]])
    assert plan.configurations["3d_fullres"].patch_size == (48, 64, 48)


def test_loss_normalization_and_order_of_axes() -> None:
    plan = _plan(batch_dice=True, normalization=["ct"], transpose=[2, 0, 1])
    item = plan.configurations["3d_fullres"]
    assert item.batch_dice
    assert item.preprocessing.normalization[0].scheme == "ct"
    assert item.preprocessing.normalization[0].statistics == STATISTICS
    assert item.preprocessing.transpose == (2, 0, 1)
    assert item.median_shape == (35, 36, 50)
    assert plan.changes == (
        "normalization ct set by you instead of zscore",
        "transpose 2, 0, 1 set by you instead of 0, 1, 2",
        "3d_fullres: batch_dice yes set by you instead of no",
    )
    bounds = {one.key: one.bound for one in plan.decisions}
    assert bounds["transpose"] == bounds["normalization.0"] == bounds["3d_fullres.batch_dice"] == "set by you"


@pytest.mark.parametrize(
    ("planning", "message"),
    [
        ({"features": [8, 16]}, "planning.features cannot be had in 2d, a network of 2 axes and 4 stages"),
        ({"features": [8, 16, 0, 8]}, "all numbers must be 1 or more"),
        ({"configurations": ["3d_fullres"], "kernels": [[2, 2, 2]] * 4}, "kernels must be odd"),
        ({"configurations": ["3d_fullres"], "strides": [[2, 2, 2]] * 4}, "the first stride must be 1 along every axis"),
        ({"kernels": [[3, 3, 3]] * 4}, "in 2d, a network of 2 axes"),
        ({"decoder_convs": [1]}, "decoder_convs must have one entry less than there are stages"),
        ({"normalization": ["ct", "ct"]}, "one scheme for each of the channels MRI, got ct, ct"),
        ({"transpose": [0, 1]}, "planning.transpose is an order of the axes 0,1,2 of volumes, got [0, 1]"),
    ],
)
def test_values_that_do_not_go_together_are_refused(planning: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        _plan(**planning)
    assert message in str(caught.value)


def test_values_come_from_the_command_line() -> None:
    options = Options().with_settings(["planning.strides=[[1,1],[2,2]]", "planning.normalization=ct,zscore"])
    assert options.planning.strides == ((1, 1), (2, 2))
    assert options.planning.normalization == ("ct", "zscore")
