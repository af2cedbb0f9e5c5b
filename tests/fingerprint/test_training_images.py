"""Images like those of the training raise no alarm; those made in another way do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from segfit.dataset.layouts import open_dataset
from segfit.execution.execution import Execution
from segfit.fingerprint.appearance import measure_image, oriented_crop
from segfit.fingerprint.fingerprint import Fingerprint, ImageFingerprint
from segfit.fingerprint.measure import measure
from segfit.fingerprint.training_images import TrainingImages
from segfit.geometry import Grid
from segfit.images.image import Image

SPACING = (3.0, 1.0, 1.0)
TOLD = [("intensity_range", False)]


def ct(seed: int, shape: tuple[int, ...] = (24, 40, 36)) -> np.ndarray:
    """Air, a body that lies low, and an organ on one side of it, in HU."""
    rng = np.random.default_rng(seed)
    z, y, x = (
        np.linspace(-1, 1, n).reshape([-1 if a == axis else 1 for a in range(3)]) for axis, n in enumerate(shape)
    )
    dy, dx = rng.uniform(-0.05, 0.05, 2)
    body = ((y - 0.3 - dy) / 0.6) ** 2 + ((x - dx) / 0.8) ** 2 + 0 * z < 1
    organ = ((z - 0.5) / 0.4) ** 2 + ((y - 0.4 - dy) / 0.3) ** 2 + ((x - 0.4 - dx) / 0.3) ** 2 < 1
    return (np.where(body, 40, -1000) + 110 * organ + rng.normal(0, 15, shape)).astype(np.float32)[None]


def rgb(seed: int) -> np.ndarray:
    """Purple cells on a bright ground."""
    rng = np.random.default_rng(seed)
    cells = rng.random((48, 60)) < rng.uniform(0.1, 0.3)
    ground, cell = np.array([235, 205, 225]), np.array([130, 60, 150])
    colours = np.where(cells[None], cell[:, None, None], ground[:, None, None]) + rng.normal(0, 8, (3, 48, 60))
    return colours.clip(1, 255).astype(np.uint8)


def deep(seed: int) -> np.ndarray:
    """The same in 16 bits."""
    return rgb(seed).astype(np.uint16) * np.uint16(257)


def measured(array: np.ndarray, spacing: tuple[float, ...] | None = None) -> ImageFingerprint:
    grid = Grid(array.shape[1:], spacing or (SPACING if array.ndim == 4 else (1.0, 1.0)))
    image = Image(array, grid)
    axes, _, cropped = oriented_crop(image, "stored")
    return measure_image(image, axes, cropped)


@pytest.fixture(scope="module")
def volumes() -> TrainingImages:
    return TrainingImages.of([measured(ct(seed)) for seed in range(8)], "stored", ("CT",))


@pytest.fixture(scope="module")
def pictures() -> TrainingImages:
    return TrainingImages.of([measured(rgb(seed)) for seed in range(8)], "stored", ("R", "G", "B"))


def codes(
    known: TrainingImages, array: np.ndarray, spacing: tuple[float, ...] | None = None, *, absolute: bool = True
) -> list[tuple[str, bool]]:
    seen, unsigned = [absolute] * len(known.channel_names), array.dtype.kind == "u"
    bits = 8 * array.dtype.itemsize if unsigned else None
    return [(item.code, item.fatal) for item in known.differences(measured(array, spacing), absolute=seen, bits=bits)]


def one_value(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array[0, 3, 4, 5] = value
    return array


def test_an_image_of_the_same_kind_raises_no_alarm(volumes: TrainingImages, pictures: TrainingImages) -> None:
    for seed in range(100, 120):
        assert codes(volumes, ct(seed)) == []
        assert codes(volumes, ct(seed, (20, 44, 40)), (3.3, 0.9, 0.95)) == []
        assert codes(pictures, rgb(seed)) == []


@pytest.mark.parametrize(
    ("change", "spacing", "expected"),
    [
        (lambda image: image + 1024, None, [("intensity_range", False)]),
        (lambda image: (image + 1024) / 4095, None, [("intensity_range", False)]),
        (lambda image: -image, None, [("intensity_range", False)]),
        (lambda image: 50 * np.tanh(image / 20), None, [("intensity_range", False)]),
        (lambda image: one_value(image, 1e7), None, [("extreme_values", False)]),
        (lambda image: image[:, :, ::-1], None, [("axes", False)]),
        (lambda image: image.swapaxes(2, 3), None, [("axes", False)] * 2),
        (lambda image: image.swapaxes(1, 3), (1.0, 1.0, 3.0), [("axes", False)] * 2),
        (lambda image: image, (1.0, 1.0, 3.0), [("axes", False)]),
        (lambda image: image, (30.0, 10.0, 10.0), [("voxel_size", False), ("extent", False)]),
        (lambda image: image, (3000.0, 1000.0, 1000.0), [("voxel_size", True)]),
        (lambda image: image, (0.003, 0.001, 0.001), [("voxel_size", True)]),
        (lambda image: np.tile(image, (1, 5, 1, 1)), None, [("extent", False)]),
    ],
)
def test_a_volume_made_in_another_way_is_told(
    volumes: TrainingImages,
    change: Callable[[np.ndarray], np.ndarray],
    spacing: tuple[float, ...] | None,
    expected: list[tuple[str, bool]],
) -> None:
    assert codes(volumes, change(ct(50)), spacing) == expected


def test_channels_in_another_order_are_told_as_that_alone(pictures: TrainingImages) -> None:
    for order in ([2, 1, 0], [0, 2, 1], [1, 2, 0]):
        assert codes(pictures, rgb(60)[order]) == [("channel_order", False)]
    (found,) = pictures.differences(measured(rgb(60)[[1, 2, 0]]))
    assert found.problem.endswith("G, B and R")


def test_facts_are_what_is_compared(volumes: TrainingImages) -> None:
    facts = {(one.name, one.part): one for one in volumes.facts(measured(ct(3)))}
    assert [one for one in facts.values() if one.is_outside] == []
    assert facts["values", "CT"].value == facts["histogram", "CT"].value == 0.0  # it is one of them
    other = {(one.name, one.part): one for one in volumes.facts(measured(2 * ct(50) + 500, (6.0, 1.0, 1.0)))}
    own = volumes.facts(measured(ct(50)))
    assert {key for key, one in other.items() if one.is_outside and key[0] != "histogram"} == {
        ("voxel_size", "0"), ("extent", "0"), ("level", "CT"), ("width", "CT"), ("values", "CT"),
    }  # fmt: skip
    assert other["voxel_size", "0"].value == 6.0
    (width,) = (one for one in own if one.name == "width")
    assert other["width", "CT"].value == pytest.approx(2 * width.value, rel=1e-5)
    (histogram,) = (one for one in own if one.name == "histogram")
    assert other["histogram", "CT"].value == pytest.approx(histogram.value, abs=1e-4)  # scale and offset are no shape


def test_more_bits_per_value_are_told_as_other_values_not_as_another_order(pictures: TrainingImages) -> None:
    for absolute in (True, False):
        assert codes(pictures, deep(60), absolute=absolute) == [("bits", False)]
    assert codes(pictures, 257.0 * rgb(60)) == codes(pictures, rgb(60) / 255) == [("intensity_range", False)]


def test_eight_bits_are_told_where_all_have_more() -> None:
    known = TrainingImages.of([measured(deep(seed)) for seed in range(8)], "stored", ("R", "G", "B"))
    assert codes(known, rgb(60), absolute=False) == [("bits", False)]
    assert codes(known, deep(60), absolute=False) == []


def test_few_images_do_not_show_the_scale_of_values_that_networks_see_image_by_image() -> None:
    scales = [1 + seed % 3 / 5 for seed in range(20)]
    for number, same, expected in ((8, False, []), (8, True, TOLD), (20, False, TOLD)):
        images = [ct(seed) * (1 if same else scales[seed]) for seed in range(number)]
        known = TrainingImages.of([measured(image) for image in images], "stored", ("MRI",))
        for change in (lambda image: 100 * image, lambda image: image + 1024):
            assert codes(known, change(ct(50)), absolute=False) == expected
        for change in (lambda image: 1000 * image, lambda image: image + 1e5):
            assert codes(known, change(ct(50)), absolute=False) == TOLD
        assert codes(known, one_value(ct(50), 1e30), absolute=False) == [("extreme_values", False)]
        assert codes(known, ct(50)[:, :, ::-1], absolute=False) == [("axes", False)]
        assert codes(known, ct(50), (3000.0, 1000.0, 1000.0), absolute=False) == [("voxel_size", True)]


def test_a_histogram_of_another_shape_is_told(pictures: TrainingImages) -> None:
    even = np.random.default_rng(0).uniform(195, 240, (48, 60))  # no cells, no ground
    assert codes(pictures, np.stack([even, 1.38 * even - 120, 0.71 * even + 57])) == [("histogram", False)]


def test_few_training_images_allow_more() -> None:
    for number in (1, 2):
        known = TrainingImages.of([measured(ct(seed)) for seed in range(number)], "stored", ("CT",))
        assert codes(known, ct(9) + 300) == []
        assert codes(known, 100 * ct(9)) == [("intensity_range", False)]


def test_what_is_unlike_among_the_training_images_may_be_unlike() -> None:
    known = TrainingImages.of([measured(ct(seed) * (1 + seed) ** 2) for seed in range(12)], "stored", ("MRI",))
    assert codes(known, ct(50) * 30) == []


def test_the_summary_survives_its_file(volumes: TrainingImages) -> None:
    assert TrainingImages.model_validate_json(volumes.model_dump_json()) == volumes


def test_a_damaged_summary_is_refused_or_can_be_compared_with(
    volumes: TrainingImages, pictures: TrainingImages
) -> None:
    """Of every list, and of one inside each, an entry is left out or there twice; every number is 0 or negative."""
    for good, image in ((volumes, measured(ct(0))), (pictures, measured(rgb(0)))):
        content, refused = good.model_dump(mode="json"), 0
        places = [(name,) for name in content] + [(name, 0) for name in content if isinstance(content[name], list)]
        for *parents, last in (*places, ("quantiles", 3, 0)):
            for change in (lambda v: v[1:], lambda v: [*v, v[-1]], lambda _: [], lambda _: 0, lambda _: -1):
                damaged = copy.deepcopy(content)
                inner: Any = damaged
                for key in parents:
                    inner = inner[key]
                if not isinstance(inner[last], list | int | float):
                    continue
                try:
                    inner[last] = change(inner[last])
                    known = TrainingImages.model_validate(damaged)
                except (ValidationError, TypeError):  # a number has no entries
                    refused += 1
                else:
                    known.differences(image)
        assert refused > 60


def test_sizes_alone_can_be_compared() -> None:
    sizes: dict[str, Any] = {"shape": (24, 40, 36), "shape_after_crop": (24, 40, 36), "relative_size_after_crop": 1.0}
    known = TrainingImages.of([ImageFingerprint(spacing_mm=SPACING, **sizes)] * 5, "stored", ("CT",))
    assert codes(known, ct(0) + 5000) == []
    assert codes(known, ct(0), (30.0, 10.0, 10.0)) == [("voxel_size", False), ("extent", False)]


def test_each_side_is_told_in_its_own_unit() -> None:
    sizes: dict[str, Any] = {"shape": (40, 36), "shape_after_crop": (40, 36), "relative_size_after_crop": 1.0}
    sizeless = ImageFingerprint(spacing_mm=(1.0, 1.0), sized=False, **sizes)
    pictures = TrainingImages.of([sizeless] * 5, "stored", ("grey",))
    tiny = ImageFingerprint(spacing_mm=(1e-4, 1e-4), **sizes)
    assert [item.problem for item in pictures.differences(tiny)] == [
        "voxel size (0.0001, 0.0001) mm, of the training images (1, 1) px"
    ]
    large = sizeless.model_copy(update={"shape_after_crop": (400, 360)})
    assert [item.problem for item in pictures.differences(large)] == [
        "extent (400, 360) px, of the training images (40, 36) px"
    ]
    assert "sized" not in tiny.model_dump()  # as before there was the field: hashes of what was measured stay


@pytest.mark.real_data
@pytest.mark.parametrize(
    "name", ["Dataset120_Nuclei", "Dataset203_Retina", "Dataset204_MouseBrain", "Dataset004_Hippocampus"]
)
def test_cases_left_out_of_real_datasets_raise_hardly_any_alarm(data: Path, name: str) -> None:
    dataset = open_dataset(data / name)
    fingerprint: Fingerprint = measure(dataset, "canonical", execution=Execution(workers=1))
    cases = fingerprint.cases
    chosen = range(0, len(cases), max(1, len(cases) // 60))
    alarms = []
    for index in chosen:
        others = TrainingImages.of(cases[:index] + cases[index + 1 :], "canonical", fingerprint.channel_names)
        alarms += [index] * bool(others.differences(cases[index]))
    assert len(alarms) < 0.02 * len(chosen)
    for number in (5, 8, 10):
        assert _alarms_of_few(fingerprint, number) < 0.02


def _alarms_of_few(fingerprint: Fingerprint, number: int) -> float:
    """Return the share of cases that are unlike a few others, of random subsets."""
    rng, told = np.random.default_rng(number), []
    for _ in range(20):
        few, others = np.split(rng.permutation(len(fingerprint.cases)), [number])
        known = TrainingImages.of([fingerprint.cases[i] for i in few], "canonical", fingerprint.channel_names)
        told += [bool(known.differences(fingerprint.cases[i])) for i in others[:15]]
    return sum(told) / len(told)
