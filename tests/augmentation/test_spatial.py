from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segfit.augmentation import spatial
from segfit.augmentation.spatial import OUTSIDE, affine_matrices, centre_crop, warp_together


def matrix(*degrees: float, scale: float = 1.0) -> np.ndarray:
    return affine_matrices(np.radians([degrees]), np.array([scale]))[0]


def warp(image: Tensor, labels: Tensor, a: np.ndarray, patch: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """One sample, warped alone and together with another one; the results must be the same."""
    alone = spatial.warp(image, labels, a, patch)
    matrices = torch.from_numpy(np.stack([a, np.eye(len(a))])).float()
    together = warp_together(torch.stack([image] * 2), torch.stack([labels] * 2), matrices, patch)
    torch.testing.assert_close(together[0][0], alone[0], rtol=0, atol=1e-5)
    assert torch.equal(together[1][0], alone[1])
    return alone


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blobs(*shape: int, labels: int, seed: int = 0) -> Tensor:
    """Labels 0 ... labels - 1 in patches of about three voxels."""
    coarse = torch.randint(labels, [1, 1, *(-(-n // 3) for n in shape)], generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse.float(), size=shape, mode="nearest")[0].to(torch.int16)


def by_grid_sample(array: Tensor, a: np.ndarray, patch: tuple[int, ...]) -> Tensor:
    """The same mapping through PyTorch's own sampler; its coordinates run from the last axis to the first."""
    source = np.array(array.shape[1:], dtype=float)
    theta = torch.from_numpy((a * np.array(patch) / source[:, None])[::-1, ::-1].copy()).float()
    theta = torch.cat((theta, torch.zeros(len(patch), 1)), dim=1)[None]
    grid = F.affine_grid(theta, [1, len(array), *patch], align_corners=False)
    return F.grid_sample(array[None], grid, align_corners=False)[0]


def test_matrices_are_rotations_times_scale() -> None:
    angles = np.random.default_rng(0).uniform(-3, 3, (5, 3))
    scales = np.linspace(0.7, 1.4, 5)
    result = affine_matrices(angles, scales)
    np.testing.assert_allclose(result @ result.transpose(0, 2, 1), np.eye(3) * scales[:, None, None] ** 2, atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(result), scales**3)
    x, y = affine_matrices(np.array([[0.3, 0, 0], [0, 0.3, 0]]), np.ones(2))
    np.testing.assert_allclose(affine_matrices(np.array([[0.3, 0.3, 0]]), np.ones(1))[0], y @ x, atol=1e-12)


def test_centre_crop() -> None:
    array = torch.arange(7 * 6).view(1, 7, 6)
    assert torch.equal(centre_crop(array, (3, 2)), array[:, 2:5, 2:4])
    assert torch.equal(centre_crop(array, (4, 3)), array[:, 1:5, 2:5])
    assert torch.equal(centre_crop(array, (7, 6)), array)


def test_identity_is_a_crop() -> None:
    image, labels = noise(2, 11, 12, 9), blobs(11, 12, 9, labels=4)
    moved, classes = warp(image, labels, matrix(0, 0, 0), (5, 6, 7))
    torch.testing.assert_close(moved, centre_crop(image, (5, 6, 7)), rtol=0, atol=1e-6)
    assert torch.equal(classes, centre_crop(labels, (5, 6, 7)))


@pytest.mark.parametrize(
    ("degrees", "plane"), [((90, 0, 0), (2, 3)), ((0, 90, 0), (3, 1)), ((0, 0, 90), (1, 2)), ((90,), (1, 2))]
)
@pytest.mark.parametrize("size", [7, 8])
def test_quarter_turns(degrees: tuple[float, ...], plane: tuple[int, int], size: int) -> None:
    shape = (size,) * (3 if len(degrees) == 3 else 2)
    image, labels = noise(2, *shape), blobs(*shape, labels=5)
    moved, classes = warp(image, labels, matrix(*degrees), shape)
    torch.testing.assert_close(moved, torch.rot90(image, -1, plane), rtol=0, atol=1e-4)
    assert torch.equal(classes, torch.rot90(labels, -1, plane))


def test_scale_two_takes_every_second_voxel() -> None:
    image, labels = noise(1, 13, 13), blobs(13, 13, labels=3)
    moved, classes = warp(image, labels, matrix(0, scale=2), (7, 7))
    torch.testing.assert_close(moved, image[:, ::2, ::2], rtol=0, atol=1e-6)
    assert torch.equal(classes, labels[:, ::2, ::2])


def test_a_ramp_stays_a_ramp() -> None:
    slope = torch.tensor([0.5, -2.0, 1.5])
    offsets = torch.stack(torch.meshgrid(*(torch.arange(21.0) - 10 for _ in range(3)), indexing="ij"))
    a = matrix(20, -10, 30, scale=1.2)
    moved, _ = warp((slope[:, None, None, None] * offsets).sum(0)[None], torch.zeros(1, 21, 21, 21).int(), a, (7, 7, 7))
    expected = torch.einsum("r,rc,cxyz->xyz", slope, torch.from_numpy(a).float(), offsets[:, 7:14, 7:14, 7:14])
    torch.testing.assert_close(moved[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "patch", "degrees"), [((14, 17, 12), (11, 12, 13), (25, -14, 8)), ((19, 22), (16, 20), (130,))]
)
@pytest.mark.parametrize("scale", [0.7, 1.4])
def test_against_grid_sample(
    source: tuple[int, ...], patch: tuple[int, ...], degrees: tuple[float, ...], scale: float
) -> None:
    """Image: linear, zero outside. Labels: the largest interpolated indicator wins, outside is one of them."""
    image, labels = noise(2, *source), blobs(*source, labels=6)
    a = matrix(*degrees, scale=scale)
    moved, classes = warp(image, labels, a, patch)
    torch.testing.assert_close(moved, by_grid_sample(image, a, patch), rtol=0, atol=1e-4)

    inside = [by_grid_sample((labels == label).float(), a, patch)[0] for label in range(6)]
    shares = torch.stack([1 - sum(inside, torch.zeros(patch)), *inside])
    best = shares.topk(2, dim=0)
    clear = best.values[0] - best.values[1] > 1e-3
    assert clear.float().mean() > 0.95
    assert torch.equal(classes[0][clear], best.indices[0][clear].to(torch.int16) + OUTSIDE)


@pytest.mark.parametrize(
    ("source", "patch", "degrees"), [((14, 17, 12), (11, 12, 13), (25, -14, 8)), ((19, 22), (16, 20), (130,))]
)
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])  # within the image; at its edge; mostly outside
@pytest.mark.parametrize("at_once", [1, 300])
def test_a_sample_in_parts_equals_one_at_once(
    source: tuple[int, ...],
    patch: tuple[int, ...],
    degrees: tuple[float, ...],
    scale: float,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image, labels = noise(2, *source), blobs(*source, labels=6)
    a = matrix(*degrees, scale=scale)
    whole = warp(image, labels, a, patch)
    monkeypatch.setattr(spatial, "_AT_ONCE", at_once)
    parts = warp(image, labels, a, patch)
    assert torch.equal(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


def test_ties_go_to_the_nearest_label() -> None:
    # scale 1.5 samples at -1.5, 0, 1.5: exactly between two voxels on both sides
    labels = torch.tensor([[[3, 1, 7, 2, 5]] * 5], dtype=torch.int16)
    _, classes = warp(torch.zeros(1, 5, 5), labels, matrix(0, scale=1.5), (1, 3))
    assert classes[0, 0, 0] in (3, 1)
    assert classes[0, 0, 1] == 7
    assert classes[0, 0, 2] in (2, 5)


def test_many_small_shares_can_beat_the_nearest() -> None:
    # sampled at (0.4, 0.4): the nearest voxel has 0.36, the other three 0.64 together
    labels = torch.tensor([[[2, 1], [1, 1]]], dtype=torch.int16)
    a = np.full((2, 2), 0.2)  # offset (-0.5, 0) -> (-0.1, -0.1) from the centre (0.5, 0.5)
    _, classes = warp(torch.zeros(1, 2, 2), labels, a, (2, 1))
    assert classes[0, 0, 0] == 1


def test_labels_stay_in_the_set_and_channels_are_independent() -> None:
    labels = torch.cat([blobs(15, 15, labels=4, seed=seed) * 2 for seed in range(3)])
    a = matrix(37, scale=1.3)
    _, together = warp(noise(1, 15, 15), labels, a, (14, 14))
    assert set(together.unique().tolist()) <= {OUTSIDE, 0, 2, 4, 6}
    assert (together == OUTSIDE).any()
    for one, classes in zip(labels, together, strict=True):
        assert torch.equal(warp(noise(1, 15, 15), one[None], a, (14, 14))[1][0], classes)


def test_everything_outside() -> None:
    moved, classes = warp(torch.ones(1, 2, 2), torch.ones(1, 2, 2).int(), matrix(0, scale=50), (2, 2))
    assert moved.eq(0).all()
    assert classes.eq(OUTSIDE).all()


def test_axes_are_treated_alike() -> None:
    image = noise(1, 9, 9, 9)
    a = matrix(10, 20, 30)
    moved, _ = warp(image, torch.zeros(1, 9, 9, 9).int(), a, (5, 6, 7))
    for order in permutations(range(3)):
        permuted, _ = warp(
            image.permute(0, *(1 + axis for axis in order)),
            torch.zeros(1, 9, 9, 9).int(),
            a[np.ix_(order, order)],
            tuple((5, 6, 7)[axis] for axis in order),
        )
        torch.testing.assert_close(permuted, moved.permute(0, *(1 + axis for axis in order)), rtol=0, atol=1e-5)
