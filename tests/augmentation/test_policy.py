from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from segfit.augmentation.intensity import (
    blur,
    blur_kernels,
    change_contrast,
    change_gamma,
    lower_resolution,
    make_noise,
)
from segfit.augmentation.policy import Parameters, apply, draw, draw_matrices, exchanged, turned
from segfit.augmentation.spatial import centre_crop, warp
from segfit.labels import Exchange
from segfit.planning.augmentation import augmentation_for
from segfit.specs import AugmentationSpec

OFF = AugmentationSpec(
    rotation_probability=0,
    scaling_probability=0,
    noise_probability=0,
    blur_probability=0,
    brightness_probability=0,
    contrast_probability=0,
    low_resolution_probability=0,
    inverted_gamma_probability=0,
    gamma_probability=0,
)
ALWAYS = AugmentationSpec(
    rotation_probability=1,
    scaling_probability=1,
    noise_probability=1,
    blur_probability=1,
    brightness_probability=1,
    contrast_probability=1,
    low_resolution_probability=1,
    inverted_gamma_probability=1,
    gamma_probability=1,
    mirror_axes=(0, 1, 2),
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def one(parameters: Parameters, sample: int) -> Parameters:
    """The parameters of one sample."""
    arrays: dict[str, Any] = {
        field.name: value[sample : sample + 1]
        for field in fields(parameters)
        if isinstance(value := getattr(parameters, field.name), np.ndarray)
    }
    return replace(parameters, **arrays)


def batch(*shape: int, channels: int = 2, size: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(size, channels, *shape, generator=generator)
    labels = torch.randint(-1, 4, (size, 1, *shape), generator=generator, dtype=torch.int16)
    return image, labels


def assert_same(first: Parameters, second: Parameters) -> None:
    for field in fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name))


def test_neutral_parameters_crop_exactly() -> None:
    image, labels = batch(11, 12, 10)
    new_image, new_labels = apply(draw(OFF, (7, 8, 9), 3, 2, rng()), image, labels)
    assert torch.equal(new_image, centre_crop(image, (7, 8, 9)))
    assert torch.equal(new_labels, centre_crop(labels, (7, 8, 9)).clamp(min=0))
    assert new_labels.dtype == torch.int16


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("spec", [ALWAYS, OFF])
def test_arguments_stay_as_they_are(together: bool, spec: AugmentationSpec) -> None:
    image, labels = batch(8, 8)
    before = image.clone(), labels.clone()
    spec = spec.model_copy(update={"masked_channels": (0, 1)})
    apply(draw(spec, (8, 8), 3, 2, rng()), image, labels, together=together)
    assert torch.equal(image, before[0])
    assert torch.equal(labels, before[1])


def test_same_seed_same_batch() -> None:
    image, labels = batch(12, 12, 12)
    first, second = (draw(ALWAYS, (10, 10, 10), 3, 2, rng(7)) for _ in range(2))
    assert_same(first, second)
    for one_result, other_result in zip(apply(first, image, labels), apply(second, image, labels), strict=True):
        assert torch.equal(one_result, other_result)
    assert not torch.equal(
        apply(draw(ALWAYS, (10, 10, 10), 3, 2, rng(8)), image, labels)[0], apply(first, image, labels)[0]
    )


@pytest.mark.parametrize(
    ("sample", "patch", "dummy"),
    [((13, 14), (10, 12), False), ((9, 12, 11), (7, 8, 9), False), ((5, 16, 15), (5, 12, 12), True)],
)
def test_batch_equals_one_by_one(sample: tuple[int, ...], patch: tuple[int, ...], dummy: bool) -> None:
    spec = ALWAYS.model_copy(update={"dummy_2d": dummy, "masked_channels": (1,)})
    spec = spec.model_copy(update={"blur_probability": 0.5, "gamma_probability": 0.5, "rotation_probability": 0.5})
    image, labels = batch(*sample, size=4)
    parameters = draw(spec, patch, 4, 2, rng(3))
    together = apply(parameters, image, labels)
    for i in range(4):
        alone = apply(one(parameters, i), image[i : i + 1], labels[i : i + 1])
        assert torch.equal(alone[0][0], together[0][i])
        assert torch.equal(alone[1][0], together[1][i])
    assert set(together[1].unique().tolist()) <= {0, 1, 2, 3}


