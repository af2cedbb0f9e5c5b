from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segfit.errors import InputError
from segfit.execution.scratch import Scratch
from segfit.fingerprint.appearance import measure_image, measured, oriented_crop
from segfit.geometry import Grid
from segfit.images.image import Image, Regions
from segfit.labels import LabelScheme
from segfit.preprocessing.by_region import CaseByRegion, survey, why_whole
from segfit.preprocessing.pipeline import network_axes, preprocess
from segfit.specs import IntensityStatistics, Normalization, PreprocessingSpec, ResamplingSpec

LABELS = LabelScheme.from_declaration({"background": 0, "a": 1})
TURNED = np.array([[0, -0.9, 0, 4], [0, 0, 1.3, 1], [-2.5, 0, 0, 9], [0, 0, 0, 1.0]])
CT = IntensityStatistics(
    mean=90.0, median=90.0, std=60.0, min=0.0, max=250.0, percentile_00_5=20.0, percentile_99_5=220.0
)
SPECS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "finer": {"spacing_mm": (1.9, 0.8, 0.7)},
    "coarser": {"spacing_mm": (3.1, 1.7, 2.2)},
    "one axis": {"spacing_mm": (None, None, 0.7)},
    "slices": {"spacing_mm": (2.0, 0.3, 0.4), "separate": True},
    "slices between": {"spacing_mm": (1.1, 0.3, 0.4), "separate": True},
    "turned": {"orientation": "canonical", "transpose": (1, 0, 2), "spacing_mm": (1.5, 1.1, 1.2)},
    "raw": {"schemes": ("none", "none"), "spacing_mm": (2.0, 0.8, 1.1)},
    "fixed": {"schemes": ("ct", "rescale_to_0_1"), "spacing_mm": (2.0, 0.8, 1.1)},
    "colours": {"schemes": ("rgb_to_0_1", "rgb_to_0_1"), "spacing_mm": (2.0, 0.8, 1.1)},
    "linear": {"order": 1, "spacing_mm": (2.0, 0.8, 1.1)},
    "nearest": {"order": 0, "spacing_mm": (2.0, 0.8, 1.1)},
    "kept": {"method": "none"},
}


def image(dtype: str = "uint8", border: bool = True) -> Image:
    array = np.random.default_rng(0).integers(1, 250, (2, 17, 22, 19)).astype(dtype)
    if border:
        inside = array[:, 2:15, 1:20, 3:18].copy()
        array[:] = 0
        array[:, 2:15, 1:20, 3:18] = inside
    return Image(array, Grid((17, 22, 19), (2.5, 0.9, 1.3), TURNED))


def spec_of(
    spacing_mm: tuple[float | None, ...] = (None, None, None),
    orientation: Any = "stored",
    transpose: tuple[int, ...] = (0, 1, 2),
    schemes: tuple[Any, ...] = ("zscore", "zscore"),
    separate: bool | None = None,
    **resampling: Any,
) -> PreprocessingSpec:
    return PreprocessingSpec(
        orientation=orientation,
        transpose=transpose,
        spacing_mm=spacing_mm,
        normalization=tuple(
            Normalization(scheme=scheme, statistics=CT if scheme == "ct" else None) for scheme in schemes
        ),
        resample_image=ResamplingSpec(**{"order": 3, "force_separate": separate, **resampling}),
    )


def regions(whole: Image, chunk: tuple[int, ...] = (5, 8, 7)) -> Regions:
    return Regions(whole.grid, len(whole.array), chunk, lambda box: whole.array[(slice(None), *box)])


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("border", [True, False])
def test_rows_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, border: bool) -> None:
    monkeypatch.setattr("segfit.preprocessing.by_region._PART", 300)
    spec, whole = spec_of(**SPECS[kind]), image(border=border)
    axes = network_axes(whole.grid, spec)
    assert why_whole(spec, axes.permute(whole.grid.spacing_mm)) == ""
    expected = preprocess(Image(whole.array.astype(np.float32), whole.grid), None, spec, LABELS)
    case = CaseByRegion(regions(whole), survey(regions(whole), axes, "it"), spec, Scratch(0, tmp_path))
    assert case.properties == expected.properties
    assert case.shape == expected.image.shape
    for first in range(0, case.shape[1], 4):
        np.testing.assert_allclose(case[:, first : first + 4], expected.image[:, first : first + 4], atol=3e-5)


def test_what_is_measured_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segfit.preprocessing.by_region._PART", 300)
    monkeypatch.setattr("segfit.fingerprint.appearance._SAMPLED", {3: 6})
    whole = image()
    axes, _, cropped = oriented_crop(whole, "canonical")
    found = survey(regions(whole), axes, "it")
    shape = tuple(high - low for low, high in found.box)
    assert measured(whole.grid, axes, shape, found.extremes, found.sampled) == measure_image(whole, axes, cropped)


def test_an_empty_image_is_taken_whole() -> None:
    empty = Image(np.zeros((2, 17, 22, 19), np.uint8), Grid((17, 22, 19), (1.0, 1.0, 1.0)))
    found = survey(regions(empty), network_axes(empty.grid, spec_of()), "it")
    assert found.box == ((0, 17), (0, 22), (0, 19))


def test_values_that_are_not_finite_are_refused() -> None:
    whole = image("float32")
    whole.array[1, 3, 3, 5] = np.nan
    with pytest.raises(InputError):
        survey(regions(whole), network_axes(whole.grid, spec_of()), "it")


def test_what_needs_the_whole_is_told() -> None:
    spacing = (2.5, 0.9, 1.3)
    masked = spec_of().model_copy(update={"normalization": (Normalization(scheme="zscore", use_mask=True),) * 2})
    assert why_whole(masked, spacing)
    assert why_whole(spec_of((1.0, 1.0, 1.0), method="torch"), spacing)
    assert not why_whole(spec_of(method="torch"), spacing)
    assert why_whole(spec_of((1.0, 1.0, 1.0), separate=True), (0.9, 2.5, 1.3))
