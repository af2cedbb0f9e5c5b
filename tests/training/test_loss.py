from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from segfit.labels import LabelScheme
from segfit.training.batch import Batch
from segfit.training.loss import SegmentationLoss, deep_supervision_weights, shrink_target

LABELS = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2})
IGNORE = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2, "ignore": 3})
REGIONS = LabelScheme.from_declaration({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
REGIONS_IGNORE = LabelScheme.from_declaration({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2])
STRIDES = ((1, 1), (2, 2), (2, 2))


def for_labels(target: Tensor) -> Batch:
    return Batch(torch.empty(0), target)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(*shape: int, below: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int16)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_labels_by_hand(batch_dice: bool) -> None:
    logits, target = noise(2, 3, 5, 6), labels(2, 1, 5, 6)
    z = logits.double().numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    y = np.stack([target[:, 0].numpy() == label for label in range(3)], 1)
    axes = (0, 2, 3) if batch_dice else (2, 3)
    dice = (2 * (p * y).sum(axes) + 1e-5) / (p.sum(axes) + y.sum(axes) + 1e-5)
    expected = -np.log((p * y).sum(1)).mean() - dice[..., 1:].mean()
    assert SegmentationLoss(LABELS, batch_dice, STRIDES)(logits, for_labels(target)).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_regions_by_hand() -> None:
    logits, target = noise(2, 2, 5, 6), labels(2, 1, 5, 6)
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    y = np.stack([target[:, 0].numpy() >= 1, target[:, 0].numpy() == 2], 1)
    dice = (2 * (p * y).sum((2, 3)) + 1e-5) / (p.sum((2, 3)) + y.sum((2, 3)) + 1e-5)
    expected = -np.log(np.where(y, p, 1 - p)).mean() - dice.mean()
    assert SegmentationLoss(REGIONS, False, STRIDES)(logits, for_labels(target)).item() == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("scheme", [LABELS, REGIONS])
def test_perfect_prediction_gives_minus_one(scheme: LabelScheme) -> None:
    target = labels(2, 1, 8, 8)
    truth = [target == 0, target == 1, target == 2] if scheme is LABELS else [target >= 1, target == 2]
    logits = torch.cat(truth, 1).float() * 80 - 40
    assert SegmentationLoss(scheme, False, STRIDES)(logits, for_labels(target)).item() == pytest.approx(-1, abs=1e-5)


@pytest.mark.parametrize("scheme", [IGNORE, REGIONS_IGNORE])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_ignored_voxels_have_no_say(scheme: LabelScheme, batch_dice: bool) -> None:
    target = labels(2, 1, 6, 6, below=4)
    logits = noise(2, scheme.num_outputs, 6, 6).requires_grad_()
    loss = SegmentationLoss(scheme, batch_dice, STRIDES)
    value = loss(logits, for_labels(target))
    (gradient,) = torch.autograd.grad(value, logits)
    ignored = (target == 3).expand_as(gradient)
    assert gradient[ignored].eq(0).all()
    assert gradient[~ignored].ne(0).all()
    other = torch.where(ignored, 5 * noise(*logits.shape, seed=9), logits.detach())
    assert loss(other, for_labels(target)).item() == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize("scheme", [IGNORE, REGIONS_IGNORE])
def test_everything_ignored_is_finite(scheme: LabelScheme) -> None:
    logits = noise(1, scheme.num_outputs, 4, 4).requires_grad_()
    value = SegmentationLoss(scheme, False, STRIDES)(logits, for_labels(torch.full((1, 1, 4, 4), 3)))
    assert value.item() == pytest.approx(-1)
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.eq(0).all()


@pytest.mark.parametrize("scheme", [LABELS, REGIONS, IGNORE, REGIONS_IGNORE])
def test_low_precision_logits_are_computed_in_float32(scheme: LabelScheme) -> None:
    logits, target = (noise(2, scheme.num_outputs, 16, 16) * 20).bfloat16(), labels(2, 1, 16, 16)
    loss = SegmentationLoss(scheme, True, STRIDES)
    expected = loss(logits.float(), for_labels(target))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(logits.requires_grad_(), for_labels(target))
    assert value.dtype == torch.float32
    assert value.item() == expected.item()
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.dtype == torch.bfloat16
    assert gradient.isfinite().all()


def test_extreme_logits_stay_finite() -> None:
    for scheme in (LABELS, REGIONS):
        logits = (noise(1, scheme.num_outputs, 8, 8) * 1e4).requires_grad_()
        value = SegmentationLoss(scheme, False, STRIDES)(logits, for_labels(labels(1, 1, 8, 8)))
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_deep_supervision_weighs_and_leaves_out_the_lowest() -> None:
    assert deep_supervision_weights(1) == (1.0,)
    assert deep_supervision_weights(2) == (1.0, 0.0)
    assert deep_supervision_weights(5) == pytest.approx((8 / 15, 4 / 15, 2 / 15, 1 / 15, 0))
    loss = SegmentationLoss(LABELS, False, ((1, 1), (2, 2), (2, 1), (2, 2)))
    assert loss.num_heads == 2
    target = labels(2, 1, 8, 8)
    outputs = [noise(2, 3, 8, 8), noise(2, 3, 4, 4), noise(2, 3, 2, 4)]
    parts = [loss(output, for_labels(shrink_target(target, output.shape[2:]))).item() for output in outputs]
    assert loss(outputs, for_labels(target)).item() == pytest.approx((2 * parts[0] + parts[1]) / 3, rel=1e-6)
    assert loss(outputs[:2], for_labels(target)).item() == loss(outputs, for_labels(target)).item()


def test_two_stages_train_their_only_output() -> None:
    loss = SegmentationLoss(LABELS, False, ((1, 1), (2, 2)))
    output, target = noise(1, 3, 4, 4), labels(1, 1, 4, 4)
    assert loss.num_heads == 1
    assert loss([output], for_labels(target)).item() == loss(output, for_labels(target)).item()


def test_target_is_shrunk_by_nearest_exact() -> None:
    target = labels(2, 1, 12, 10, below=9)
    for size in ((12, 10), (6, 5), (4, 5), (3, 2), (1, 10)):
        expected = torch.nn.functional.interpolate(target.float(), size=size, mode="nearest-exact")
        assert torch.equal(shrink_target(target, size).float(), expected)