def test_order_of_the_steps() -> None:
    image, labels = batch(12, 13, 14, size=1, channels=1)
    p = draw(ALWAYS, (10, 10, 10), 1, 1, rng(2))
    p = replace(
        p, blur_sigma=np.full((1, 1, 3), 0.7), resolution=np.full((1, 1), 0.6), flip=np.array([[True, False, True]])
    )
    moved, classes = warp(image[0], labels[0], p.matrix[0], (10, 10, 10))
    value = moved + make_noise((1, 10, 10, 10), p.noise_std[0], int(p.noise_seed[0]), image.device)
    value = blur(value, [kernel[0].tolist() for kernel in blur_kernels(p.blur_sigma[0])]) * p.brightness[0, 0]
    value = lower_resolution(change_contrast(value, p.contrast[0, 0]), 0.6, (0, 1, 2))
    value = change_gamma(change_gamma(value, p.inverted_gamma[0, 0], inverted=True), p.gamma[0, 0])
    new_image, new_labels = apply(p, image, labels)
    torch.testing.assert_close(new_image[0], value.flip(1, 3), rtol=0, atol=1e-5)
    assert torch.equal(new_labels[0], classes.flip(1, 3).clamp(min=0))


def test_dummy_2d_turns_every_slice_alike() -> None:
    spec = OFF.model_copy(update={"rotation_probability": 1.0, "rotation_degrees": 180.0, "dummy_2d": True})
    image, labels = batch(6, 12, 13, size=1)
    p = draw(spec, (4, 9, 10), 1, 2, rng())
    assert p.matrix.shape == (1, 2, 2)
    new_image, new_labels = apply(p, image, labels)
    for z in range(4):
        moved, classes = warp(image[0, :, z + 1], labels[0, :, z + 1], p.matrix[0], (9, 10))
        torch.testing.assert_close(new_image[0, :, z], moved)
        assert torch.equal(new_labels[0, :, z], classes.clamp(min=0))


def test_masked_channels_are_zero_outside_the_mask() -> None:
    image, labels = batch(8, 8)
    spec = OFF.model_copy(update={"masked_channels": (1,)})
    new_image, _ = apply(draw(spec, (8, 8), 3, 2, rng()), image, labels)
    outside = labels[:, 0] < 0
    assert new_image[:, 1][outside].eq(0).all()
    assert torch.equal(new_image[:, 1][~outside], image[:, 1][~outside])
    assert torch.equal(new_image[:, 0], image[:, 0])


def test_brightness_multiplies_each_channel() -> None:
    image, labels = batch(6, 6)
    p = replace(draw(OFF, (6, 6), 3, 2, rng()), brightness=np.array([[1, 2], [1, 1], [0.5, 1]]))
    factors = torch.tensor([[1.0, 2.0], [1.0, 1.0], [0.5, 1.0]])[..., None, None]
    torch.testing.assert_close(apply(p, image, labels)[0], image * factors)


def test_only_allowed_axes_are_mirrored() -> None:
    spec = OFF.model_copy(update={"mirror_axes": (0, 2)})
    flip = draw(spec, (4, 4, 4), 4000, 1, rng()).flip
    assert not flip[:, 1].any()
    assert flip[:, [0, 2]].mean(0) == pytest.approx(0.5, abs=0.04)
    assert (flip[:, 0] == flip[:, 2]).mean() == pytest.approx(0.5, abs=0.04)


