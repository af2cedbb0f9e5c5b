"""Fingerprints and preprocessed cases against the reference's, from the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segfit.dataset.manifest import Case, Dataset
from segfit.execution.execution import Execution
from segfit.fingerprint.measure import measure
from segfit.images.formats import read_case, read_label
from segfit.labels import LabelScheme
from segfit.nnunet.plans_reader import read_configurations
from segfit.preprocessing.locations import ANNOTATED
from segfit.preprocessing.pipeline import Preprocessed, preprocess

pytestmark = pytest.mark.golden("preprocessing")


def _dataset(folder: Path) -> Dataset:
    declaration = json.loads((folder / "raw" / "dataset.json").read_text())
    ending = declaration["file_ending"]
    cases = []
    for label in sorted((folder / "raw" / "labelsTr").glob(f"*{ending}")):
        name = label.name.removesuffix(ending)
        images = tuple(sorted((folder / "raw" / "imagesTr").glob(f"{name}_????{ending}")))
        cases.append(Case(id=name, images=images, label=label))
    return Dataset(
        name=folder.name,
        root=folder / "raw",
        layout="nnunet-v2",
        channel_names=tuple(declaration["channel_names"].values()),
        labels=LabelScheme.from_declaration(declaration["labels"], declaration.get("regions_class_order")),
        file_ending=ending,
        num_training=declaration["numTraining"],
        training=tuple(cases),
    )


@pytest.mark.golden_each("preprocessing/Dataset*/")
def test_fingerprint(path: Path) -> None:
    expected = json.loads((path / "dataset_fingerprint.json").read_text())
    dataset = _dataset(path)
    result = measure(dataset, "stored", execution=Execution(workers=2))
    for case, shape, spacing in zip(result.cases, expected["shapes_after_crop"], expected["spacings"], strict=True):
        assert case.shape_after_crop == tuple(shape[-result.ndim :])
        np.testing.assert_allclose(case.spacing_mm, spacing[-result.ndim :], rtol=1e-12)
    assert result.median_relative_size_after_crop == expected["median_relative_size_after_cropping"]
    properties = expected["foreground_intensity_properties_per_channel"]
    assert len(result.intensities) == len(properties)
    for channel, statistics in enumerate(result.intensities):
        for key in properties[str(channel)]:
            _assert_statistic(dataset, channel, key, getattr(statistics, key), properties[str(channel)])


def _assert_statistic(dataset: Dataset, channel: int, key: str, found: float, properties: dict[str, float]) -> None:
    """Equal within the noise of the reference's 10^8 draws and the rounding of float32.

    That noise is a share of the deviation, as a mean may be close to 0. A percentile may be another intensity, if
    hardly any lie between the two.
    """
    expected, rounding = properties[key], 1e-6 * max(abs(properties["min"]), abs(properties["max"]))
    if key in ("median", "percentile_00_5", "percentile_99_5"):
        near = found == pytest.approx(expected, rel=1e-3, abs=rounding)
        assert near or _share_between(dataset, channel, *sorted((found, expected))) < 1e-4, (channel, key)
    else:
        noise = max(1e-3 * properties["std"], rounding)
        assert found == pytest.approx(expected, rel=1e-3, abs=noise), (channel, key)


def _share_between(dataset: Dataset, channel: int, low: float, high: float) -> float:
    """Return the share of foreground intensities between two values, the mean over cases."""
    shares = []
    for case in dataset.training:
        assert case.label is not None
        values = read_case(case.images).array[channel][read_label(case.label).array[0] > 0]
        inside = (values > low + 1e-4 * abs(low)) & (values < high - 1e-4 * abs(high))
        shares += [inside.mean()] if values.size else []
    return float(np.mean(shares))


def _preprocess(folder: Path, configuration: str, name: str) -> tuple[Preprocessed, LabelScheme]:
    dataset = _dataset(folder)
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    declaration = json.loads((folder / "raw" / "dataset.json").read_text())
    spec = read_configurations(plans, declaration, [configuration])[configuration].preprocessing
    case = dataset.case(name.removesuffix("_as_test_case"))
    image = read_case(case.images)
    assert case.label is not None
    label = None if name.endswith("_as_test_case") else read_label(case.label)
    return preprocess(image, label, spec, dataset.labels, case.id), dataset.labels


@pytest.mark.golden_each("preprocessing/*/preprocessed/*/*.npz")
def test_preprocessed_case(path: Path) -> None:
    properties = json.loads(path.with_suffix(".json").read_text())
    with np.load(path) as stored:
        arrays = dict(stored)
    result, labels = _preprocess(path.parents[2], path.parent.name, path.stem)
    data = arrays["data"] if result.image.ndim == 4 else arrays["data"][:, 0]
    seg = arrays["seg"][0] if result.image.ndim == 4 else arrays["seg"][0, 0]
    _assert_geometry(result, properties)
    rounding = np.spacing(np.abs(data).max())  # of float32, where a channel is not normalised
    np.testing.assert_allclose(result.image, data, rtol=0, atol=max(1e-4, rounding))
    if result.labels is None:
        assert set(np.unique(seg)) <= {-1, 0}
        assert not result.locations
        return
    np.testing.assert_array_equal(result.labels, seg)
    keys = [target.name for target in labels.classes] + ([ANNOTATED] if labels.ignore_value is not None else [])
    assert list(result.locations) == keys
    for key, entry in zip(keys, properties["class_locations"], strict=True):
        found = result.locations[key]
        assert found.dtype == np.int32
        assert len(found) == entry["count"]
        if entry["count"]:
            expected = arrays[entry["array"]][:, 1:] if found.shape[1] == 3 else arrays[entry["array"]][:, 2:]
            np.testing.assert_array_equal(found[: len(expected)], expected)


def _assert_geometry(result: Preprocessed, expected: dict[str, Any]) -> None:
    properties, ndim = result.properties, result.image.ndim - 1
    assert properties.shape_before_crop == tuple(expected["shape_before_cropping"][-ndim:])
    assert properties.crop_box == tuple(map(tuple, expected["bbox_used_for_cropping"][-ndim:]))
    assert properties.shape_after_crop == tuple(expected["shape_after_cropping_and_before_resampling"][-ndim:])
    assert properties.shape == tuple(expected["shape_after_resampling"][-ndim:]) == result.image.shape[1:]
    np.testing.assert_allclose(properties.stored_spacing_mm, expected["spacing"][-ndim:], rtol=1e-12)
