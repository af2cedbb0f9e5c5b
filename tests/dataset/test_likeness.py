"""Copies are found however they were made, and nothing else is called one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from segfit.dataset.likeness import copies, likeness

_Array = NDArray[np.float32]
_SHAPES = {2: (160, 120), 3: (36, 50, 40)}


@cache
def _image(seed: int, ndim: int, shared: float = 0.0) -> _Array:
    """Return blobs and fine texture in a round field of view; images of one size may share a part of the blobs."""
    shape = _SHAPES[ndim]
    own, common = np.random.default_rng(seed), np.random.default_rng(99)
    blobs = (
        gaussian_filter(own.normal(size=shape), 5) * (1 - shared)
        + gaussian_filter(common.normal(size=shape), 5) * shared
    )
    fine = gaussian_filter(own.normal(size=shape), 2) * 0.3
    places = np.indices(shape) - np.array(shape).reshape(-1, *([1] * ndim)) / 2
    inside = np.sqrt((places**2).sum(axis=0)) < 0.48 * min(shape)
    found = (blobs / blobs.std() + fine / fine.std() * 0.5 + 8) * inside
    return np.asarray(found[None], dtype=np.float32)


def _cropped(array: _Array, before: int, after: int) -> _Array:
    return array[(slice(None), *(slice(before, length - after) for length in array.shape[1:]))]


_COPIES: dict[str, Callable[[_Array], _Array]] = {
    "as it is": lambda image: image,
    "turned": lambda image: np.moveaxis(image, 1, -1)[:, ::-1],
    "turned by 180 degrees": lambda image: image[:, ::-1, ::-1],
    "mirrored": lambda image: image[..., ::-1],
    "cropped at one side": lambda image: _cropped(image, 3, 0),
    "cropped at both sides": lambda image: _cropped(image, 2, 3),
    "scaled": lambda image: 3 * image + 70,
    "with another contrast": lambda image: (image / image.max()) ** 1.5,
    "with noise": lambda image: image + np.random.default_rng(5).normal(0, 0.1, image.shape).astype(np.float32),
    "all of it": lambda image: (_cropped(image, 1, 2) / image.max())[:, ::-1] ** 0.8,
}


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("change", _COPIES)
def test_copies_are_found(change: str, ndim: int) -> None:
    images = [_image(seed, ndim) for seed in range(12)]
    items = [likeness(image) for image in (*images, *(_COPIES[change](image) for image in images[:4]))]
    assert set(copies(items)) == {(number, 12 + number) for number in range(4)}


@pytest.mark.parametrize("ndim", [2, 3])
def test_images_that_share_much_are_no_copies(ndim: int) -> None:
    images = [_image(seed, ndim, shared=0.7) for seed in range(12)]
    first = [image.reshape(-1) for image in images]
    assert min(np.corrcoef(one, two)[0, 1] for one, two in pairwise(first)) > 0.9
    assert list(copies([likeness(image) for image in images])) == []


@pytest.mark.parametrize(
    "image", [np.zeros((1, 40, 40)), np.ones((3, 20, 20, 20)), np.ones((1, 8, 400)), np.full((1, 30, 30), np.nan)]
)
def test_images_without_details_have_no_likeness(image: _Array) -> None:
    assert likeness(image) is None


def test_colours_and_many_voxels_are_averaged() -> None:
    grey = np.kron(_image(1, 2), np.ones((1, 8, 8), np.float32))
    items = [likeness(np.concatenate([grey, grey * 2, grey * 0.5])), likeness(grey), None, likeness(_image(2, 2))]
    assert list(copies(items)) == [(0, 1)]
