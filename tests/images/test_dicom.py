"""DICOM series: synthetic ones of every fault, and a real one beside an independent reader."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import MPEG2MPML, UID, CTImageStorage, ExplicitVRLittleEndian, HTJ2KLossless, generate_uid

from segfit.dataset.checks import check_dataset
from segfit.dataset.layouts import open_dataset
from segfit.errors import InputError
from segfit.images import dicom, nifti
from segfit.images.formats import (
    files_of,
    is_image_folder,
    num_voxels,
    read_case,
    read_grid,
    read_image,
    write_labels,
)
from segfit.images.image import FileError
from series_builder import clutter

VOXELS = np.random.default_rng(0).integers(0, 4000, (5, 4, 6), np.int16)
AXIAL = np.array([[1.0, 0, 0], [0, 1, 0]])
SERIES = generate_uid(entropy_srcs=["series"])
OTHER_SERIES = generate_uid(entropy_srcs=["other"])


def slice_of(number: int, direction: NDArray[np.float64] = AXIAL, step: float = 2.5) -> FileDataset:
    """Return one slice of `VOXELS`: 0.5 mm between rows, 0.75 mm between columns."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(number)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    dataset.SeriesInstanceUID, dataset.Modality, dataset.SeriesNumber = SERIES, "CT", 3
    dataset.Rows, dataset.Columns = VOXELS.shape[1:]
    dataset.PixelSpacing = [0.5, 0.75]
    dataset.ImageOrientationPatient = direction.ravel().tolist()
    normal = np.cross(*direction)
    dataset.ImagePositionPatient = np.round(np.array([-10, 20, 30]) + number * step * normal, 6).tolist()
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.PixelData = VOXELS[number].tobytes()
    return dataset


def make(folder: Path, change: Callable[[list[FileDataset]], Any] = lambda slices: None, **kind: Any) -> Path:
    """Write the series after `change`, the files named against their order."""
    slices = [slice_of(number, **kind) for number in range(len(VOXELS))]
    change(slices)
    folder.mkdir(parents=True)
    for number, dataset in enumerate(slices):
        dataset.save_as(folder / f"IM{99 - number}", enforce_file_format=True)
    return folder


def turned(seed: int) -> NDArray[np.float64]:
    matrix, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return matrix[:2]


def by_itk(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def test_slices_are_sorted_and_rescaled(tmp_path: Path) -> None:
    image = dicom.read(make(tmp_path / "s"))
    assert image.array.dtype == np.float32
    assert np.array_equal(image.array, VOXELS[None] - 1024.0)
    assert image.grid.spacing_mm == (2.5, 0.5, 0.75)
    expected = [[-0.75, 0, 0, 10], [0, -0.5, 0, -20], [0, 0, 2.5, 30], [0, 0, 0, 1]]  # RAS
    np.testing.assert_allclose(image.grid.affine, expected, atol=1e-9)  # type: ignore[arg-type]
    assert dicom.read_grid(tmp_path / "s") == image.grid


@pytest.mark.parametrize("seed", range(4))
def test_oblique_series_lie_where_itk_puts_them(tmp_path: Path, seed: int) -> None:
    folder = make(tmp_path / "s", direction=turned(seed))
    image, other = dicom.read(folder), by_itk(folder)
    sitk.WriteImage(other, str(tmp_path / "a.nii.gz"))
    twin = nifti.read(tmp_path / "a.nii.gz")
    assert np.array_equal(image.array, twin.array)
    np.testing.assert_allclose(image.grid.affine, twin.grid.affine, atol=1e-5)  # type: ignore[arg-type]


def test_stored_values_stay_as_they_are(tmp_path: Path) -> None:
    def plain(slices: list[FileDataset]) -> None:
        for dataset in slices:
            del dataset.RescaleSlope, dataset.RescaleIntercept

    image = dicom.read(make(tmp_path / "s", plain))
    assert image.array.dtype == np.int16
    assert np.array_equal(image.array, VOXELS[None])


def test_each_slice_has_its_own_slope(tmp_path: Path) -> None:
    def slopes(slices: list[FileDataset]) -> None:
        for number, dataset in enumerate(slices):
            dataset.RescaleSlope, dataset.RescaleIntercept = 0.5 * (number + 1), 0

    factors = 0.5 * np.arange(1, 6).reshape(5, 1, 1)
    assert np.array_equal(dicom.read(make(tmp_path / "s", slopes)).array[0], (VOXELS * factors).astype(np.float32))


def test_other_files_are_left_aside(tmp_path: Path) -> None:
    folder = make(tmp_path / "s")
    (folder / "report.txt").write_text("nothing")
    (folder / ".DS_Store").write_bytes(bytes(128) + b"DICM")
    (folder / "deeper").mkdir()
    structure_set(folder)
    assert np.array_equal(read_case([folder]).array, VOXELS[None] - 1024.0)


@pytest.mark.parametrize("name", ["RLELossless", "JPEGLSLossless", "JPEGLosslessProcess14_1"])
def test_compressed_series(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "compressed"
    folder.mkdir(parents=True)
    for path in make(tmp_path / "plain").iterdir():
        compress(path, folder / path.name, getattr(gdcm.TransferSyntax, name))
    assert pydicom.dcmread(folder / "IM99").file_meta.TransferSyntaxUID.is_compressed
    assert np.array_equal(dicom.read(folder).array, VOXELS[None] - 1024.0)


def compress(source: Path, target: Path, syntax: Any) -> None:
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(source))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(target))
    assert writer.Write()


