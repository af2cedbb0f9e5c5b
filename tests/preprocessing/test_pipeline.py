from __future__ import annotations

from itertools import permutations, product
from typing import Any

import numpy as np
import pytest

from pasting import paste, restore_axes
from segfit.errors import InputError
from segfit.geometry import Grid
from segfit.images.image import Image
from segfit.labels import LabelScheme
from segfit.preprocessing.pipeline import CaseProperties, preprocess
from segfit.specs import Normalization, PreprocessingSpec, ResamplingSpec

_SCHEME = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2})


def _spec(**changes: object) -> PreprocessingSpec:
    values: dict[str, object] = {
        "orientation": "stored",
        "transpose": (0, 1, 2),
        "spacing_mm": (None, None, None),
        "normalization": (Normalization(scheme="none"),),
    }
    return PreprocessingSpec.model_validate(values | changes)


def _image(array: np.ndarray, affine: np.ndarray | None = None, spacing: tuple[float, ...] | None = None) -> Image:
    shape = array.shape[1:]
    return Image(array, Grid(shape, spacing or (1.0,) * len(shape), affine))


def _blob(shape: tuple[int, ...] = (6, 7, 8)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    image = np.zeros((1, *shape), np.float32)
    image[:, 1:5, 2:6, 1:7] = rng.uniform(1, 9, (1, 4, 4, 6))
    labels = np.zeros((1, *shape), np.int16)
    labels[:, 2:4, 3:5, 2:5] = rng.integers(0, 3, (1, 2, 2, 3))
    return image, labels


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_every_orientation_and_transposition_can_be_undone(order: tuple[int, ...]) -> None:
    image, labels = _blob()
    for signs, transpose in product(product((1, -1), repeat=3), permutations(range(3))):
        affine = np.eye(4)
        affine[:3, :3] = np.diag(signs)[:, list(order)]
        spec = _spec(orientation="canonical", transpose=transpose)
        result = preprocess(_image(image, affine), _image(labels, affine), spec, _SCHEME)
        assert result.labels is not None
        properties = CaseProperties.model_validate_json(result.properties.model_dump_json())
        assert properties == result.properties
        back = restore_axes(paste(result.labels, properties, fill=0), properties)
        np.testing.assert_array_equal(back.clip(0), labels[0])
        whole = restore_axes(paste(result.image, properties), properties)
        np.testing.assert_array_equal(whole, image)


def test_canonical_arrays_do_not_depend_on_the_stored_axes() -> None:
    image, labels = _blob()
    spec = _spec(orientation="canonical")
    straight = preprocess(_image(image, np.eye(4)), _image(labels, np.eye(4)), spec, _SCHEME)
    affine = np.diag([-1.0, 1, 1, 1])
    affine[0, 3] = 7
    mirrored = preprocess(_image(image[..., ::-1], affine), _image(labels[..., ::-1], affine), spec, _SCHEME)
    np.testing.assert_array_equal(mirrored.image, straight.image)
    assert mirrored.properties.axis_flip == (False, False, True)


def test_crop_marks_the_outside_and_keeps_labels_that_are_there() -> None:
    image = np.zeros((1, 5, 6, 7), np.float32)
    image[0, 1:4, 1:5, 2:6] = 5
    image[0, 1, 1, 2] = 0  # a corner of the box outside the mask
    image[0, 1, 4, 5] = 0
    image[0, 2, 2, 3] = 0  # a hole
    labels = np.zeros((1, 5, 6, 7), np.int16)
    labels[0, 1, 4, 5] = 2
    labels[0, 0, 0, 0] = 1  # outside the box: lost
    before = image.copy(), labels.copy()
    result = preprocess(_image(image), _image(labels), _spec(), _SCHEME, "case")
    assert result.properties.crop_box == ((1, 4), (1, 5), (2, 6))
    assert result.labels is not None
    assert result.labels[0, 0, 0] == -1
    assert result.labels[0, 3, 3] == 2
    assert result.labels[1, 1, 1] == 0
    assert sorted(np.unique(result.labels)) == [-1, 0, 2]
    assert {name: len(found) for name, found in result.locations.items()} == {"a": 0, "b": 1}
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(labels, before[1])


@pytest.mark.parametrize("scheme", ["zscore", "masked", "ct", "rescale_to_0_1", "rgb_to_0_1", "none"])
@pytest.mark.parametrize("cropped", [True, False])
def test_overwriting_the_inputs_changes_nothing_else(scheme: str, cropped: bool) -> None:
    statistics = {"mean": 5, "median": 5, "std": 2, "min": 0, "max": 9, "percentile_00_5": 2, "percentile_99_5": 7}
    how: dict[str, Any] = {"scheme": "zscore" if scheme == "masked" else scheme, "use_mask": scheme == "masked"}
    if scheme == "ct":
        how["statistics"] = statistics
    spec = _spec(normalization=(how,), spacing_mm=(0.8, 1.3, 0.9))
    image, labels = _blob()
    if not cropped:
        image[:, ::5, ::6, ::7] = 3
    expected = preprocess(_image(image.copy()), _image(labels.copy()), spec, _SCHEME)
    result = preprocess(_image(image.copy()), _image(labels.copy()), spec, _SCHEME, overwrite=True)
    np.testing.assert_array_equal(result.image, expected.image)
    np.testing.assert_array_equal(result.labels, expected.labels)


def test_without_label_the_mask_alone_steers_normalisation() -> None:
    image, _ = _blob()
    spec = _spec(normalization=(Normalization(scheme="zscore", use_mask=True),))
    result = preprocess(_image(image), None, spec, _SCHEME)
    assert result.labels is None
    assert result.locations == {}
    assert abs(result.image.mean()) < 1e-5
    assert result.image.std() == pytest.approx(1, abs=1e-5)


def test_all_zero_image_is_kept_whole() -> None:
    result = preprocess(_image(np.zeros((1, 4, 5, 6), np.float32)), None, _spec(), _SCHEME)
    assert result.image.shape == (1, 4, 5, 6)
    assert not result.image.any()


def test_target_spacing_and_its_none() -> None:
    image, labels = np.ones((1, 6, 8, 10), np.float32), np.ones((1, 6, 8, 10), np.int16)
    spec = _spec(spacing_mm=(None, 1.0, 4.0), transpose=(2, 0, 1))
    spacing = (2.0, 1.0, 3.0)
    result = preprocess(_image(image, spacing=spacing), _image(labels, spacing=spacing), spec, _SCHEME)
    assert result.properties.spacing_mm == (3.0, 2.0, 1.0)
    assert result.image.shape == (1, 10, 12, 2)
    assert result.labels is not None
    assert result.labels.shape == result.properties.shape == (10, 12, 2)
    np.testing.assert_array_equal(result.image, 1)
    np.testing.assert_array_equal(result.labels, 1)
    tiny = preprocess(_image(image[:, :1]), None, _spec(spacing_mm=(50.0, None, None)), _SCHEME)
    assert tiny.image.shape == (1, 1, 8, 10)


def test_2d() -> None:
    image = np.arange(1, 43, dtype=np.float32).reshape(1, 6, 7)
    spec = _spec(transpose=(1, 0), spacing_mm=(1.0, 1.0), resample_image=ResamplingSpec(order=3))
    result = preprocess(_image(image), _image((image > 20).astype(np.int16)), spec, _SCHEME)
    np.testing.assert_array_equal(restore_axes(paste(result.image, result.properties), result.properties), image)
    assert result.locations["a"].shape == (22, 2)


def test_mistakes_are_named() -> None:
    image, labels = _blob()
    with pytest.raises(InputError, match="c1 has 2 channel"):
        preprocess(_image(np.concatenate([image, image])), None, _spec(), _SCHEME, "c1")
    with pytest.raises(InputError, match="c1 has 2 spatial axes, the training images 3"):
        preprocess(_image(image[:, 2]), None, _spec(), _SCHEME, "c1")
    with pytest.raises(InputError, match=r"label of c1 has shape \(5, 7, 8\)"):
        preprocess(_image(image), _image(labels[:, 1:]), _spec(), _SCHEME, "c1")
    image[0, 2, 3, 3] = np.nan
    with pytest.raises(InputError, match="c1 contains NaN"):
        preprocess(_image(image), None, _spec(), _SCHEME, "c1")
    image[0, 2, 3, 3] = 300
    with pytest.raises(InputError, match="c1: channel 0 is normalised as a picture"):
        preprocess(_image(image), None, _spec(normalization=(Normalization(scheme="rgb_to_0_1"),)), _SCHEME, "c1")
