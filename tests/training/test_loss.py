from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from segfit.labels import LabelScheme
from segfit.options import LOSS_TERMS
from segfit.specs import TrainingSpec
from segfit.training.batch import Batch
from segfit.training.loss import SegmentationLoss, deep_supervision_weights, shrink_target, soft_centre_line

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


SCHEMES = [LABELS, IGNORE, REGIONS, REGIONS_IGNORE]
LOSSES = ["ce", "dice", "dice+topk", "focal", "tversky", "dice+cldice+ce"]


def value_of(terms: str, scheme: LabelScheme, logits: Tensor, target: Tensor, **parameters: float) -> float:
    recipe = TrainingSpec.model_validate({"loss": terms, **parameters})
    return SegmentationLoss(scheme, False, STRIDES, recipe)(logits, for_labels(target)).item()


def entropies(scheme: LabelScheme, logits: Tensor, target: Tensor) -> np.ndarray:
    """The cross-entropy of every voxel, and region, by numpy; 0 where labels are ignored."""
    z, y = logits.double().numpy(), target.numpy()
    if scheme.has_regions:
        p = 1 / (1 + np.exp(-z))
        truth = np.concatenate([(y == 1) | (y == 2), y == 2], 1)
        values = -np.log(np.where(truth, p, 1 - p))
    else:
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        values = -np.log(np.take_along_axis(p, np.minimum(y, 2).astype(np.int64), 1))
    return values * np.not_equal(y, 3 if scheme.ignore_value else -1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_entropies_by_hand(scheme: LabelScheme) -> None:
    ignored = scheme.ignore_value is not None
    logits, target = noise(2, scheme.num_outputs, 5, 6), labels(2, 1, 5, 6, below=4 if ignored else 3)
    values = entropies(scheme, logits, target)
    counted = (target != 3).sum().item() if ignored else values.size
    assert value_of("ce", scheme, logits, target) == pytest.approx(values.sum() / counted, rel=1e-5)
    for exponent in (0.5, 2.0):
        expected = ((1 - np.exp(-values)) ** exponent * values).sum() / counted
        assert value_of("focal", scheme, logits, target, focal_exponent=exponent) == pytest.approx(expected, rel=1e-5)
    assert value_of("focal", scheme, logits, target, focal_exponent=0) == pytest.approx(values.sum() / counted)
    for share in (0.1, 0.25, 1.0, 1e-9):
        worst = np.sort(values.ravel())[::-1][: max(1, int(share * values.size))]
        assert value_of("topk", scheme, logits, target, topk_share=share) == pytest.approx(worst.mean(), rel=1e-5)


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tversky_by_hand(scheme: LabelScheme, batch_dice: bool) -> None:
    logits, target = noise(2, scheme.num_outputs, 5, 6), labels(2, 1, 5, 6, below=4)
    target = target if scheme.ignore_value else target.clamp(max=2)
    z, y = logits.double().numpy(), target.numpy()
    counts = np.not_equal(y, 3 if scheme.ignore_value else -1)
    truth = np.concatenate([(y == 1) | (y == 2), y == 2] if scheme.has_regions else [y == 1, y == 2], 1)
    p = 1 / (1 + np.exp(-z)) if scheme.has_regions else (np.exp(z) / np.exp(z).sum(1, keepdims=True))[:, 1:]
    axes = (0, 2, 3) if batch_dice else (2, 3)
    hit, false, missed = ((counts * a).sum(axes) for a in (p * truth, p * ~truth, (1 - p) * truth))
    for alpha, beta in ((0.3, 0.7), (1.0, 0.0), (0.5, 0.5)):
        recipe = TrainingSpec(loss="tversky", tversky_alpha=alpha, tversky_beta=beta)
        value = SegmentationLoss(scheme, batch_dice, STRIDES, recipe)(logits, for_labels(target)).item()
        expected = -(hit / (hit + alpha * false + beta * missed)).mean()
        assert value == pytest.approx(expected, rel=1e-5)
    dice = SegmentationLoss(scheme, batch_dice, STRIDES, TrainingSpec(loss="dice"))
    assert value == pytest.approx(dice(logits, for_labels(target)).item(), rel=1e-6)


def skeleton(mask: np.ndarray, steps: int) -> np.ndarray:
    """The soft skeleton of one mask as it was published (Shit et al. 2021), by scipy."""
    cross = ndimage.generate_binary_structure(mask.ndim, 1)

    def eroded(image: np.ndarray) -> np.ndarray:
        return ndimage.grey_erosion(image, footprint=cross, mode="nearest")

    def opened(image: np.ndarray) -> np.ndarray:
        return ndimage.grey_dilation(eroded(image), size=(3,) * mask.ndim, mode="nearest")

    line = np.maximum(mask - opened(mask), 0)
    for _ in range(steps):
        mask = eroded(mask)
        found = np.maximum(mask - opened(mask), 0)
        line = line + np.maximum(found - line * found, 0)
    return line


@pytest.mark.parametrize("shape", [(9, 11), (7, 1, 8), (6, 7, 8)])
def test_centre_lines_by_hand(shape: tuple[int, ...]) -> None:
    logits, target = noise(2, 3, *shape), labels(2, 1, *shape)
    shares = logits.double().softmax(1).numpy()
    ratios = []
    for sample in range(2):
        for label in (1, 2):
            p, y = shares[sample, label], (target[sample, 0].numpy() == label).astype(float)
            p_line, y_line = skeleton(p, 2), skeleton(y, 2)
            found = torch.from_numpy(np.stack([p, y]))[None]
            np.testing.assert_allclose(soft_centre_line(found, 2)[0].numpy(), np.stack([p_line, y_line]), atol=1e-12)
            precision, sensitivity = ((a * b).sum() + 1 for a, b in ((p_line, y), (y_line, p)))
            precision, sensitivity = precision / (p_line.sum() + 1), sensitivity / (y_line.sum() + 1)
            ratios.append(2 * precision * sensitivity / (precision + sensitivity))
    assert value_of("cldice", LABELS, logits, target, cldice_steps=2) == pytest.approx(-np.mean(ratios), rel=1e-5)


def test_centre_lines_see_a_gap_more_than_a_thinner_wall() -> None:
    scheme = LabelScheme.from_declaration({"background": 0, "vessel": 1})
    tube = torch.zeros((1, 1, 9, 40), dtype=torch.int16)
    tube[..., 2:7, :] = 1
    thin, broken = tube.clone(), tube.clone()
    thin[..., 2:3, :] = thin[..., 6:7, :] = 0
    broken[..., 18:23] = 0

    def value(terms: str, found: Tensor) -> float:
        return value_of(terms, scheme, torch.cat((found == 0, found == 1), 1) * 80.0 - 40, tube)

    assert value("cldice", tube) == pytest.approx(-1, abs=1e-5)
    assert value("cldice", broken) > value("cldice", thin)
    assert value("dice", broken) < value("dice", thin)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("terms", LOSSES)
def test_every_loss_heeds_what_is_ignored_and_stays_finite(terms: str, scheme: LabelScheme) -> None:
    loss = SegmentationLoss(scheme, True, STRIDES, TrainingSpec(loss=terms))
    ignores = scheme.ignore_value is not None
    target = labels(2, 1, 8, 8, below=4 if ignores else 3)
    logits = noise(2, scheme.num_outputs, 8, 8).requires_grad_()
    value = loss(logits, for_labels(target))
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.any()
    if ignores:
        ignored = (target == 3).expand_as(gradient)
        assert gradient[ignored].eq(0).all()
        other = torch.where(ignored, 5 * noise(*logits.shape, seed=9), logits.detach())
        assert loss(other, for_labels(target)).item() == pytest.approx(value.item(), rel=1e-6)
        nothing = loss(logits, for_labels(torch.full_like(target, 3)))
        (gradient,) = torch.autograd.grad(nothing, logits)
        assert nothing.isfinite()
        assert gradient.eq(0).all()
    extreme = (noise(2, scheme.num_outputs, 8, 8) * 1e4).requires_grad_()
    value = loss(extreme, for_labels(target))
    (gradient,) = torch.autograd.grad(value, extreme)
    assert value.isfinite()
    assert gradient.isfinite().all()
    low = logits.detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(low, for_labels(target)).item() == loss(low.float(), for_labels(target)).item()


def test_terms_add_up() -> None:
    logits, target = noise(2, 3, 8, 8), labels(2, 1, 8, 8)
    parts = [value_of(term, LABELS, logits, target) for term in LOSS_TERMS]
    assert value_of("+".join(LOSS_TERMS), LABELS, logits, target) == pytest.approx(sum(parts), rel=1e-5)