def test_one_slice_is_as_thick_as_it_says(tmp_path: Path) -> None:
    def alone(slices: list[FileDataset]) -> None:
        del slices[1:]
        slices[0].SliceThickness = 4

    assert dicom.read(make(tmp_path / "s", alone)).grid.spacing_mm == (4.0, 0.5, 0.75)


def test_small_errors_of_rounding_are_nothing(tmp_path: Path) -> None:
    def rounded(slices: list[FileDataset]) -> None:
        for dataset in slices:
            dataset.ImagePositionPatient = [round(float(v), 2) for v in dataset.ImagePositionPatient]

    grid = dicom.read_grid(make(tmp_path / "s", rounded, step=0.6666))
    assert grid.spacing_mm[0] == pytest.approx(0.6666, abs=2e-3)


@pytest.mark.parametrize(("step", "largest"), [(5.0, 0.05), (0.6, 0.02), (0.05, 0.005)])
def test_how_uneven_distances_may_be(tmp_path: Path, step: float, largest: float) -> None:
    def moved(by: float) -> Callable[[list[FileDataset]], None]:
        def change(slices: list[FileDataset]) -> None:
            x, y, z = slices[4].ImagePositionPatient
            slices[4].ImagePositionPatient = [x, y, round(float(z) + by, 6)]

        return change

    for sign in (1, -1):
        dicom.read_grid(make(tmp_path / f"good{sign}", moved(0.9 * sign * largest), step=step))
        with pytest.raises(FileError, match="uneven distances"):
            dicom.read_grid(make(tmp_path / f"bad{sign}", moved(1.1 * sign * largest), step=step))


def missing(slices: list[FileDataset]) -> None:
    del slices[2]


def tilted(slices: list[FileDataset]) -> None:
    for number, dataset in enumerate(slices):
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, float(y) + 0.3 * number, z]


def mixed(slices: list[FileDataset]) -> None:
    for dataset in slices[3:]:
        dataset.SeriesInstanceUID, dataset.SeriesNumber = OTHER_SERIES, 4
        dataset.SeriesDescription = "Abdomen  2.0"


def twice(slices: list[FileDataset]) -> None:
    slices[1].ImagePositionPatient = slices[0].ImagePositionPatient


def resized(slices: list[FileDataset]) -> None:
    slices[1].Rows = 3
    slices[1].PixelData = VOXELS[1, :3].tobytes()


def scout(slices: list[FileDataset]) -> None:
    slices[0].ImageOrientationPatient = [0, 1, 0, 0, 0, -1]


def zoomed(slices: list[FileDataset]) -> None:
    slices[4].PixelSpacing = [0.5, 0.8]


def nowhere(slices: list[FileDataset]) -> None:
    del slices[2].ImagePositionPatient


def frames(slices: list[FileDataset]) -> None:
    del slices[1:]
    slices[0].NumberOfFrames = 40


