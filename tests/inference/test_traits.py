"""Traits of probabilities against a plain computation, in slabs and at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from segfit.bundle.bundle import Member
from segfit.evaluation.measurement import Margin
from segfit.evaluation.quality import QualityFit, Traits
from segfit.inference import quality
from segfit.inference.model import Model
from segfit.inference.to_input_grid import LogitField, LogitStream
from segfit.labels import LabelScheme
from segfit.preprocessing.pipeline import CaseProperties
from segfit.specs import Configuration

LABELS = {"background": 0, "a": 1, "b": 2}
REGIONS: dict[str, Any] = {"background": 0, "whole": [1, 2], "core": [2]}


FIT = QualityFit(
    constant=-8.0, slopes=(1.0, 0.0, 0.0), log_size=0.0, log_size_deviation=1.0,
    margin=Margin(groups=12, factor_90=2.0, factor_95=None), always=True,
)  # fmt: skip


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


def field_of(logits: Tensor | LogitStream, shape: tuple[int, ...], configuration: Configuration) -> LogitField:
    """Logits on the grid of the image."""
    properties = CaseProperties(
        case="c", stored_shape=shape, stored_spacing_mm=(2.0, 1.0, 1.0), affine=None, axis_order=(0, 1, 2),
        axis_flip=(False,) * 3, transpose=(0, 1, 2), spacing_mm=(2.0, 1.0, 1.0), shape_before_crop=shape,
        crop_box=tuple((0, n) for n in shape), shape_after_crop=shape, shape=shape,
    )  # fmt: skip
    return LogitField(logits, properties, configuration)


@pytest.mark.parametrize("values", [10**6, 100])
@pytest.mark.parametrize("declared", [LABELS, REGIONS])
def test_traits_are_those_of_a_plain_computation(
    configuration: Callable[..., Configuration],
    declared: dict[str, Any],
    values: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(quality._SLAB_VALUES, "cpu", values)
    regions = declared is REGIONS
    labels = LabelScheme.from_declaration(declared, [1, 2] if regions else None)
    shape = (7, 6, 5)
    logits = 2 * torch.randn(labels.num_outputs, *shape, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    found = quality.traits_of(field_of(logits, shape, configuration()), labels)
    assert torch.equal(logits, before)
    for index, class_ in enumerate(labels.classes):
        dice, step, voxels = plain(logits.double().numpy(), index + (not regions), regions=regions)
        one = found[class_.name]
        assert (one.soft_dice, one.step, one.size) == pytest.approx((dice, step, 2.0 * voxels), rel=1e-5)


def test_a_prediction_tells_its_quality(
    configuration: Callable[..., Configuration], member: Callable[..., Member], make_model: Callable[..., Model]
) -> None:
    model = make_model(member(configuration()), quality={"a": FIT})
    image = np.random.default_rng(0).normal(size=(10, 14, 12)).astype(np.float32)
    found = model.predict(image, spacing_mm=(2.0, 1.0, 1.0))
    (one,) = found.quality
    assert (one.name, one.confidence) == ("a", 0.9)
    low, high = one.low or 0, one.high or 0
    assert 0 < low < (one.dice or 0) < high < 0.7
    assert [item.code for item in found.warnings][-1] == "low_quality"
    assert model.predict(image, spacing_mm=(2.0, 1.0, 1.0)).quality == found.quality


@pytest.mark.parametrize("turned", [False, True])
def test_in_little_memory_the_quality_is_the_same(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    make_model: Callable[..., Model],
    turned: bool,
) -> None:
    """Sums over blocks as they are computed; of a member whose rows are others', over all of its logits."""
    members = [member(configuration(spacing=(1.1, 1.0, 1.2)))]
    if turned:
        members.append(member(configuration("other", transpose=(1, 0, 2))))
    fit = FIT.model_copy(update={"slopes": (1.0, 0.5, -0.5)})
    model = make_model(*members, quality={"a": fit, "b": fit})
    image = np.random.default_rng(0).normal(size=(23, 31, 27)).astype(np.float32)
    whole = model.predict(image, spacing_mm=(2.0, 1.0, 1.0))
    streamed = model.predict(image, spacing_mm=(2.0, 1.0, 1.0), memory_gb=1e-5)
    assert "streamed" in {item.code for item in streamed.warnings}
    assert [one.name for one in streamed.quality] == ["a", "b"]
    for one, other in zip(streamed.quality, whole.quality, strict=True):
        assert (one.dice, one.low, one.high) == pytest.approx((other.dice, other.low, other.high), rel=1e-4)


def test_blocks_give_the_traits_of_the_whole(configuration: Callable[..., Configuration]) -> None:
    """Also those that nobody asks for."""
    labels, shape = LabelScheme.from_declaration(REGIONS, [1, 2]), (9, 6, 5)
    logits = torch.randn(labels.num_outputs, *shape, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    stream = LogitStream(logits.shape, torch.split(logits, [4, 1, 4], 1), logits.device)
    whole = quality.traits_of(field_of(logits, shape, configuration()), labels)
    field = field_of(stream, shape, configuration())
    sums = quality.TraitSums(field, labels)
    field.read(0, ((0, 3), (0, 6), (0, 5)))
    assert {name: one.model_dump() for name, one in sums.traits().items()} == {
        name: pytest.approx(one.model_dump()) for name, one in whole.items()
    }
    assert torch.equal(logits, before)


def test_nothing_found_has_no_outline() -> None:
    sums = quality._sums(torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bool), 0)
    assert sums.tolist() == [0.0] * 5
    assert Traits(soft_dice=0, step=0, size=0).size == 0
