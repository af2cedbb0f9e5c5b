from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pasting import paste, restore_axes
from segfit.execution.scratch import Scratch
from segfit.geometry import Grid
from segfit.images.image import Image
from segfit.inference import to_input_grid as export_module
from segfit.inference.to_input_grid import (
    LogitField,
    LogitStream,
    merged,
    merged_labels,
    merged_probabilities,
)
from segfit.labels import LabelScheme
from segfit.preprocessing.pipeline import CaseProperties, preprocess
from segfit.resampling import resample_image
from segfit.specs import Configuration, ResamplingSpec

CPU = torch.device("cpu")
LABELS = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2})
REGIONS = LabelScheme.from_declaration({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
FLIPPED = np.array([[0, -0.9, 0, 4], [0, 0, 1.3, 1], [-2.5, 0, 0, 9], [0, 0, 0, 1.0]])  # x, y, z voxels to mm


def case(configuration: Configuration, *, affine: NDArray[np.float64] = FLIPPED) -> CaseProperties:
    """Preprocess an image with a zero margin, so that there is a crop."""
    array = np.zeros((1, 17, 22, 19), np.float32)
    array[:, 2:15, 1:20, 3:18] = 1 + np.random.default_rng(0).random((1, 13, 19, 15), dtype=np.float32)
    spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0)[::-1].tolist())
    image = Image(array, Grid((17, 22, 19), spacing, affine))
    return preprocess(image, None, configuration.preprocessing, LABELS).properties


def random_logits(properties: CaseProperties, channels: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(channels, *properties.shape)).astype(np.float32) * 3


def at_full_resolution(
    logits: NDArray[np.float32], properties: CaseProperties, configuration: Configuration
) -> NDArray[np.float32]:
    """The plain way: all channels at once, pasted and turned as a whole."""
    spec = configuration.preprocessing
    source = tuple(own if mm is None else mm for own, mm in zip(properties.spacing_mm, spec.spacing_mm, strict=True))
    return resample_image(logits, properties.shape_after_crop, source, properties.spacing_mm, spec.resample_logits)


CASES = {
    "isotropic": {"spacing": (1.3, 1.3, 1.3)},
    "down": {"spacing": (0.7, 0.8, 0.6)},
    "transposed": {"spacing": (2.0, 1.0, 1.5), "transpose": (1, 2, 0)},
    "canonical": {"spacing": (2.0, 1.0, 1.5), "orientation": "canonical", "transpose": (2, 0, 1)},
    "separate": {"spacing": (5.0, 1.0, 1.1)},
    "plane": {"name": "2d", "ndim": 2, "patch": (12, 12), "spacing": (None, 1.1, 0.8)},
    "same": {"spacing": (None, None, None), "orientation": "canonical"},
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("slab", [1, 700, 10**9])
def test_slabs_equal_the_plain_way(
    configuration: Callable[..., Configuration], monkeypatch: pytest.MonkeyPatch, kind: str, slab: int
) -> None:
    monkeypatch.setattr(export_module, "_SLAB_VOXELS", {"cpu": slab})
    chosen = configuration(**CASES[kind])
    properties = case(chosen)
    logits = random_logits(properties)
    full = at_full_resolution(logits, properties, chosen)
    expected = restore_axes(paste(LABELS.to_labels(full), properties), properties)
    blocks = (torch.from_numpy(logits[:, row : row + 3]) for row in range(0, properties.shape[0], 3))
    for given in (logits, torch.from_numpy(logits), LogitStream(logits.shape, blocks, CPU)):
        result = merged_labels([LogitField(given, properties, chosen)], LABELS)
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result, expected)
    exponentials = np.exp(full - full.max(0))
    softmax = paste(exponentials / exponentials.sum(0), properties)
    outside = paste(np.zeros(properties.shape_after_crop), properties, fill=1)
    softmax[0] += outside
    probabilities = merged_probabilities([LogitField(logits, properties, chosen)], LABELS)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, restore_axes(softmax, properties), atol=2e-6)