def _exchanged_plainly(labels: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    result = labels.clone()
    for first, second in pairs:
        result[labels == first], result[labels == second] = second, first
    return result


@pytest.mark.parametrize("pairs", [((1, 2),), ((4, 2), (1, 7)), tuple((a, a + 40) for a in range(1, 40))])
def test_the_table_exchanges_as_comparisons_do(pairs: tuple[tuple[int, int], ...]) -> None:
    labels = torch.randint(-1, 90, (1, 20, 21), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    result = exchanged(labels, pairs)
    assert result.dtype == torch.int16
    assert torch.equal(result, _exchanged_plainly(labels, pairs))
    assert torch.equal(exchanged(result, pairs), labels)


def test_labels_are_exchanged_in_exactly_the_samples_flipped_along_the_axis() -> None:
    spec = OFF.model_copy(update={"mirror_axes": (0, 1), "masked_channels": (1,)})
    image, labels = batch(8, 8, size=4)
    flip = np.array([[False, True], [True, False], [True, True], [False, False]])
    parameters = replace(draw(spec, (8, 8), 4, 2, rng()), flip=flip)
    plain_image, plain_labels = apply(parameters, image, labels)
    new_image, new_labels = apply(replace(parameters, exchange=Exchange(axis=1, pairs=((1, 2),))), image, labels)
    assert torch.equal(new_image, plain_image)  # the mask is where labels are -1, which stay
    for sample in (0, 2):
        assert torch.equal(new_labels[sample], _exchanged_plainly(plain_labels[sample], ((1, 2),)))
        assert not torch.equal(new_labels[sample], plain_labels[sample])
    for sample in (1, 3):
        assert torch.equal(new_labels[sample], plain_labels[sample])
    untouched = (plain_labels == 0) | (plain_labels == 3)  # background, outside, and what stands for the ignore value
    assert torch.equal(new_labels[untouched], plain_labels[untouched])


def test_the_plan_hands_the_exchange_on() -> None:
    exchange = Exchange(axis=0, pairs=((1, 2),))
    spec = OFF.model_copy(update={"exchange": exchange})
    assert draw(spec, (4, 4), 2, 1, rng()).exchange == exchange
    assert draw(OFF, (4, 4), 2, 1, rng()).exchange is None


def test_probabilities_and_ranges_of_the_reference() -> None:
    samples, channels = 20000, 2
    p = draw(augmentation_for((40, 56, 40), (0, 1, 2)), (40, 56, 40), samples, channels, rng(5))

    def assert_share(active: np.ndarray, probability: float) -> None:
        bound = 5 * np.sqrt(probability * (1 - probability) / active.shape[0])
        assert active.mean() == pytest.approx(probability, abs=bound)

    scale = np.cbrt(np.linalg.det(p.matrix))
    turned = ~np.isclose(p.matrix, np.eye(3) * scale[:, None, None], atol=1e-9).all((1, 2))
    scaled = ~np.isclose(scale, 1, atol=1e-9)
    assert_share(turned, 0.2)
    assert_share(scaled, 0.2)
    assert_share(turned | scaled, 0.36)
    assert 0.7 <= scale.min() < 0.72
    assert 1.38 < scale.max() <= 1.4
    assert scale[scaled].mean() == pytest.approx(1.05, abs=0.02)
    about_x = np.degrees(np.arctan2(p.matrix[:, 2, 1], p.matrix[:, 2, 2]))  # of Rz Ry Rx
    assert 28 < np.abs(about_x).max() <= 30

    assert_share(p.noise_std > 0, 0.1)
    assert 0.09 < p.noise_std.max() <= 0.1
    assert len(set(p.noise_seed.tolist())) == samples
    blurred = p.blur_sigma > 0
    assert np.array_equal(blurred.all(2), blurred.any(2))
    assert_share(blurred[:, 0, 0], 0.1)
    assert_share(blurred.any((1, 2)), 0.2 * 0.75)
    assert 0.5 <= p.blur_sigma[blurred].min() < 0.51 < 0.99 < p.blur_sigma.max() <= 1
    lowered = p.resolution != 1
    assert_share(lowered[:, 0], 0.125)
    assert_share(lowered.any(1), 0.25 * 0.75)
    assert 0.5 <= p.resolution.min() < 0.51
    for values, probability, (low, high) in (
        (p.brightness, 0.15, (0.75, 1.25)),
        (p.contrast, 0.15, (0.75, 1.25)),
        (p.inverted_gamma, 0.1, (0.7, 1.5)),
        (p.gamma, 0.3, (0.7, 1.5)),
    ):
        active = values != 1
        assert np.array_equal(active[:, 0], active[:, 1])  # the sample decides, each channel has its own factor
        assert_share(active[:, 0], probability)
        changed = values[active[:, 0]]
        assert not np.isclose(changed[:, 0], changed[:, 1]).all()
        assert_share(changed[:, 0] < 1, 0.5)
        assert low <= changed.min() < low + 0.01
        assert high - 0.01 < changed.max() <= high
        assert changed[changed < 1].mean() == pytest.approx((low + 1) / 2, abs=0.01)


def test_a_range_on_one_side_of_one_is_uniform() -> None:
    spec = OFF.model_copy(update={"brightness_probability": 1.0, "brightness_range": (1.5, 2.5)})
    values = draw(spec, (4, 4), 4000, 1, rng()).brightness
    assert values.min() >= 1.5
    assert values.max() <= 2.5
    assert values.mean() == pytest.approx(2.0, abs=0.03)


SOMETIMES = {
    field: 0.5
    for field in AugmentationSpec.model_fields
    if field.endswith("_probability") and field != "noise_probability"
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("sample", "patch", "dummy"),
    [((23, 24), (20, 22), False), ((13, 16, 17), (11, 14, 14), False), ((5, 19, 18), (5, 14, 14), True)],
)
def test_all_at_once_is_as_one_by_one(seed: int, sample: tuple[int, ...], patch: tuple[int, ...], dummy: bool) -> None:
    image, labels = batch(*sample, size=5, channels=3)
    spec = ALWAYS.model_copy(
        update=SOMETIMES
        | {
            "noise_probability": 0.0,
            "dummy_2d": dummy,
            "mirror_axes": tuple(range(len(patch))),
            "masked_channels": (1,),
            "exchange": Exchange(axis=1, pairs=((1, 3),)),
        }
    )
    parameters = draw(spec, patch, 5, 3, rng(seed))
    plain_image, plain_labels = apply(parameters, image, labels, together=False)
    new_image, new_labels = apply(parameters, image, labels, together=True)
    torch.testing.assert_close(new_image, plain_image, rtol=0, atol=1e-5)
    assert torch.equal(new_labels, plain_labels)
    assert new_labels.dtype == plain_labels.dtype
    assert new_image.is_contiguous()
    assert new_labels.is_contiguous()


def test_neutral_parameters_crop_exactly_all_at_once() -> None:
    image, labels = batch(11, 12, 10)
    new_image, new_labels = apply(draw(OFF, (7, 8, 9), 3, 2, rng()), image, labels, together=True)
    assert torch.equal(new_image, centre_crop(image, (7, 8, 9)))
    assert torch.equal(new_labels, centre_crop(labels, (7, 8, 9)).clamp(min=0))


def test_noise_all_at_once_is_each_samples_own() -> None:
    image, labels = torch.zeros(3, 2, 60, 60), torch.zeros(3, 1, 60, 60, dtype=torch.int16)
    p = replace(draw(OFF, (60, 60), 3, 2, rng()), noise_std=np.array([0.1, 0.0, 0.05]))
    noise, _ = apply(p, image, labels, together=True)
    assert torch.equal(noise[1], image[1])
    for sample, std in ((0, 0.1), (2, 0.05)):
        assert noise[sample].std().item() == pytest.approx(std, rel=0.05)
        assert noise[sample].mean().item() == pytest.approx(0, abs=5 * std / 85)
    rows = noise[[0, 2]].flatten(0, 1).flatten(1)
    assert (torch.corrcoef(rows) - torch.eye(4)).abs().max() < 0.1
    assert torch.equal(noise, apply(p, image, labels, together=True)[0])


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("sample", "patch", "dummy"),
    [((13, 14), (10, 12), False), ((9, 12, 11), (7, 9, 8), False), ((5, 16, 15), (5, 12, 12), True)],
)
def test_samples_that_are_only_cropped_need_no_more_than_the_patch(
    sample: tuple[int, ...], patch: tuple[int, ...], dummy: bool, together: bool
) -> None:
    spec = ALWAYS.model_copy(update={"dummy_2d": dummy, "rotation_probability": 0.3, "scaling_probability": 0.3})
    image, labels = batch(*sample, size=6)
    parameters = draw(spec, patch, 6, 2, rng(4))
    which = turned(draw_matrices(spec, len(patch), 6, rng(4)))
    assert 0 < len(which) < 6
    small = [centre_crop(part, patch).clone() for part in (image, labels)]
    for part in small:
        part[which] = 99  # is not looked at
    result = apply(parameters, *small, (image[which], labels[which]), together=together)
    for part, expected in zip(result, apply(parameters, image, labels, together=together), strict=True):
        assert torch.equal(part, expected)


def test_a_batch_cut_for_other_parameters_is_refused() -> None:
    image, labels = batch(8, 8)
    with pytest.raises(AssertionError, match="other samples are turned"):
        apply(draw(OFF, (8, 8), 3, 2, rng()), image, labels, (image[:1], labels[:1]))
