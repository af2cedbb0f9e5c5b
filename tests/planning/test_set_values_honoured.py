"""What is set in the plan is what preprocessing, export and the network do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from planning_fakes import case, fingerprint, scheme

from segfit.dataset.layouts import open_dataset
from segfit.dataset.phantom import make_phantom
from segfit.geometry import Grid
from segfit.images.image import Image
from segfit.inference.to_input_grid import LogitField, merged_probabilities
from segfit.networks.blocks import ResidualBlock
from segfit.networks.unet import build_network
from segfit.options import Options
from segfit.planning.planner import derive
from segfit.preprocessing.pipeline import preprocess
from segfit.preprocessing.store import CaseStore
from segfit.resampling import resample_image, resample_labels
from segfit.specs import Configuration, ResamplingSpec

_LABELS = scheme("liver", "tumour")
_SPACING, _TARGET = (3.5, 1.0, 1.0), (3.0, 0.8, 1.2)
_SHAPE = (9, 24, 26)


def _configuration(*settings: str, name: str = "3d_fullres") -> Configuration:
    data = fingerprint([case((40, 60, 50), (1, 1, 1))] * 20)
    given = ["preset=stock", "planning.target_spacing_mm=3,0.8,1.2", "planning.normalization=none"]
    options = Options().with_settings([*given, *(f"planning.{setting}" for setting in settings)])
    return derive(data, _LABELS, options).configurations[name]


def _case() -> tuple[Image, Image]:
    rng = np.random.default_rng(0)
    grid = Grid(_SHAPE, _SPACING, None)
    voxels = rng.uniform(1, 9, (1, *_SHAPE)).astype(np.float32)
    return Image(voxels, grid), Image(rng.integers(0, 3, (1, *_SHAPE)).astype(np.int16), grid)


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize(("force", "separate"), [("true", True), ("false", False), ("auto", None)])
def test_images_and_labels_are_resampled_as_set(order: int, force: str, separate: bool | None) -> None:
    spec = _configuration(
        f"resample_image.order={order}",
        f"resample_label.order={min(order, 1)}",
        *(f"resample_{kind}.force_separate={force}" for kind in ("image", "label")),
        "resample_image.separate_threshold=3.2",
        "resample_label.separate_threshold=3.2",
    ).preprocessing
    image, label = _case()
    done = preprocess(image, label, spec, _LABELS)
    assert done.labels is not None
    shape = done.image.shape[1:]
    assert shape == (10, 30, 22)
    how = {"force_separate": separate, "separate_threshold": 3.2}
    expected = resample_image(image.array, shape, _SPACING, _TARGET, ResamplingSpec(order=order, **how))
    np.testing.assert_array_equal(done.image, expected)
    np.testing.assert_array_equal(
        done.labels,
        resample_labels(label.array[0], shape, _SPACING, _TARGET, ResamplingSpec(order=min(order, 1), **how)),
    )


def test_orders_and_separation_make_a_difference() -> None:
    image, _ = _case()
    settings = [
        ("resample_image.order=0",),
        ("resample_image.order=1",),
        ("resample_image.order=3",),
        ("resample_image.order=3", "resample_image.force_separate=false"),
        ("resample_image.order_separate_axis=1",),
        ("resample_image.separate_threshold=5",),
        ("resample_image.method=torch",),
    ]
    results = [preprocess(image, None, _configuration(*one).preprocessing, _LABELS).image for one in settings]
    same = {(i, j) for i, a in enumerate(results) for j, b in enumerate(results[:i]) if np.array_equal(a, b)}
    assert same == {(5, 3)}  # a threshold that is not reached separates nothing


def test_without_resampling_every_case_keeps_its_grid() -> None:
    configuration = _configuration("resample_image.method=none")
    image, label = _case()
    done = preprocess(image, label, configuration.preprocessing, _LABELS)
    np.testing.assert_array_equal(done.image, image.array)
    np.testing.assert_array_equal(done.labels, label.array[0])
    logits = np.random.default_rng(1).normal(size=(3, *_SHAPE)).astype(np.float32)
    probabilities = merged_probabilities([LogitField(logits, done.properties, configuration)], _LABELS)
    np.testing.assert_allclose(probabilities, torch.from_numpy(logits).softmax(0), atol=1e-6)


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("force", [True, False])
def test_scores_are_resampled_as_set(order: int, force: bool) -> None:
    configuration = _configuration(
        f"resample_logits.order={order}", f"resample_logits.force_separate={str(force).lower()}"
    )
    image, _ = _case()
    properties = preprocess(image, None, configuration.preprocessing, _LABELS).properties
    logits = np.random.default_rng(1).normal(size=(3, *properties.shape)).astype(np.float32)
    expected = resample_image(logits, _SHAPE, _TARGET, _SPACING, ResamplingSpec(order=order, force_separate=force))
    field = LogitField(logits, properties, configuration)
    for channel in range(3):
        box = tuple((0, n) for n in _SHAPE)
        np.testing.assert_allclose(field.read(channel, box), expected[channel], atol=1e-5)
    probabilities = merged_probabilities([LogitField(logits, properties, configuration)], _LABELS)
    np.testing.assert_allclose(probabilities, torch.from_numpy(expected).softmax(0), atol=1e-5)


def test_the_stored_case_is_named_after_what_made_it(tmp_path: Path) -> None:
    dataset = open_dataset(make_phantom(tmp_path / "Dataset001_V", cases=1, test_cases=0, shape=(8, 16, 16)))
    store, first = CaseStore(tmp_path / "cases"), dataset.training[0]

    def key(*settings: str) -> str:
        return store.key(first, _configuration(*settings).preprocessing, dataset.labels)

    assert key() == key("resample_image.order=3") == key("resample_logits.order=0", "kind=residual")
    others = [
        "resample_image.order=1",
        "resample_image.force_separate=true",
        "resample_image.separate_threshold=4",
        "resample_label.order=0",
        "normalization=zscore",
    ]
    keys = [key(), *(key(one) for one in others)]
    assert len(set(keys)) == len(keys)


def test_the_network_is_of_the_kind_that_was_set() -> None:
    strides = "strides=[[1,1,1],[1,2,2],[2,2,2]]"
    small = ("3d_fullres." + strides, "3d_fullres.base_features=4")
    plain = build_network(_configuration(*small).network, deep_supervision=False)
    residual = build_network(_configuration(*small, "kind=residual").network, deep_supervision=False)
    assert [sum(isinstance(m, ResidualBlock) for m in net.encoder.modules()) for net in (plain, residual)] == [
        0,
        1 + 3 + 4,
    ]
    assert residual(torch.zeros(1, 1, 2, 8, 8)).shape == (1, 3, 2, 8, 8)
    plane = build_network(_configuration("2d.kind=residual", name="2d").network, deep_supervision=False)
    assert any(isinstance(module, ResidualBlock) for module in plane.modules())
