"""Traits of probabilities against a plain computation, in slabs and at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from segfit.bundle.bundle import Member
from segfit.evaluation.measurement import Margin
from segfit.evaluation.quality import QualityFit, Traits
from segfit.inference import quality
from segfit.inference.model import Model
from segfit.inference.to_input_grid import LogitField
from segfit.labels import LabelScheme
from segfit.preprocessing.pipeline import CaseProperties
from segfit.specs import Configuration

LABELS = {"background": 0, "a": 1, "b": 2}
REGIONS: dict[str, Any] = {"background": 0, "whole": [1, 2], "core": [2]}


def plain(logits: np.ndarray, channel: int, *, regions: bool) -> tuple[float, float, int]:
    """Expected Dice, mean step across the outline, and voxels of one channel."""
    odds = np.exp(logits)
    p = odds[channel] / (1 + odds[channel]) if regions else odds[channel] / odds.sum(axis=0)
    mask = p > 0.5 if regions else logits.argmax(axis=0) == channel
    steps = []
    for axis in range(p.ndim):
        edge = np.diff(mask.astype(int), axis=axis) != 0
        steps += np.abs(np.diff(p, axis=axis))[edge].tolist()
    return 2 * float((p * mask).sum() / (p.sum() + mask.sum())), float(np.mean(steps)), int(mask.sum())


@pytest.mark.parametrize("values", [10**6, 100])
@pytest.mark.parametrize("declared", [LABELS, REGIONS])
def test_traits_are_those_of_a_plain_computation(
    configuration: Callable[..., Configuration],
    declared: dict[str, Any],
    values: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quality, "_SLAB_VALUES", values)
    regions = declared is REGIONS
    labels = LabelScheme.from_declaration(declared, [1, 2] if regions else None)
    shape = (7, 6, 5)
    logits = 2 * torch.randn(labels.num_outputs, *shape, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    properties = CaseProperties(
        case="c", stored_shape=shape, stored_spacing_mm=(2.0, 1.0, 1.0), affine=None, axis_order=(0, 1, 2),
        axis_flip=(False,) * 3, transpose=(0, 1, 2), spacing_mm=(2.0, 1.0, 1.0), shape_before_crop=shape,
        crop_box=tuple((0, n) for n in shape), shape_after_crop=shape, shape=shape,
    )  # fmt: skip
    found = quality.traits_of(LogitField(logits, properties, configuration()), labels)
    assert torch.equal(logits, before)
    for index, class_ in enumerate(labels.classes):
        dice, step, voxels = plain(logits.double().numpy(), index + (not regions), regions=regions)
        one = found[class_.name]
        assert (one.soft_dice, one.step, one.size) == pytest.approx((dice, step, 2.0 * voxels), rel=1e-5)


def test_a_prediction_tells_its_quality(
    configuration: Callable[..., Configuration], member: Callable[..., Member], make_model: Callable[..., Model]
) -> None:
    fit = QualityFit(
        constant=-8.0, slopes=(1.0, 0.0, 0.0), log_size=0.0, log_size_deviation=1.0,
        margin=Margin(groups=12, factor_90=2.0, factor_95=None), always=True,
    )  # fmt: skip
    model = make_model(member(configuration()), quality={"a": fit})
    image = np.random.default_rng(0).normal(size=(10, 14, 12)).astype(np.float32)
    found = model.predict(image, spacing_mm=(2.0, 1.0, 1.0))
    (one,) = found.quality
    assert (one.name, one.confidence) == ("a", 0.9)
    low, high = one.low or 0, one.high or 0
    assert 0 < low < (one.dice or 0) < high < 0.7
    assert [item.code for item in found.warnings][-1] == "low_quality"
    assert model.predict(image, spacing_mm=(2.0, 1.0, 1.0)).quality == found.quality


def test_nothing_found_has_no_outline() -> None:
    sums = quality._sums(torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bool), 0)
    assert sums.tolist() == [0.0] * 5
    assert Traits(soft_dice=0, step=0, size=0).size == 0
