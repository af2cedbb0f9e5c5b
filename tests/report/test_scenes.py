"""What the viewer is given of a case: the right voxels, in the right order, not too many."""

from __future__ import annotations

import base64
import gzip
import io

import numpy as np
import pytest
from PIL import Image

from segfit.report import scenes
from segfit.report.data import Overlay
from segfit.report.scenes import Scene
from segfit.report.viewer import case_facts
from segfit.report.views import View


def _case(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Grey values that rise along every axis, and two labels."""
    grey = sum(
        np.arange(n).reshape([-1 if i == axis else 1 for i in range(len(shape))]) for axis, n in enumerate(shape)
    )
    labels = np.zeros(shape, np.uint8)
    labels[tuple(slice(n // 2, n // 2 + 3) for n in shape)] = 1
    labels[tuple(slice(n // 2 + 3, n // 2 + 5) for n in shape)] = 2
    return np.asarray(grey, np.float32), labels


def _slices(scene: Scene) -> np.ndarray:
    sheet = np.asarray(Image.open(io.BytesIO(scene.sheet)))
    depth, rows, columns = (1, *scene.shape)[-3:]
    high, wide = -(-rows // 8) * 8, -(-columns // 8) * 8
    places = [divmod(number, scene.columns) for number in range(depth)]
    return np.stack([sheet[r * high : r * high + rows, c * wide : c * wide + columns] for r, c in places])


@pytest.mark.parametrize("flipped", [False, True])
def test_a_small_volume_is_whole_and_in_order(flipped: bool) -> None:
    grey, labels = _case((10, 20, 30))
    scene = Scene.of(grey, (0.0, 57.0), labels, flipped=flipped)
    turn = (slice(None, None, -1 if flipped else 1),) * 3
    assert scene.box == ((0, 10), (0, 20), (0, 30))
    assert scene.step == (1, 1, 1)
    assert np.array_equal(scene.reference, labels[turn])
    low, high = scene.window
    expected = grey[turn] / 57 * (high - low) + low
    assert np.abs(_slices(scene) - expected).max() < 6  # grey values of JPEG
    assert scene.share_outside(labels) == 0


def test_a_large_volume_is_cut_around_its_labels_and_thinned() -> None:
    grey, labels = _case((300, 40, 700))
    labels[:] = 0
    labels[100:140, 10:20, 200:500] = 3
    scene = Scene.of(grey, (0.0, 1000.0), labels)
    assert max(scene.shape) <= 96
    assert scene.box == ((72, 168), (0, 40), (140, 560))
    assert scene.step == (1, 1, 5)
    assert scene.reference.sum() == labels[:, :, 2::5].sum()
    prediction = labels.copy()
    prediction[:10] = 3
    assert scene.share_outside(prediction) == pytest.approx(10 * 40 * 700 / np.count_nonzero(prediction))


def test_blocks_are_averaged_to_the_last_voxel() -> None:
    values = np.random.default_rng(0).normal(size=(7, 8, 9)).astype(np.float32)
    found = scenes._averaged(values, (3, 1, 2))
    expected = [
        [[values[z : z + 3, y, x : x + 2].mean() for x in range(0, 9, 2)] for y in range(8)] for z in range(0, 7, 3)
    ]
    assert found == pytest.approx(np.array(expected), abs=1e-6)


def test_where_nothing_is_labelled_the_prediction_says_what_is_shown() -> None:
    grey, labels = _case((8, 300, 300))
    scene = Scene.of(grey, (0.0, 600.0), np.zeros_like(labels), labels)
    assert all(start <= 150 < stop for start, stop in scene.box[1:])
    assert scene.cut(labels).any()


def test_pictures_keep_colours_and_lines_of_one_pixel() -> None:
    pixels = np.zeros((600, 900, 3), np.uint8)
    pixels[..., 0] = 250
    labels = np.zeros((600, 900), np.uint8)
    labels[300] = 1
    scene = Scene.of(pixels, (0.0, 255.0), labels)
    assert (scene.shape, scene.step) == ((600, 900), (1, 1))
    assert _slices(scene)[0, ..., 0].min() > 240
    assert scene.reference[300].all()
    large = Scene.of(np.repeat(pixels, 3, axis=1), (0.0, 255.0), np.repeat(labels, 3, axis=1))
    assert max(large.shape) <= 1024


def test_labels_are_packed_reference_first() -> None:
    grey, labels = _case((10, 20, 30))
    prediction = np.where(labels == 2, 0, labels)
    view = View.of(grey[None], labels, (2.0, 1.0, 0.5), canonical=True, scene=True)
    facts = case_facts(Overlay.of("a", "test", "best", 1.0, view, prediction), {1: "#000000", 2: "#ffffff"}, {1: "x"})
    packed = np.frombuffer(gzip.decompress(base64.b64decode(facts["labels"])), np.uint8).reshape(2, 10, 20, 30)
    assert np.array_equal(packed[0], labels[::-1, ::-1, ::-1])
    assert np.array_equal(packed[1], prediction[::-1, ::-1, ::-1])
    assert (facts["shape"], facts["spacing"], facts["full"]) == ([10, 20, 30], [2.0, 1.0, 0.5], [10, 20, 30])
    assert (facts["first"], facts["last"], facts["flipped"], facts["volume"]) == ([0, 0, 0], [9, 19, 29], True, True)
    assert [one["name"] for one in facts["classes"]] == ["x", "label 2"]


def test_of_other_cases_a_small_slice_is_shown() -> None:
    grey, labels = _case((5, 700, 500))
    view = View.of(grey[None], labels, (3.0, 1.0, 1.0), scene=True)
    one = Overlay.of("a", "validation", "", None, view, labels)
    facts = case_facts(one, {1: "#000000", 2: "#ffffff"}, {})
    depth, rows, columns = facts["shape"]
    assert depth == 1
    assert max(rows, columns) <= 192
    assert facts["spacing"][1] * rows == pytest.approx(700)
    assert (facts["volume"], facts["part"], facts["dice"]) == (False, True, "–")
    whole = case_facts(Overlay.of("a", "validation", "", None, view, labels, whole=True), {1: "#000000"}, {})
    assert whole["volume"]
