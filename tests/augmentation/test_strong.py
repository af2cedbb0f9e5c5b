from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from segfit.augmentation.policy import apply, draw
from segfit.augmentation.strong import Extras, apply_extras, draw_extras
from segfit.labels import Exchange
from segfit.planning.augmentation import STRENGTHS, augmentation_for
from segfit.specs import AugmentationSpec

PATCH = (12, 12)
MOVES = AugmentationSpec(quarter_turn_probability=1.0, axis_swap_probability=1.0, mirror_axes=(0, 1))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def drawn(spec: AugmentationSpec, patch: tuple[int, ...] = PATCH, batch: int = 2000, channels: int = 2) -> Extras:
    extras = draw_extras(spec, patch, batch, channels, rng())
    assert extras is not None
    return extras


def only(name: str) -> AugmentationSpec:
    return AugmentationSpec.model_validate({name: 1.0, "mirror_axes": (0, 1)})


def changed(extras: Extras) -> dict[str, np.ndarray]:
    """Which channels each artefact is drawn for."""
    return {
        "offset": extras.offset != 0,
        "blank": extras.boxes[..., 1, :].any((-1, -2)),
        "shading": extras.peak != 0,
        "local_gamma": extras.local_gamma != 1,
        "sharpening": extras.sharpness != 0,
    }


def test_without_them_no_random_number_is_drawn() -> None:
    generator = rng()
    assert draw_extras(AugmentationSpec(), PATCH, 3, 1, generator) is None
    assert generator.random() == rng().random()
    assert draw(AugmentationSpec(), PATCH, 3, 1, rng()).extras is None


def test_every_artefact_comes_as_often_as_asked() -> None:
    names = list(changed(drawn(MOVES)))
    spec = AugmentationSpec.model_validate({f"{name}_probability": 0.1 + 0.2 * i for i, name in enumerate(names)})
    for index, (_, found) in enumerate(changed(drawn(spec)).items()):
        assert found.mean() == pytest.approx((0.1 + 0.2 * index) / 2, abs=0.04)
        assert found.any(1).mean() == pytest.approx((0.1 + 0.2 * index) * 0.75, abs=0.05)  # of two channels
    extras = drawn(spec)
    starts, sizes = extras.boxes[..., 0, :], extras.boxes[..., 1, :]
    assert sizes.max() == 12 // 3 - 1
    assert (starts >= 0).all()
    assert (starts + sizes <= 12).all()
    assert np.abs(extras.peak).max() <= 5
    gamma = extras.local_gamma[extras.local_gamma != 1]
    assert ((gamma < 0.8) ^ (gamma > 1.5)).all()


def test_turns_and_swaps_move_image_and_labels_together_and_reach_every_place() -> None:
    labels = torch.arange(9, dtype=torch.int16).view(1, 1, 3, 3).repeat(400, 1, 1, 1)
    image = labels.float()
    moved, moved_labels = apply_extras(drawn(MOVES, (3, 3), 400, 1), image.clone(), labels.clone())
    assert torch.equal(moved, moved_labels.float())
    plain = labels[0, 0].numpy()
    symmetries = {np.rot90(start, turns).tobytes() for start, turns in product((plain, plain.T), range(4))}
    assert {sample.numpy().tobytes() for sample in moved_labels[:, 0]} == symmetries
    assert len(symmetries) == 8


