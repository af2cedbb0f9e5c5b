"""What is no label map is told from what is one, however many classes that has."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from segfit.dataset.label_plausibility import label_doubt


def texture(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return what a camera makes of something: smooth, with noise."""
    random = np.random.default_rng(seed)
    smooth = gaussian_filter(random.normal(size=shape), 2)
    return (120 + smooth / smooth.std() * 40 + random.normal(size=shape) * 3).clip(0, 255).astype(np.uint8)


def discs(*values: int, size: int = 120) -> np.ndarray:
    """Return a disc of each value, side by side."""
    y, x = np.indices((size, size * len(values)))
    labels = np.zeros(y.shape, np.uint8)
    for number, value in enumerate(values):
        labels[(y - size / 2) ** 2 + (x - size * (number + 0.5)) ** 2 < (0.4 * size) ** 2] = value
    return labels


def saved_as_jpeg(array: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Pillow.fromarray(array).save(buffer, "JPEG", quality=quality)
    return np.array(Pillow.open(buffer))


def organs(count: int, shape: tuple[int, ...], seed: int, *, in_order: bool) -> np.ndarray:
    """Return a body filled with classes that touch each other, numbered from place to place or anyhow."""
    random = np.random.default_rng(seed)
    seeds = random.random((count, len(shape))) * shape
    if in_order:
        seeds = seeds[np.lexsort(seeds.T)]
    places = np.stack([axis.ravel() for axis in np.indices(shape)], 1)
    labels = cKDTree(seeds).query(places)[1].reshape(shape) + 1
    outside = np.linalg.norm(places / np.array(shape) - 0.5, axis=1).reshape(shape) > 0.5
    return np.where(outside, 0, labels)


@pytest.mark.parametrize("shape", [(60, 80), (20, 40, 50)])
def test_photographs_and_scans_are_no_label_maps(shape: tuple[int, ...]) -> None:
    assert "looks like a photograph, a scan or JPEG artefacts:" in label_doubt(texture(shape)[None])
    deep = texture(shape).astype(np.int16) * 7 - 1024
    assert "looks like a photograph, a scan or JPEG artefacts:" in label_doubt(deep[None])
    coarse = texture(shape) // 2 + np.random.default_rng(1).integers(0, 90, shape)
    assert "looks like a photograph, a scan or JPEG artefacts:" in label_doubt(coarse[None])
    assert label_doubt(np.where(texture(shape) > 120, 3, 1)[None]) == ""


@pytest.mark.parametrize(
    ("values", "quality"),
    [((255,), 50), ((255,), 75), ((255,), 90), ((255,), 95), ((100, 200), 50), ((100, 200), 90), ((60, 120, 180), 75)],
)
def test_labels_saved_as_jpeg_are_told(values: tuple[int, ...], quality: int) -> None:
    labels = discs(*values)
    assert label_doubt(labels[None]) == ""
    assert "JPEG" in label_doubt(saved_as_jpeg(labels, quality)[None])


@pytest.mark.parametrize("values", [(255,), (100, 200)])
@pytest.mark.parametrize("method", [Pillow.Resampling.BILINEAR, Pillow.Resampling.BICUBIC, Pillow.Resampling.BOX])
def test_smoothed_edges_are_told(values: tuple[int, ...], method: Pillow.Resampling) -> None:
    labels = discs(*values)
    smaller = Pillow.fromarray(labels).resize((labels.shape[1] // 3, labels.shape[0] // 3), method)
    assert "smoothed, resized" in label_doubt(np.array(smaller)[None])
    blurred = gaussian_filter(labels.astype(float), 1.5).astype(np.uint8)
    assert "smoothed, resized" in label_doubt(blurred[None])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(8, 200),
    st.sampled_from([(8, 8, 8), (12, 14, 16), (24, 24, 24), (40, 40), (90, 110)]),
    st.integers(0, 1000),
    st.booleans(),
)
def test_maps_of_many_structures_are_not_doubted(count: int, shape: tuple[int, ...], seed: int, in_order: bool) -> None:
    count = min(count, int(np.prod(shape)) // 20)  # a structure has some voxels
    assert label_doubt(organs(count, shape, seed, in_order=in_order)[None]) == ""


def test_rare_and_sparse_labels_are_not_doubted() -> None:
    random = np.random.default_rng(0)
    landmarks = np.zeros((50, 60), np.uint8)
    landmarks.flat[random.choice(landmarks.size, 40, replace=False)] = np.arange(1, 41)
    assert label_doubt(landmarks[None]) == ""
    assert label_doubt((discs(*[1] * 5) * 51)[None]) == ""
    assert label_doubt(discs(51, 102, 153, 204, 255)[None]) == ""
    marked = discs(*range(1, 15), 255, size=30)  # 255 for what is to be ignored
    assert label_doubt(marked[None]) == ""
    squares = np.kron(random.permutation(240).reshape(12, 20), np.ones((5, 5), int))
    assert label_doubt(squares[None]) == ""
    layers = (20 - np.linalg.norm(np.indices((64, 64)).T - 32, axis=-1).clip(0, 20)).astype(int)  # one voxel each
    assert label_doubt(layers[None]) == ""