def test_regions(configuration: Callable[..., Configuration]) -> None:
    chosen = configuration(**CASES["canonical"], outputs=2)
    properties = case(chosen)
    logits = random_logits(properties, 2)
    full = at_full_resolution(logits, properties, chosen)
    expected = restore_axes(paste(REGIONS.to_labels(full), properties), properties)
    np.testing.assert_array_equal(merged_labels([LogitField(logits, properties, chosen)], REGIONS), expected)
    sigmoid = restore_axes(paste(1 / (1 + np.exp(-full)), properties), properties)
    np.testing.assert_allclose(
        merged_probabilities([LogitField(logits, properties, chosen)], REGIONS), sigmoid, atol=2e-6
    )


def test_labels_and_probabilities_of_streams_in_one_go(
    configuration: Callable[..., Configuration], tmp_path: Path
) -> None:
    """Of one configuration and of two, in memory and in files."""
    chosen = configuration(**CASES["canonical"])
    properties = case(chosen)
    logits = random_logits(properties)

    def streams(number: int) -> list[LogitField]:
        blocks = [torch.from_numpy(logits).split(3, 1) for _ in range(number)]
        return [LogitField(LogitStream(logits.shape, one, CPU), properties, chosen) for one in blocks]

    for number in (1, 2):
        fields = [LogitField(logits, properties, chosen)] * number
        labels, probabilities = merged(streams(number), LABELS, probabilities=True, scratch=Scratch(0, tmp_path))
        np.testing.assert_array_equal(labels, merged_labels(fields, LABELS))
        np.testing.assert_array_equal(probabilities, merged_probabilities(fields, LABELS))
        labels, _ = merged(streams(number), LABELS)
        np.testing.assert_array_equal(labels, merged_labels(fields, LABELS))


def test_cubic_scores_keep_their_range(configuration: Callable[..., Configuration]) -> None:
    chosen = configuration(spacing=(1.3, 1.3, 1.3))
    cubic = chosen.preprocessing.model_copy(update={"resample_logits": ResamplingSpec(order=3)})
    chosen = chosen.model_copy(update={"preprocessing": cubic})
    properties = case(chosen)
    logits = random_logits(properties)
    full = at_full_resolution(logits, properties, chosen)
    expected = restore_axes(paste(LABELS.to_labels(full), properties), properties)
    np.testing.assert_array_equal(merged_labels([LogitField(logits, properties, chosen)], LABELS), expected)


def test_many_labels_are_written_as_uint16(configuration: Callable[..., Configuration]) -> None:
    scheme = LabelScheme.from_declaration({"background": 0, **{f"s{i}": i for i in range(1, 300)}})
    chosen = configuration(spacing=(None, None, None))
    properties = case(chosen)
    logits = np.zeros((300, *properties.shape), np.float32)
    logits[299] = 1
    labels = merged_labels([LogitField(logits, properties, chosen)], scheme)
    assert labels.dtype == np.uint16
    assert set(np.unique(labels)) == {0, 299}


def test_lowest_label_wins_ties(configuration: Callable[..., Configuration]) -> None:
    chosen = configuration(spacing=(None, None, None))
    properties = case(chosen)
    logits = np.zeros((3, *properties.shape), np.float32)
    logits[1:] = 1
    assert set(np.unique(merged_labels([LogitField(logits, properties, chosen)], LABELS))) == {0, 1}


def test_configurations_are_merged_as_probabilities(
    configuration: Callable[..., Configuration], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "_SLAB_VOXELS", {"cpu": 900})
    fields, single = [], []
    for kind in ("transposed", "canonical", "plane"):
        chosen = configuration(**CASES[kind])
        properties = case(chosen)
        logits = random_logits(properties)
        fields.append(LogitField(logits, properties, chosen))
        single.append(merged_probabilities([LogitField(logits, properties, chosen)], LABELS))
    mean = np.mean(single, axis=0)
    merged = merged_probabilities(fields, LABELS)
    np.testing.assert_allclose(merged, mean, atol=1e-6)
    np.testing.assert_array_equal(merged_labels(fields, LABELS), merged.argmax(0))