def colour(slices: list[FileDataset]) -> None:
    slices[0].SamplesPerPixel = 3


def skew(slices: list[FileDataset]) -> None:
    for dataset in slices:
        dataset.ImageOrientationPatient = [1, 0, 0, 0.2, 0.98, 0]


def compressed_as(syntax: UID) -> Callable[[list[FileDataset]], None]:
    def change(slices: list[FileDataset]) -> None:
        slices[0].file_meta.TransferSyntaxUID = syntax
        slices[0]["PixelData"].is_undefined_length = True
        slices[0].PixelData = pydicom.encaps.encapsulate([slices[0].PixelData])

    return change


def cut(slices: list[FileDataset]) -> None:
    slices[3].PixelData = slices[3].PixelData[:20]


def depths(slices: list[FileDataset]) -> None:
    for dataset in slices:
        del dataset.RescaleSlope, dataset.RescaleIntercept
    slices[0].PixelRepresentation = 0


@pytest.mark.parametrize(
    ("change", "problem", "action"),
    [
        (missing, "has uneven distances between slices: 5 mm behind slice 2 of 4, usually 2.5 mm (1 such place)",
         "add the missing slices"),
        (tilted, "has slices that are shifted against each other by up to 1.2 mm (gantry tilt)", "straighten"),
        (mixed, "holds 2 series: ", "give each series a folder"),
        (twice, "has 1 slice at the place of another (copies, time points or echoes)", "keep one slice per place"),
        (resized, "mixes sizes: ", "keep the slices of one volume"),
        (scout, "mixes orientations: ", "keep the slices of one volume"),
        (zoomed, "mixes pixel spacings: ", "keep the slices of one volume"),
        (nowhere, "has no ImagePositionPatient, which says where the slice lies", "export the series again"),
        (frames, "holds 40 frames in one file", "convert it to NIfTI"),
        (colour, "holds a colour picture", "export it as .png or .tif"),
        (skew, "has an ImageOrientationPatient whose axes are not perpendicular", "export it again"),
        (list.clear, "holds no DICOM images", "give the folder that has the slices directly inside"),
    ],
)  # fmt: skip
def test_series_that_are_no_volume_are_explained(tmp_path: Path, change: Any, problem: str, action: str) -> None:
    folder = make(tmp_path / "s", change)
    for read in (dicom.read, dicom.read_grid):
        with pytest.raises(FileError) as caught:
            read(folder)
        assert caught.value.problem.startswith(problem)
        assert caught.value.action.startswith(action)
        assert caught.value.path in (folder, *folder.iterdir())


def test_mixed_series_are_listed(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        dicom.read_grid(make(tmp_path / "s", mixed))
    assert "CT 3 (3 images)" in caught.value.problem
    assert "CT 4 'Abdomen  2.0' (2 images)" in caught.value.problem


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (cut, "cannot be read ("),
        (depths, "holds int16, the slices before it uint16"),
    ],
)
def test_voxels_that_cannot_be_read_are_explained(tmp_path: Path, change: Any, problem: str) -> None:
    folder = make(tmp_path / "s", change)
    with pytest.raises(FileError) as caught:
        dicom.read(folder)
    assert caught.value.problem.startswith(problem)
    assert caught.value.path.parent == folder


@pytest.mark.parametrize(
    ("syntax", "shown"),
    [
        (MPEG2MPML, "MPEG2 Main Profile / Main Level, transfer syntax 1.2.840.10008.1.2.4.100"),  # never a decoder
        (HTJ2KLossless, f"{HTJ2KLossless.name}, transfer syntax 1.2.840.10008.1.2.4.201"),  # none installed
    ],
)
def test_unknown_compressions_are_named(tmp_path: Path, syntax: UID, shown: str) -> None:
    folder = make(tmp_path / "s", compressed_as(syntax))
    with pytest.raises(FileError) as caught:
        dicom.read(folder)
    assert caught.value.path == folder / "IM99"
    assert caught.value.problem == f"is compressed in a way that no installed decoder knows ({shown})"
    assert caught.value.action == (
        'pip install "segfit[dicom]" if that is not done yet, or decompress the series with a DICOM converter'
    )


