from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
import zarr
from PIL import Image as Picture

from segfit.bundle.bundle import Member
from segfit.cli.console import LineProgress
from segfit.connected_components import PostprocessingStep, keep_largest
from segfit.dataset.layouts import cases_from_files, find_cases
from segfit.dataset.manifest import Case
from segfit.errors import DatasetError, InputError, StageError, warning
from segfit.execution.execution import Execution
from segfit.fingerprint.appearance import measure_image, oriented_crop
from segfit.fingerprint.training_images import TrainingImages
from segfit.geometry import AxisMap, Grid
from segfit.images.formats import find_format, read_grid, read_label
from segfit.images.image import Image, LabelMap
from segfit.inference.model import Model, load_model
from segfit.inference.predict_folder import predict_folder
from segfit.inference.predictor import Predictor
from segfit.progress import SILENT, KeptWarnings, Progress
from segfit.specs import Configuration
from series_builder import affine_of, clutter, write_series

MULTISCALE = {
    "axes": [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"],
    "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [2250.0, 900.0, 1250.0]}]}],
}
AFFINE = np.array([[1.1, 0, 0, -5], [0, 0.9, 0, 3], [0, 0, 2.2, 7], [0, 0, 0, 1.0]])


def voxels(shape: tuple[int, ...] = (11, 17, 15), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, size=shape).astype(np.float32)


def write_case(folder: Path, case: str, array: np.ndarray, affine: np.ndarray = AFFINE) -> Case:
    folder.mkdir(exist_ok=True)
    path = folder / f"{case}_0000.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array.T, affine), path)
    return Case(id=case, images=(path,))


@pytest.fixture
def model(
    configuration: Callable[..., Configuration], member: Callable[..., Member], make_model: Callable[..., Model]
) -> Model:
    chosen = configuration(orientation="canonical", spacing=(2.0, 1.0, 1.0))
    return make_model(member(chosen, folds=2, mirror_axes=(2,)))


def test_all_48_orientations_give_the_same_labels(model: Model) -> None:
    image = Image(voxels()[None], Grid((11, 17, 15), (2.2, 0.9, 1.1), AFFINE))
    expected = model.predict(image).labels
    assert len(np.unique(expected)) == 3
    for order in itertools.permutations(range(3)):
        for flip in itertools.product((False, True), repeat=3):
            axes = AxisMap(order, flip)
            turned = model.predict(image.reoriented(axes))
            np.testing.assert_array_equal(turned.labels, axes.apply(expected))


def test_every_kind_of_source_gives_the_same(model: Model, tmp_path: Path) -> None:
    array = voxels()
    path = write_case(tmp_path, "a", array).images[0]
    first = model.predict(path)
    spacing = first.grid.spacing_mm
    for source in (
        str(path),
        [path],
        (array, first.grid.affine),
        (array[None].astype(np.float64), first.grid),
        Image(array[None], first.grid),
    ):
        np.testing.assert_array_equal(model.predict(source).labels, first.labels)
    loose = model.predict((array, spacing))
    np.testing.assert_array_equal(loose.labels, first.labels)
    assert [item.code for item in loose.warnings] == ["no_orientation"]
    assert first.warnings == ()


def test_save_gives_back_the_geometry(model: Model, tmp_path: Path) -> None:
    affine = AFFINE[:, [1, 0, 2, 3]] * [1, -1, 1, 1]
    case = write_case(tmp_path, "a", voxels(), affine)
    prediction = model.predict(case.images[0], probabilities=True)
    prediction.save(tmp_path / "out.nii.gz")
    saved = nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(saved.affine, nibabel.load(case.images[0]).affine)
    np.testing.assert_array_equal(np.asarray(saved.dataobj).T, prediction.labels)
    prediction.save_probabilities(tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as stored:
        np.testing.assert_array_equal(stored["probabilities"].argmax(0), prediction.labels)
    with pytest.raises(InputError, match="no probabilities"):
        model.predict(case.images[0]).save_probabilities(tmp_path / "none.npz")


def test_members_are_merged_and_postprocessed(
    configuration: Callable[..., Configuration], member: Callable[..., Member], make_model: Callable[..., Model]
) -> None:
    volume = configuration(transpose=(1, 0, 2), spacing=(1.0, 2.0, 1.0))
    plane = configuration("2d", ndim=2, patch=(12, 12), spacing=(None, 1.0, 1.0))
    step = PostprocessingStep(values=(2,), text="keep only the largest component of b")
    model = make_model(member(volume), member(plane), postprocessing=(step,))
    array = np.zeros((14, 24, 26), np.float32)
    array[2:7, 3:9, 4:10] = array[8:12, 14:20, 15:22] = 100  # two boxes far from each other
    prediction = model.predict((array, (2.2, 0.9, 1.1)), probabilities=True)
    raw = prediction.probabilities.argmax(0).astype(np.uint8)
    np.testing.assert_array_equal(prediction.labels, keep_largest(raw, (2,)))
    assert (prediction.labels != raw).any()
    np.testing.assert_allclose(prediction.probabilities.sum(0), 1, atol=1e-5)


def test_an_empty_image_is_predicted_with_a_warning(model: Model) -> None:
    prediction = model.predict((np.zeros((9, 10, 11)), AFFINE))
    assert prediction.labels.shape == (9, 10, 11)
    assert [(item.code, item.file, item.fatal) for item in prediction.warnings] == [("constant_image", "", False)]


def test_warnings_are_logged_too(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    prediction = model.predict((np.zeros((1, 6, 8, 8), np.float32), AFFINE))
    (record,), (warned,) = caplog.records, prediction.warnings
    assert (record.name, record.levelname, record.getMessage()) == ("segfit", "WARNING", str(warned))
    assert asdict(warned).items() <= vars(record).items()


def test_what_models_and_predictions_look_like(model: Model) -> None:
    assert repr(model) == "Model('tiny': 2 x 3d_fullres on cpu; channel 0 to a and b)"
    prediction = model.predict(Image(voxels()[None], Grid((11, 17, 15), (2.2, 0.9, 1.1), AFFINE)), probabilities=True)
    kind = prediction.labels.dtype
    assert repr(prediction) == f"Prediction(11x17x15 {kind}, 2.2x0.9x1.1 mm, with probabilities)"
    assert repr(prediction.label_map) == f"LabelMap(11x17x15 {kind}, 2.2x0.9x1.1 mm)"
    assert repr(Image(voxels()[None], prediction.grid)) == f"Image(1x11x17x15 {voxels().dtype}, 2.2x0.9x1.1 mm)"
    assert repr(replace(prediction, probabilities=None, warnings=(warning("", "odd"),))).endswith("mm, 1 warning)")


def test_2d_pictures(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    make_model: Callable[..., Model],
    tmp_path: Path,
) -> None:
    model = make_model(member(configuration("2d", ndim=2, patch=(16, 16), spacing=(1.0, 1.0), channels=3)))
    picture = np.random.default_rng(0).integers(0, 255, (21, 30, 3), dtype=np.uint8)
    Picture.fromarray(picture).save(tmp_path / "a.png")
    prediction = model.predict(tmp_path / "a.png")
    np.testing.assert_array_equal(model.predict(picture.transpose(2, 0, 1)).labels, prediction.labels)
    prediction.save(tmp_path / "labels.png")
    np.testing.assert_array_equal(read_label(tmp_path / "labels.png").array[0], prediction.labels)
    assert prediction.warnings == ()
    exif = Picture.Exif()
    exif[0x0112] = 6
    Picture.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    turned = model.predict(tmp_path / "turned.png")
    np.testing.assert_array_equal(turned.labels, prediction.labels)
    assert [(item.code, item.file) for item in turned.warnings] == [("file_header", str(tmp_path / "turned.png"))]
    assert "EXIF" in turned.warnings[0].problem


def test_pictures_without_a_size_are_taken_at_that_of_the_model(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    make_model: Callable[..., Model],
    tmp_path: Path,
) -> None:
    model = make_model(member(configuration("2d", ndim=2, patch=(16, 16), spacing=(0.1, 0.1))))
    array = np.random.default_rng(0).integers(0, 255, (21, 30), dtype=np.uint8)
    path = tmp_path / "a.png"
    Picture.fromarray(array).save(path)
    assumed = model.predict(path)
    (assumption,) = assumed.warnings
    assert (assumption.code, assumption.file) == ("no_voxel_size", str(path))
    assert "(0.1, 0.1) mm" in assumption.problem
    assert [(item.code, item.file) for item in model.predict(array).warnings] == [("no_voxel_size", "")]
    for same in (model.predict(path, spacing_mm=(0.1,)), model.predict((array, (0.1, 0.1)))):
        np.testing.assert_array_equal(same.labels, assumed.labels)
        assert same.warnings == ()
    given = model.predict(path, spacing_mm=(0.2, 0.15))
    np.testing.assert_array_equal(given.labels, model.predict((array, (0.2, 0.15))).labels)
    assert (given.labels != assumed.labels).any()
    assert (given.labels.shape, given.grid.spacing_mm, given.warnings) == ((21, 30), (0.2, 0.15), ())
    (tmp_path / "cases.csv").write_text("case,pixel_mm\na,0.2 0.15\n")
    (path,) = predict_folder(model, find_cases(tmp_path, ".png", 1), tmp_path / "out", ending=".png")
    np.testing.assert_array_equal(read_label(path).array[0], given.labels)
    for name, content in (("a", array), ("colours", np.stack([array] * 3, axis=-1))):
        (tmp_path / name).mkdir()
        Picture.fromarray(content).save(tmp_path / name / f"{name}.tif")
    (path,) = predict_folder(model, find_cases(tmp_path / "a", ".png", 1), tmp_path / "tif", ending=".png")
    np.testing.assert_array_equal(read_label(path).array[0], given.labels)
    with pytest.raises(DatasetError, match=r"3 channels, the training images 1"):
        predict_folder(model, find_cases(tmp_path / "colours", ".png", 1), tmp_path / "tif", ending=".png")


def test_a_model_of_pictures_without_a_size_uses_none(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    make_model: Callable[..., Model],
    tmp_path: Path,
) -> None:
    model = make_model(member(configuration("2d", ndim=2, patch=(16, 16), spacing=(1.0, 1.0))))
    path = tmp_path / "a.png"
    Picture.fromarray(np.random.default_rng(0).integers(0, 255, (21, 30), dtype=np.uint8)).save(path)
    found = model.predict(path, spacing_mm=(0.1,))
    np.testing.assert_array_equal(found.labels, model.predict(path).labels)
    assert [(item.code, item.file) for item in found.warnings] == [("pixel_size_ignored", str(path))]


def test_the_size_a_model_works_at(
    configuration: Callable[..., Configuration], member: Callable[..., Member], make_model: Callable[..., Model]
) -> None:
    volume = configuration(transpose=(1, 0, 2), spacing=(1.0, 2.0, 3.0))
    coarse = configuration("3d_lowres", transpose=(1, 0, 2), spacing=(4.0, 5.0, 2.5))
    assert make_model(member(volume), member(coarse)).spacing_mm == (2.0, 1.0, 2.5)
    plane = configuration("2d", ndim=2, patch=(12, 12), spacing=(None, 0.5, 0.5))
    assert make_model(member(plane)).spacing_mm == (1.0, 0.5, 0.5)


def test_second_stage_sees_the_first(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    make_model: Callable[..., Model],
    tmp_path: Path,
) -> None:
    chosen = configuration("3d_cascade_fullres")
    network = chosen.network.model_copy(update={"in_channels": 3})
    model = make_model(member(chosen.model_copy(update={"previous_stage": "3d_lowres", "network": network})))
    case = write_case(tmp_path, "a", voxels())
    with pytest.raises(InputError, match=r"second stage of a cascade; predict .* with 3d_lowres first"):
        model.predict(case.images[0])
    earlier = np.zeros((11, 17, 15), np.uint8)
    earlier[3:8, 4:12, 4:12] = 2
    one = model.predict(case.images[0], previous_stage=earlier)
    two = model.predict(case.images[0], previous_stage=np.zeros_like(earlier))
    assert (one.labels != two.labels).any()
    nibabel.save(nibabel.Nifti1Image(earlier.T, AFFINE), tmp_path / "earlier.nii.gz")
    from_file = model.predict(case.images[0], previous_stage=tmp_path / "earlier.nii.gz")
    np.testing.assert_array_equal(from_file.labels, one.labels)
    nibabel.save(nibabel.Nifti1Image(earlier.T, AFFINE + np.eye(4)), tmp_path / "moved.nii.gz")
    with pytest.raises(InputError, match="does not lie on the grid"):
        model.predict(case.images[0], previous_stage=tmp_path / "moved.nii.gz")
    with pytest.raises(InputError, match="must be integer labels of shape"):
        model.predict(case.images[0], previous_stage=earlier[1:])


def test_mistakes_are_told(model: Model, tmp_path: Path) -> None:
    array = voxels()
    broken = array.copy()
    broken[3, 3, 3] = np.nan
    nan = write_case(tmp_path, "nan", broken).images[0]
    good = write_case(tmp_path, "good", array).images[0]
    with pytest.raises(InputError, match=r"nan_0000.nii.gz has 1 NaN"):
        model.predict(nan)
    with pytest.raises(InputError, match=r"good_0000.nii.gz has 2 channels, the training images 1"):
        model.predict([good, good])
    with pytest.raises(InputError, match="spacing of the image is unknown"):
        model.predict(array)
    with pytest.raises(InputError, match="the image has 2 axes, the model takes 3, or 4"):
        model.predict((array[0], (1.0, 1.0)))
    for spacing in (
        (1.0, 0.0, 1.0),
        (1.0, np.nan, 1.0),
        (1.0, 1.0),
        "1 1 1",
        "",
        ["a"],
        [[1, 1]],
        object(),
        [None] * 3,
    ):
        with pytest.raises(InputError, match="voxel size"):
            model.predict((array, spacing))
        with pytest.raises(InputError, match="voxel size"):
            model.predict(array, spacing)
    for spacing in ("1 1 1", [], (0, 1, 1)):
        with pytest.raises(InputError, match="voxel size"):
            model.predict(good, spacing)
    with pytest.raises(InputError, match="geometry of the image is unusable"):
        model.predict((array, np.zeros((4, 4))))
    with pytest.raises(InputError, match="must hold real numbers"):
        model.predict((array.astype(np.complex64), AFFINE))
    with pytest.raises(InputError, match="its grid"):
        model.predict((array[1:], Grid((11, 17, 15), (1, 1, 1))))
    with pytest.raises(InputError, match="is missing"):
        model.predict(tmp_path / "absent.nii.gz")
    for geometry in (AFFINE.T, np.diag([1.0, 1, 1, 0]), AFFINE * 1j, np.full((4, 4), "x")):
        with pytest.raises(InputError, match="geometry of the image is unusable"):
            model.predict((array, geometry))
    with pytest.raises(InputError, match="voxel size"):
        model.predict(array, True)
    with pytest.raises(InputError, match="masked voxels"):
        model.predict((np.ma.masked_less(array, 90), AFFINE))
    with pytest.raises(InputError, match="is text or a Path"):
        model.predict((array, AFFINE)).save(None)
    tensor = torch.from_numpy(array)
    empty: tuple[Any, ...] = (np.float32(3), tensor.to_sparse(), tensor.to("meta"), list(array))
    for nothing in (*empty, [], (), None, 3, [1.0, 2.0], [None], {"image": array}, (good, (1, 1, 1))):
        with pytest.raises(InputError):
            model.predict(nothing)
    with pytest.raises(InputError, match="not the second stage"):
        model.predict(good, previous_stage=tmp_path / "absent.nii.gz")


@pytest.mark.parametrize("value", [1e16, 1e30, 1e300, -1e30, np.inf, np.nan])
def test_what_no_network_can_compute_with_is_refused(model: Model, tmp_path: Path, value: float) -> None:
    array = voxels().astype(np.float64)
    array[0, 0, 0] = value
    case = write_case(tmp_path, "odd", array)
    expected = "too large for single precision" if np.isfinite(value) else "NaN or infinite"
    for source in (case.images[0], (array, AFFINE), Image(array[None], Grid(array.shape, (2.2, 0.9, 1.1), AFFINE))):
        with pytest.raises(InputError, match=expected):
            model.predict(source)
    with pytest.raises(DatasetError) as caught:
        predict_folder(model, [case], tmp_path / "out")
    assert [problem.case for problem in caught.value.problems] == ["odd"]


def test_headers_that_contradict_themselves_are_told(model: Model) -> None:
    told = model.predict(Image(voxels()[None], Grid((11, 17, 15), (2.0, 1.0, 1.0), AFFINE))).warnings
    assert [(item.code, item.file) for item in told] == [("file_header", "")]


def test_files_of_a_case_that_lie_apart_are_told(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    make_model: Callable[..., Model],
    tmp_path: Path,
) -> None:
    model = make_model(member(configuration(channels=2)))
    moved = AFFINE.copy()
    moved[0, 3] += 0.2
    paths = [write_case(tmp_path, "a", voxels()).images[0], write_case(tmp_path, "b", voxels(seed=1), moved).images[0]]
    assert [(item.code, item.file) for item in model.predict(paths).warnings] == [("grid_moved", str(paths[1]))]


def test_images_unlike_those_of_the_training_are_told_or_refused(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    make_model: Callable[..., Model],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    grid = Grid((11, 17, 15), (2.2, 0.9, 1.1), AFFINE)
    images = [Image(voxels(seed=seed)[None], grid) for seed in range(5)]
    measured = [
        measure_image(image, axes, crop) for image in images for axes, _, crop in [oriented_crop(image, "stored")]
    ]
    known = TrainingImages.of(measured, "stored", ("channel 0",))
    model = make_model(member(configuration()), training_images=known)
    assert model.predict(images[0]).warnings == model.predict(Image(voxels(seed=9)[None], grid)).warnings == ()
    array = voxels(seed=9)
    raw = write_case(tmp_path, "raw", array + 1000).images[0]
    (told,) = model.predict(raw).warnings
    assert (told.code, told.file, told.fatal) == ("intensity_range", str(raw), False)
    assert caplog.records[-1].getMessage() == str(told)
    far = array.copy()
    far[1, 2, 3] = 1e7
    assert [item.code for item in model.predict((far, grid)).warnings] == ["extreme_values"]
    turned = model.predict((array.swapaxes(0, 1), Grid((17, 11, 15), (2.2, 0.9, 1.1), AFFINE)))
    assert {item.code for item in turned.warnings} == {"axes"}
    kept = KeptWarnings(SILENT)
    cases = [Case(id="raw", images=(raw,)), write_case(tmp_path, "metres", array, np.diag([1.1, 0.9, 2.2, 1e-3]) * 1e3)]
    with pytest.raises(DatasetError) as caught:
        predict_folder(model, cases, tmp_path / "out", execution=Execution(progress=kept))
    assert [problem.case for problem in caught.value.problems] == ["metres"]
    assert [(item.case, item.code, item.file) for item in kept.warnings] == [("raw", "intensity_range", str(raw))]


def test_what_is_known_of_older_models_is_compared(model: Model) -> None:
    assert model.manifest.training_images is None
    assert [item.code for item in model.predict((voxels(), (20.0, 9.0, 11.0))).warnings] == ["no_orientation"]
    for spacing in ((2000.0, 1000.0, 1000.0), (0.002, 0.001, 0.001)):
        with pytest.raises(InputError, match="a unit was mistaken"):
            model.predict((voxels(), spacing))
    with pytest.raises(InputError, match="single slice"):
        model.predict((voxels((1, 17, 15)), AFFINE))


def test_arrays_tensors_and_spacings_of_every_kind(
    configuration: Callable[..., Configuration], member: Callable[..., Member], make_model: Callable[..., Model]
) -> None:
    model = make_model(member(configuration("2d", ndim=2, patch=(16, 16), spacing=(1.0, 2.0))), spacing_mm=(1.0, 2.0))
    array = voxels((21, 30))
    expected = model.predict((array, (1.0, 2.0)))
    assert expected.warnings == ()
    for source, spacing in (
        (array, (1.0, 2.0)),
        (array, [1, 2]),
        (torch.from_numpy(array), torch.tensor([1.0, 2.0])),
        ((torch.from_numpy(array), np.array([1.0, 2.0])), None),
        (torch.from_numpy(array)[None].requires_grad_(), (1.0, 2.0)),
        (Image(array[None], Grid((21, 30), (1.0, 1.0), spacing_known=False)), (1.0, 2.0)),
    ):
        found = model.predict(source, spacing)
        np.testing.assert_array_equal(found.labels, expected.labels)
        assert (found.grid.spacing_mm, found.warnings) == ((1.0, 2.0), ())
    assert model.predict(array, 1.5).grid.spacing_mm == (1.5, 1.5)
    mask = model.predict(array > 100, 1)
    np.testing.assert_array_equal(mask.labels, model.predict((array > 100).astype(np.uint8), 1).labels)
    assert model.predict(torch.from_numpy(array).bfloat16(), 1).labels.shape == array.shape
    with pytest.raises(InputError, match="but was given"):
        model.predict((array, (1.0, 2.0)), (2.0, 1.0))


@pytest.mark.parametrize(
    ("ndim", "channels", "shape", "expected"),
    [
        (2, 3, (21, 30, 3), "channels last"),
        (2, 1, (21, 30, 1), "channels last"),
        (3, 2, (8, 9, 10, 2), "channels last"),
        (2, 1, (12, 21, 30), "a volume"),
        (2, 3, (12, 21, 30), "a volume"),
        (2, 3, (21, 30), "1 channel,"),
        (3, 2, (8, 9, 10), "1 channel,"),
        (3, 1, (8, 9), "2 axes"),
        (2, 1, (1, 8, 9, 10), "4 axes"),
        (2, 1, (0, 9), "holds nothing"),
    ],
)
def test_arrays_of_another_shape_get_the_right_diagnosis(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    make_model: Callable[..., Model],
    ndim: int,
    channels: int,
    shape: tuple[int, ...],
    expected: str,
) -> None:
    patch, name = ((16, 16), "2d") if ndim == 2 else ((8, 12, 12), "3d_fullres")
    model = make_model(member(configuration(name, ndim=ndim, patch=patch, spacing=(1.0,) * ndim, channels=channels)))
    with pytest.raises(InputError, match=expected):
        model.predict((np.ones(shape, np.float32), (1.0,) * ndim))


def test_load_model(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    one = load_model(folder, "cpu", folds=[1], mirror=False, tile_step=1.0)
    predictor = one.predictors[0]
    assert len(predictor.networks) == 1
    assert predictor.subsets == ((),)
    assert predictor.tile_step == 1.0
    assert (one.name, one.channel_names, one.file_ending) == ("tiny", ("channel 0",), ".nii.gz")
    assert one.labels.foreground_values == (1, 2)
    with pytest.raises(InputError, match="has no fold 7 of 3d_fullres; it has 0, 1"):
        load_model(folder, "cpu", folds=[7])
    with pytest.raises(InputError, match="at least one fold"):
        load_model(folder, "cpu", folds=[])
    with pytest.raises(InputError, match="tile_step is a share"):
        load_model(folder, "cpu", tile_step=0.0)
    for option, values in {
        "mirror": ("x", 1, "off"),
        "tile_step": ("a", -1, np.nan, True),
        "precision": ("int8", 16, "FP32"),
        "folds": (1, 0, "7", "10", {0}),
    }.items():
        for value in values:
            with pytest.raises(InputError, match=option.removesuffix("s")):
                load_model(folder, "cpu", **{option: value})
    assert len(load_model(folder, "cpu", folds=[1, 1, "1"]).predictors[0].networks) == 1
    with pytest.raises(InputError, match="is not a model: it has neither"):
        load_model(tmp_path, "cpu")
    for path in (None, 3, b"model", {folder}):
        with pytest.raises(InputError, match="path of the model"):
            load_model(path, "cpu")


def test_weights_of_another_network_are_refused(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    write_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = write_model(tmp_path / "model", member(configuration()))
    text = (folder / "model.json").read_text().replace('"encoder_convs": [\n     1,', '"encoder_convs": [\n     2,')
    text = text.replace('"encoder_convs": [\n      1,', '"encoder_convs": [\n      2,')
    text = text.replace('"encoder_convs": [\n       1,', '"encoder_convs": [\n       2,')
    (folder / "model.json").write_text(re.sub('"seal": "[^"]*"', '"seal": ""', text))
    with pytest.raises(InputError, match="does not fit its configuration"):
        load_model(folder, "cpu")


def test_cases_that_fail_are_named_and_do_not_stop_the_others(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("first", "overflows", "crashes", "unwritable", "last")
    cases = [write_case(tmp_path / "in", name, voxels(seed=seed)) for seed, name in enumerate(names)]
    output = tmp_path / "out"
    (output / "unwritable.nii.gz").mkdir(parents=True)  # a folder lies in its place
    logits = Predictor.logits

    def failing(self: Predictor, image: np.ndarray, *, progress: Progress = SILENT) -> torch.Tensor:
        number = calls.pop(0)
        if number == "overflows":
            raise StageError("the network output is not finite", "its weights or the image are unusable")
        if number == "crashes":
            raise RuntimeError("device lost")
        return logits(self, image, progress=progress)

    calls = list(names)
    monkeypatch.setattr(Predictor, "logits", failing)
    with pytest.raises(DatasetError) as caught:
        predict_folder(model, cases, output, overwrite=True)
    assert {problem.case for problem in caught.value.problems} == {"overflows", "crashes", "unwritable"}
    assert [(output / f"{name}.nii.gz").is_file() for name in names] == [True, False, False, False, True]
    with pytest.raises(InputError, match="not the second stage"):
        predict_folder(model, cases, output, previous_stage=tmp_path)


def test_predict_folder(model: Model, tmp_path: Path) -> None:
    cases = [write_case(tmp_path / "in", f"case{i}", voxels(seed=i)) for i in range(6)]
    output = tmp_path / "out"
    paths = predict_folder(model, cases, output, save_probabilities=True, execution=Execution(workers=2))
    assert paths == [output / f"case{i}.nii.gz" for i in range(6)]
    for case, path in zip(cases, paths, strict=True):
        np.testing.assert_array_equal(read_label(path).array[0], model.predict(list(case.images)).labels)
        assert (output / f"{case.id}.npz").is_file()
    stamps = [path.stat().st_mtime_ns for path in paths]
    paths[2].unlink()
    assert predict_folder(model, cases, output) == paths
    again = [path.stat().st_mtime_ns for path in paths]
    assert [i for i in range(6) if again[i] != stamps[i]] == [2]
    predict_folder(model, cases[:1], output, overwrite=True)
    assert paths[0].stat().st_mtime_ns != stamps[0]


def test_a_single_case_tells_how_far_it_is(model: Model, tmp_path: Path) -> None:
    """Of many cases the cases are counted, of one its tiles too."""
    cases = [write_case(tmp_path / "in", f"case{i}", voxels(seed=i)) for i in range(2)]
    told: dict[int, str] = {}
    for number in (1, 2):
        log = io.StringIO()
        execution = Execution(progress=LineProgress(log))
        predict_folder(model, cases[:number], tmp_path / f"out{number}", execution=execution)
        told[number] = log.getvalue()
    assert "tiles: done in" in told[1]
    assert "tiles" not in told[2]


def test_other_formats_predict_alike(model: Model, tmp_path: Path) -> None:
    array = voxels().round()
    source = write_case(tmp_path / "in", "a", array, affine_of()).images[0]
    expected = model.predict(source).labels
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(source)), str(tmp_path / "c.nrrd"))
    attributes = {"ome": {"version": "0.5", "multiscales": [MULTISCALE]}}
    group = zarr.create_group(tmp_path / "d.ome.zarr", attributes=attributes)
    group.create_array("0", data=array)
    inputs = [write_series(tmp_path / "1.2.840", array), tmp_path / "c.nrrd", tmp_path / "d.ome.zarr"]
    paths = predict_folder(model, cases_from_files(inputs, 1), tmp_path / "out")
    stored = nibabel.load(source)
    nibabel.save(nibabel.MGHImage(np.asarray(stored.dataobj, np.int16), stored.affine), tmp_path / "e.mgz")
    (path,) = predict_folder(model, cases_from_files([tmp_path / "e.mgz"], 1), tmp_path / "mgz", ending=".mgz")
    np.testing.assert_array_equal(read_label(path).array[0], expected)
    np.testing.assert_array_equal(nibabel.load(path).affine, nibabel.load(tmp_path / "e.mgz").affine)
    assert [path.name for path in paths] == ["1.2.840.nii.gz", "c.nii.gz", "d.nii.gz"]
    for path in paths[:2]:
        label = read_label(path)
        np.testing.assert_array_equal(label.array[0], expected)
        assert read_grid(source).mismatch(label.grid) == ""
    unplaced = model.predict((array, (2.25, 0.9, 1.25))).labels  # OME-Zarr has no orientation
    np.testing.assert_array_equal(read_label(paths[2]).array[0], unplaced)
    again = predict_folder(model, cases_from_files(inputs[2:], 1), tmp_path / "zarr", ending=".zarr")
    np.testing.assert_array_equal(read_label(again[0]).array[0], unplaced)
    written = (again[0] / ".zattrs").stat().st_mtime_ns
    predict_folder(model, cases_from_files(inputs[2:], 1), tmp_path / "zarr", ending=".zarr")
    assert (again[0] / ".zattrs").stat().st_mtime_ns == written  # what is there is left as it is


def test_series_predict_as_the_same_volume_stored_otherwise(model: Model, tmp_path: Path) -> None:
    """A converter's file has its rows the other way round; both say where they lie, so the labels lie alike too."""
    array = voxels().round()
    write_series(tmp_path / "in" / "a", array)
    write_series(tmp_path / "in" / "b" / "1.2.840.1", array)
    for folder in (tmp_path / "in", tmp_path / "in" / "a", tmp_path / "in" / "b" / "1.2.840.1"):
        clutter(folder)
    paths = predict_folder(model, find_cases(tmp_path / "in", model.image_ending, 1), tmp_path / "out")
    assert [path.name for path in paths] == ["a.nii.gz", "b.nii.gz"]
    rows = array.shape[1]
    turned = affine_of() @ np.array([[1, 0, 0, 0], [0, -1, 0, rows - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    source = write_case(tmp_path / "nifti", "a", array[:, ::-1], turned).images[0]
    expected = model.predict(source).labels[:, ::-1]
    assert len(np.unique(expected)) == 3
    for path in paths:
        label = read_label(path)
        np.testing.assert_array_equal(label.array[0], expected)
        np.testing.assert_allclose(label.grid.affine, affine_of(), atol=1e-6)


@pytest.mark.real_data
def test_a_real_series_predicts_as_the_file_that_itk_makes_of_it(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    make_model: Callable[..., Model],
    data: Path,
    tmp_path: Path,
) -> None:
    model = make_model(member(configuration(orientation="canonical", spacing=(2.0, 8.0, 8.0), patch=(8, 32, 32))))
    (tmp_path / "in" / "patient").mkdir(parents=True)
    series = tmp_path / "in" / "patient" / "series"
    series.symlink_to(data / "ct_example" / "example_ct_dicom")
    paths = predict_folder(model, find_cases(tmp_path / "in", model.image_ending, 1), tmp_path / "out")
    assert [path.name for path in paths] == ["patient.nii.gz"]
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series)))
    SimpleITK.WriteImage(SimpleITK.Flip(reader.Execute(), [False, True, False]), str(tmp_path / "a.nii.gz"))
    expected = model.predict(tmp_path / "a.nii.gz").labels[:, ::-1]
    found = read_label(paths[0])
    assert len(np.unique(expected)) == 3
    np.testing.assert_array_equal(found.array[0], expected)
    assert read_grid(series).mismatch(found.grid) == ""


def test_predict_folder_names_series_that_are_none(model: Model, tmp_path: Path) -> None:
    array = voxels((5, 6, 7)).round()
    folder = tmp_path / "in"
    for case in ("a", "gap", "both/one", "both/two", "z"):
        write_series(folder / case, array)
    (folder / "gap" / "slice997").unlink()
    write_series(folder / "cut" / "study" / "series", array)
    cut = folder / "cut" / "study" / "series" / "slice995"
    cut.write_bytes(cut.read_bytes()[:-2])
    (folder / "notes").mkdir()
    (folder / "notes" / "README.txt").write_text("no slices")
    with pytest.raises(DatasetError) as caught:
        predict_folder(model, find_cases(folder, model.image_ending, 1), tmp_path / "out")
    told = [(problem.case, problem.problem, problem.action) for problem in caught.value.problems]
    assert told == [
        (
            "both",
            "both has slices in 2 folders: one, two",
            "keep the one series that is meant, all its slices in one folder",
        ),
        (
            "cut",
            "cut/study/series/slice995 is truncated (82 of 84 bytes of pixels: 6 rows of 7 pixels of 16 bits)",
            "copy or export the series again; remove the file if it is not a slice",
        ),
        (
            "gap",
            "gap has uneven distances between slices: 4.5 mm after slice 2 of 4 (slice998), "
            "usually 2.25 mm (1 such place)",
            "add the missing slices or convert the series to evenly spaced NIfTI",
        ),
        (
            "notes",
            "notes holds no DICOM images",
            "give the folder of one complete series, or remove this folder",
        ),
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", "z.nii.gz"]


@pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd"])
def test_outputs_lie_where_their_images_lie_bit_for_bit(model: Model, tmp_path: Path, ending: str) -> None:
    affine = affine_of() @ np.linalg.qr(np.random.default_rng(3).normal(size=(4, 4)))[0]
    affine[3] = 0, 0, 0, 1
    array = voxels((5, 6, 7))
    folder = tmp_path / "in"
    folder.mkdir()
    writer = find_format(Path(f"a{ending}")).write
    assert writer is not None
    writer(folder / f"a{ending}", LabelMap(array.astype(np.float32), Grid(array.shape, (1.0, 1.0, 1.0), affine)))
    source = read_grid(folder / f"a{ending}")
    (path,) = predict_folder(model, find_cases(folder, ending, 1), tmp_path / "out", ending=ending)
    assert path.name == f"a{ending}"
    assert read_grid(path) == source
    assert np.array_equal(read_label(path).array[0], model.predict(folder / f"a{ending}").labels)


def test_predict_folder_goes_on_after_a_bad_case(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    cases = [write_case(folder, f"case{i}", voxels(seed=i)) for i in range(4)]
    cases[1].images[0].write_bytes(cases[1].images[0].read_bytes()[:200])
    write_case(folder, "case3", np.full((9, 9, 9), np.inf, np.float32))
    with pytest.raises(DatasetError) as caught:
        predict_folder(model, cases, tmp_path / "out")
    assert [problem.case for problem in caught.value.problems] == ["case1", "case3"]
    assert "NaN or infinite" in caught.value.problems[1].problem
    assert caught.value.outcome == "2 of 4 cases predicted"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["case0.nii.gz", "case2.nii.gz"]


def test_what_lies_in_the_place_of_an_output_is_told(model: Model, tmp_path: Path) -> None:
    cases = [write_case(tmp_path / "in", name, voxels(seed=i)) for i, name in enumerate("ab")]
    (tmp_path / "out" / "a.nii.gz").mkdir(parents=True)
    with pytest.raises(DatasetError) as caught:
        predict_folder(model, cases, tmp_path / "out")
    assert [(problem.case, problem.code) for problem in caught.value.problems] == [("a", "file_system")]
    assert (tmp_path / "out" / "b.nii.gz").is_file()
    with pytest.raises(InputError, match="is no folder"):
        predict_folder(model, cases, tmp_path / "out" / "b.nii.gz")


def test_predict_folder_refuses_a_lossy_ending(model: Model, tmp_path: Path) -> None:
    cases = [write_case(tmp_path / "in", f"case{i}", voxels(seed=i)) for i in range(5)]
    with pytest.raises(InputError, match="changes label values"):
        predict_folder(model, cases, tmp_path / "out", ending=".jpg")


def test_an_image_is_never_its_own_label_map(
    tmp_path: Path,
    make_model: Callable[..., Model],
    member: Callable[..., Member],
    configuration: Callable[..., Configuration],
) -> None:
    model = make_model(member(configuration()))
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"an image")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is an input image and would be overwritten; write to another folder"):
            predict_folder(model, [Case(id="a", images=(path,))], tmp_path, overwrite=overwrite)
    assert path.read_bytes() == b"an image"


def test_a_picture_without_a_size_is_taken_to_be_like_those_of_the_training(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    make_model: Callable[..., Model],
    tmp_path: Path,
) -> None:
    path = tmp_path / "picture.png"
    Picture.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60), dtype=np.uint8)).save(path)
    coarse = member(configuration("2d", ndim=2, patch=(16, 16), spacing=(2.0, 2.0)))
    model = make_model(coarse, spacing_mm=(1.0, 1.0))
    assert model.spacing_mm == (1.0, 1.0)
    prepared = model.prepare(path)
    assert prepared.inputs[0][0].shape == (1, 20, 30)  # pixels twice as large
    assert prepared.warnings == ()