@pytest.mark.parametrize(
    ("patch", "changes", "axes"),
    [
        ((8, 8, 8), {}, (0, 1, 2)),
        ((8, 8, 8), {"dummy_2d": True}, (1, 2)),
        ((8, 6, 6), {}, (1, 2)),
        ((8, 6, 8), {}, (0, 2)),
        ((8, 8, 8), {"mirror_axes": (0, 2)}, (0, 2)),
        ((8, 8, 8), {"mirror_axes": (0,)}, ()),
        ((8, 8, 8), {"exchange": Exchange(axis=2, pairs=((1, 2),))}, (0, 1)),
        ((8, 6, 4), {}, ()),
    ],
)
def test_only_axes_alike_change_places(
    patch: tuple[int, ...], changes: dict[str, object], axes: tuple[int, ...]
) -> None:
    spec = AugmentationSpec.model_validate({**MOVES.model_dump(), "mirror_axes": (0, 1, 2), **changes})
    extras = drawn(spec, patch, 50)
    assert extras.axes == axes
    image, labels = torch.rand(50, 2, *patch), torch.zeros(50, 1, *patch, dtype=torch.int16)
    moved, _ = apply_extras(extras, image.clone(), labels)
    same = [torch.equal(before, after) for before, after in zip(image, moved, strict=True)]
    assert all(same) == (not axes)


def _by_hand(extras: Extras, name: str, values: np.ndarray, channel: int) -> np.ndarray:
    grid = np.stack(np.meshgrid(*map(np.arange, values.shape), indexing="ij"), -1)
    low, high = values.min(), values.max()

    def blob(number: int) -> np.ndarray:
        centre, width = extras.blobs[0, channel, number]
        exponent = -(((grid - centre) / width) ** 2).sum(-1) / 2
        return np.exp(exponent - exponent.max())

    match name:
        case "offset":
            return values + extras.offset[0, channel]
        case "blank":
            for start, size in extras.boxes[0, channel]:
                place = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
                if size.all():
                    values[place] = values[place].mean()
            return values
        case "shading":
            return values + blob(0) * extras.peak[0, channel]
        case "local_gamma":
            bent = ((values - low) / (high - low)) ** extras.local_gamma[0, channel] * (high - low) + low
            return values + (bent - values) * blob(1)
    edges = -ndimage.laplace(values, mode="nearest")
    return np.clip(values + extras.sharpness[0, channel] * edges, low, high)


@pytest.mark.parametrize("patch", [(12, 12), (9, 10, 11)])
@pytest.mark.parametrize("name", ["offset", "blank", "shading", "local_gamma", "sharpening"])
def test_artefacts_by_hand(name: str, patch: tuple[int, ...]) -> None:
    extras = drawn(only(f"{name}_probability"), patch, 1, 8)
    image = torch.randn((1, 8, *patch), generator=torch.Generator().manual_seed(0))
    labels = torch.ones((1, 1, *patch), dtype=torch.int16)
    result, result_labels = apply_extras(extras, image.clone(), labels.clone())
    assert torch.equal(result_labels, labels)
    found = changed(extras)[name][0]
    assert 0 < found.sum() < 8
    for channel, is_changed in enumerate(found):
        assert torch.equal(result[0, channel], image[0, channel]) != bool(is_changed)
        expected = _by_hand(extras, name, image[0, channel].double().numpy(), channel)
        np.testing.assert_allclose(result[0, channel].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_strong_augmentation_leaves_its_arguments_and_masks_last() -> None:
    spec = augmentation_for(PATCH, (0, 1), (1,)).model_copy(update=STRENGTHS["strong"])
    spec = spec.model_copy(
        update={name: 1.0 for name in AugmentationSpec.model_fields if name.endswith("_probability")}
    )
    shape = spec.sample_patch
    image = torch.randn((4, 2, *shape), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(-1, 3, (4, 1, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.int16)
    kept: tuple[Tensor, Tensor] = (image.clone(), labels.clone())
    parameters = draw(spec, PATCH, 4, 2, rng())
    result, result_labels = apply(parameters, image, labels)
    again, _ = apply(parameters, image, labels)
    unmasked, _ = apply(replace(parameters, masked_channels=()), image, labels)
    assert torch.equal(image, kept[0])
    assert torch.equal(labels, kept[1])
    assert torch.equal(result, again)
    assert result.isfinite().all()
    assert result_labels.min() == 0
    outside = (result[:, 1] == 0) & (unmasked[:, 1] != 0)
    assert outside.any()
    assert torch.equal(result[:, 0], unmasked[:, 0])