def structure_set(folder: Path) -> None:
    """Write a DICOM file that is no image."""
    dataset = slice_of(0)
    del dataset.Rows, dataset.Columns, dataset.PixelData
    dataset.SeriesInstanceUID = OTHER_SERIES
    folder.mkdir(exist_ok=True)
    dataset.save_as(folder / "RTSTRUCT", enforce_file_format=True)


def test_a_series_may_lie_one_folder_deeper(tmp_path: Path) -> None:
    case = tmp_path / "case"
    series = make(case / "1.2.840")
    for folder in (case, series):
        clutter(folder)
    structure_set(case / "RS")
    (case / ".hidden").mkdir()
    image = read_image(case)
    assert np.array_equal(image.array, VOXELS[None] - 1024.0)
    assert read_grid(case) == image.grid
    assert files_of(case) == tuple(sorted(series.glob("IM*")))
    assert is_image_folder(case)
    assert not is_image_folder(case, nested=False)


def test_two_series_one_folder_deeper_are_named(tmp_path: Path) -> None:
    for name in ("arterial", "venous"):
        make(tmp_path / "case" / name)
    for use in (dicom.read, dicom.read_grid, dicom.files):
        with pytest.raises(FileError) as caught:
            use(tmp_path / "case")
        assert caught.value.problem == "holds 2 series, in the folders arterial, venous"
        assert "channels are folders case_0000, case_0001, ..." in caught.value.action
        assert caught.value.path == tmp_path / "case"


def test_folders_without_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    clutter(tmp_path / "empty")
    structure_set(tmp_path / "structures")
    make(tmp_path / "deep" / "study" / "series")
    assert [is_image_folder(tmp_path / name) for name in ("empty", "structures", "deep")] == [False, True, False]
    for name in ("empty", "structures", "deep"):
        with pytest.raises(FileError, match=rf"{name} holds no DICOM images; give the folder that has the slices"):
            dicom.read(tmp_path / name)


def test_single_slices_are_asked_for_as_their_folder(tmp_path: Path) -> None:
    for name in ("a.dcm", "b.IMA"):
        with pytest.raises(InputError, match=f"{name} is a slice of a DICOM series; give the folder of the series"):
            read_image(tmp_path / name)


@pytest.mark.real_data
def test_a_real_series_equals_what_itk_reads(data: Path, tmp_path: Path) -> None:
    folder = data / "ct_example" / "example_ct_dicom"
    image, other = read_image(folder), by_itk(folder)
    assert np.array_equal(image.array[0], sitk.GetArrayFromImage(other))
    assert image.array.min() == -1024
    assert image.grid.spacing_mm == (2.0, 0.9765625, 0.9765625)
    sitk.WriteImage(other, str(tmp_path / "a.nii.gz"))
    twin = read_grid(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(image.grid.affine, twin.affine, atol=1e-6)  # type: ignore[arg-type]
    write_labels(tmp_path / "labels.nii.gz", (image.array[0] > 200).astype(np.uint8), image.grid)
    assert read_grid(tmp_path / "labels.nii.gz").mismatch(twin) == ""


def test_series_in_paired_folders_are_cases(tmp_path: Path) -> None:
    for case in "abcde":
        series = make(tmp_path / "images" / case)
        image = read_image(series)
        labels = (image.array[0] > np.median(image.array)).astype(np.uint8)
        (tmp_path / "labels").mkdir(exist_ok=True)
        write_labels(tmp_path / "labels" / f"{case}.nii.gz", labels, image.grid)
    dataset = open_dataset(tmp_path)
    assert [case.id for case in dataset.training] == list("abcde")
    assert dataset.training[0].images == (tmp_path / "images" / "a",)
    assert (dataset.layout, dataset.file_ending) == ("paired", ".nii.gz")
    assert not [problem for problem in check_dataset(dataset) if problem.fatal]


def test_voxels_are_counted_from_the_first_slice(tmp_path: Path) -> None:
    folder = make(tmp_path / "series")
    assert num_voxels(folder) == prod(read_grid(folder).shape) > 1
    (tmp_path / "empty").mkdir()
    assert num_voxels(tmp_path / "empty") == 1
