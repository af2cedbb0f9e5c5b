"""DICOM series: synthetic ones of every fault, and a real one beside an independent reader."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    MPEG2MPML,
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    RTStructureSetStorage,
    generate_uid,
)

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
from segfit.images.image import FileError, LabelMap
from series_builder import clutter, write_series

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


def in_tenths(folder: Path, distances: Sequence[float], oblique: bool = False) -> Path:
    """Write a series of 40 slices with these distances in turn, their positions rounded to 0.1 mm."""
    write_series(folder, np.zeros((40, 4, 5), np.int16))
    normal = np.array([0.0, -0.6, 0.8]) if oblique else np.array([0.0, 0.0, 1.0])
    places = np.cumsum(np.resize(distances, 40))
    for number in range(40):
        path = folder / f"slice{999 - number}"
        dataset = pydicom.dcmread(path)
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 0.8, 0.6] if oblique else [1, 0, 0, 0, 1, 0]
        dataset.ImagePositionPatient = np.round(places[number] * normal, 1).tolist()
        dataset.save_as(path)
    return folder


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("step", [0.625, 0.75, 1.25, 2.33])
def test_positions_in_tenths_of_a_millimetre_lie_on_a_line(tmp_path: Path, step: float, oblique: bool) -> None:
    grid = dicom.read_grid(in_tenths(tmp_path / "s", [step], oblique))
    assert grid.spacing_mm[0] == pytest.approx(step, abs=0.1 / 39)


@pytest.mark.parametrize("step", [0.625, 1.25])
@pytest.mark.parametrize("place", [1, 20, 37])
def test_what_is_missing_or_doubled_is_seen_in_tenths_of_a_millimetre(tmp_path: Path, step: float, place: int) -> None:
    for name, distance in (("missing", 2 * step), ("doubled", 0.0)):
        distances = [step] * 40
        distances[place] = distance
        with pytest.raises(FileError, match=r"uneven distances|at the position of another"):
            dicom.read_grid(in_tenths(tmp_path / name, distances))


def nest(folder: Path, depth: int) -> Path:
    """Put so many sequences into each other into every slice."""
    tag, item = (
        struct.pack("<HH2sHI", 0x0040, 0xA730, b"SQ", 0, 2**32 - 1),
        struct.pack("<HHI", 0xFFFE, 0xE000, 2**32 - 1),
    )
    ends = struct.pack("<HHIHHI", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    for path in folder.iterdir():
        content = path.read_bytes()
        at = content.rindex(b"\xe0\x7f\x10\x00")
        path.write_bytes(content[:at] + (tag + item) * depth + ends * depth + content[at:])
    return folder


def test_sequences_in_each_other_are_explained(tmp_path: Path) -> None:
    assert dicom.read(nest(make(tmp_path / "good"), 20)).array.shape[1:] == VOXELS.shape
    deep = nest(make(tmp_path / "deep"), 5000)
    assert num_voxels(deep) == 1
    for read in (dicom.read, dicom.read_grid):
        with pytest.raises(FileError, match="cannot be read"):
            read(deep)


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


def of_two_patients(slices: list[FileDataset]) -> None:
    for number, dataset in enumerate(slices):
        dataset.PatientID = "A" if number < 3 else "B"


def of_two_frames(slices: list[FileDataset]) -> None:
    for number, dataset in enumerate(slices):
        dataset.FrameOfReferenceUID = f"1.2.{number // 3 + 1}"


def inverted(slices: list[FileDataset]) -> None:
    slices[4].PhotometricInterpretation = "MONOCHROME1"


def unscaled(slices: list[FileDataset]) -> None:
    del slices[2].RescaleSlope


def flat_scale(slices: list[FileDataset]) -> None:
    slices[2].RescaleSlope = 0


def one_spacing(slices: list[FileDataset]) -> None:
    slices[2].PixelSpacing = [0.5]


def not_finite(slices: list[FileDataset]) -> None:
    slices[2].ImagePositionPatient = [0, 0, "nan"]


def without_rows(slices: list[FileDataset]) -> None:
    slices[2].Rows = 0


def depths(slices: list[FileDataset]) -> None:
    for dataset in slices:
        del dataset.RescaleSlope, dataset.RescaleIntercept
    slices[0].PixelRepresentation = 0


@pytest.mark.filterwarnings("ignore:Invalid value for VR DS")
@pytest.mark.parametrize(
    ("change", "problem", "action"),
    [
        (missing, "has uneven distances between slices: 5 mm after slice 2 of 4 (IM98), usually 2.5 mm (1 such place)",
         "add the missing slices"),
        (tilted, "has slices that are shifted against each other by up to 1.2 mm (gantry tilt)", "straighten"),
        (mixed, "holds 2 series: ", "keep the one that is meant, or give each series its own folder"),
        (twice, "has 1 slice at the position of another (copies, times or echoes), such as IM99 and IM98",
         "keep one slice per position"),
        (resized, "mixes sizes: ", "keep the slices of one volume"),
        (scout, "mixes orientations: ", "keep the slices of one volume"),
        (zoomed, "mixes pixel spacings: ", "keep the slices of one volume"),
        (nowhere, "has no ImagePositionPatient, which says where its pixels lie", "export the series again"),
        (frames, "has 40 frames", "convert it to NIfTI"),
        (colour, "is a colour image", "export it as .png or .tif"),
        (skew, "has the ImageOrientationPatient (1.0, 0.0, 0.0, 0.2, 0.98, 0.0), which is not two perpendicular",
         "export the series again"),
        (of_two_patients, "mixes patients: PatientID is not the same in ", "keep the slices of one volume"),
        (of_two_frames, "mixes frames of reference: FrameOfReferenceUID", "keep the slices of one volume"),
        (inverted, "mixes meanings of grey values: PhotometricInterpretation", "keep the slices of one volume"),
        (unscaled, "has no RescaleSlope, which other slices of its series have", "export the series again"),
        (flat_scale, "has the RescaleSlope 0 and RescaleIntercept -1024, which is unusable", "export the series"),
        (one_spacing, "has the PixelSpacing (0.5), expected 2 finite numbers", "export the series again"),
        (not_finite, "has the ImagePositionPatient (0, 0, nan), expected 3 finite numbers", "export the series again"),
        (without_rows, "has no pixels (0 rows, 6 columns)", "export the series again"),
        (list.clear, "holds no DICOM images", "give the folder of one complete series"),
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


def enhanced(slices: list[FileDataset], *, shared: bool = True, order: Sequence[int] = (3, 0, 4, 1, 2)) -> FileDataset:
    """Return one file of frames, of which what all have in common is said once or by frame."""
    whole = slice_of(0)
    groups = []
    for number in order:
        one, group = slices[number], Dataset()
        place, plane, sizes, values = Dataset(), Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient, plane.ImageOrientationPatient = (
            one.ImagePositionPatient,
            one.ImageOrientationPatient,
        )
        sizes.PixelSpacing, sizes.SliceThickness = one.PixelSpacing, 2.5
        values.RescaleSlope, values.RescaleIntercept = one.RescaleSlope, one.RescaleIntercept
        group.PlanePositionSequence, group.PlaneOrientationSequence = [place], [plane]
        group.PixelMeasuresSequence, group.PixelValueTransformationSequence = [sizes], [values]
        groups.append(group)
    common = Dataset()
    if shared:
        for name in ("PlaneOrientationSequence", "PixelMeasuresSequence", "PixelValueTransformationSequence"):
            setattr(common, name, groups[0][name].value)
            for group in groups:
                delattr(group, name)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        delattr(whole, name)
    whole.NumberOfFrames, whole.PixelData = len(groups), b"".join(slices[number].PixelData for number in order)
    whole.SharedFunctionalGroupsSequence, whole.PerFrameFunctionalGroupsSequence = [common], groups
    return whole


def in_one_file(
    change: Callable[[list[FileDataset]], Any] = lambda slices: None,
    *,
    order: Sequence[int] | None = None,
    shared: bool = True,
) -> Callable[[list[FileDataset]], None]:
    def merge(slices: list[FileDataset]) -> None:
        change(slices)
        slices[:] = [enhanced(slices, shared=shared, order=range(len(slices)) if order is None else order)]

    return merge


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("order", [(3, 0, 4, 1, 2), (0,)])
def test_frames_of_one_file_are_the_volume_that_slices_would_be(
    tmp_path: Path, order: tuple[int, ...], *, shared: bool
) -> None:
    def only(slices: list[FileDataset]) -> None:
        slices[:] = [slices[number] for number in sorted(order)]
        for dataset in slices:
            dataset.SliceThickness = 2.5

    expected = dicom.read(make(tmp_path / "slices", only))
    folder = make(tmp_path / "frames", in_one_file(order=order, shared=shared))
    found = dicom.read(folder)
    assert found.array.dtype == expected.array.dtype
    assert np.array_equal(found.array, expected.array)
    assert not found.grid.mismatch(expected.grid)
    assert dicom.read_grid(folder).shape == expected.grid.shape
    assert dicom.num_voxels(folder) == expected.array.size


def test_compressed_frames_are_read_one_by_one(tmp_path: Path) -> None:
    folder = make(tmp_path / "frames", in_one_file(order=(3, 0, 4, 1, 2)))
    (file,) = folder.iterdir()
    plain = dicom.read(folder)
    dataset = pydicom.dcmread(file)
    dataset.compress(pydicom.uid.RLELossless)
    dataset.save_as(file)
    assert np.array_equal(dicom.read(folder).array, plain.array)


def of_masks(slices: list[FileDataset]) -> None:
    in_one_file()(slices)
    slices[0].Modality = "SEG"


def one_frame_less(slices: list[FileDataset]) -> None:
    in_one_file()(slices)
    slices[0].NumberOfFrames = 4


def of_fewer_bytes(slices: list[FileDataset]) -> None:
    in_one_file()(slices)
    slices[0].PixelData = slices[0].PixelData[:-48]


@pytest.mark.parametrize(
    ("change", "problem", "action"),
    [
        (in_one_file(missing), "has uneven distances between slices: 5 mm after slice 2 of 4 (IM99 frame 2)", "add"),
        (in_one_file(tilted), "has slices that are shifted against each other", "straighten"),
        (in_one_file(order=(0, 1, 1, 2)), "has 1 slice at the position of another", "convert each volume in it"),
        (in_one_file(scout, shared=False), "mixes orientations: IM99 frame ", "keep the slices of one volume"),
        (of_masks, "has 5 frames", "convert it to NIfTI"),
        (one_frame_less, "has 4 frames, of which 5 are described", "export the series again"),
    ],
)  # fmt: skip
def test_frames_that_are_no_volume_are_explained(tmp_path: Path, change: Any, problem: str, action: str) -> None:
    folder = make(tmp_path / "s", change)
    for read in (dicom.read, dicom.read_grid):
        with pytest.raises(FileError) as caught:
            read(folder)
        assert caught.value.problem.startswith(problem)
        assert caught.value.action.startswith(action)


def test_frames_without_their_pixels_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        dicom.read(make(tmp_path / "s", of_fewer_bytes))
    assert caught.value.problem.startswith("is truncated (192 of 240 bytes")


def test_mixed_series_are_listed(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        dicom.read_grid(make(tmp_path / "s", mixed))
    assert "CT 3 (3 images)" in caught.value.problem
    assert "CT 4 'Abdomen  2.0' (2 images)" in caught.value.problem


def no_pixels(slices: list[FileDataset]) -> None:
    slices[1].PixelData = b""


def other_rows(slices: list[FileDataset]) -> None:
    for dataset in slices:
        dataset.Rows = 3


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (cut, "is truncated (20 of 48 bytes of pixels: 4 rows of 6 pixels of 16 bits)"),
        (depths, "holds int16, the slices before it uint16"),
        (no_pixels, "holds no pixels"),
        (other_rows, "holds 48 bytes of pixels, its header asks for 36 (3 rows of 6 pixels of 16 bits)"),
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
        (MPEG2MPML, "MPEG2 Main Profile / Main Level (transfer syntax 1.2.840.10008.1.2.4.100)"),  # never a decoder
        (HTJ2KLossless, f"{HTJ2KLossless.name} (transfer syntax 1.2.840.10008.1.2.4.201)"),  # none installed
    ],
)
def test_unknown_compressions_are_named(tmp_path: Path, syntax: UID, shown: str) -> None:
    folder = make(tmp_path / "s", compressed_as(syntax))
    with pytest.raises(FileError) as caught:
        dicom.read(folder)
    assert caught.value.path == folder / "IM99"
    assert caught.value.problem == f"is compressed with {shown}, for which no decoder is installed"
    assert caught.value.action == 'pip install "segfit[dicom]", or decompress the series with a DICOM converter'


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    kept = {"empty": 0, "zeros": 0, "no preamble": 0, "cut in the group of the file": 150, "cut in the header": 500}[
        how
    ]
    added = {"zeros": bytes(len(content)), "no preamble": content[132:]}.get(how, b"")
    path.write_bytes(content[:kept] + added)


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("empty", "is empty"),
        ("zeros", "is named like a slice but is not a DICOM file"),
        ("no preamble", "is named like a slice but is not a DICOM file"),
        ("cut in the group of the file", "is truncated or damaged (an image without rows and columns)"),
        ("cut in the header", "is truncated or damaged (an image without rows and columns)"),
    ],
)
@pytest.mark.parametrize("name", ["IM95", "last.dcm"])
def test_no_volume_is_made_without_a_damaged_slice(tmp_path: Path, how: str, problem: str, name: str) -> None:
    folder = make(tmp_path / "s")
    path = (folder / "IM95").rename(folder / name)  # the last one: nothing else tells that it is missing
    damage(path, how)
    for read in (dicom.read, dicom.read_grid):
        with pytest.raises(FileError) as caught:
            read(folder)
        assert (caught.value.path, caught.value.problem) == (path, problem)
        assert caught.value.action == "copy or export the series again; remove the file if it is not a slice"


@pytest.mark.filterwarnings("ignore:End of file reached")
def test_a_compressed_slice_that_is_cut_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "compressed"
    folder.mkdir(parents=True)
    for path in make(tmp_path / "plain").iterdir():
        compress(path, folder / path.name, gdcm.TransferSyntax.JPEGLSLossless)
    content = (folder / "IM95").read_bytes()
    (folder / "IM95").write_bytes(content[:-20])
    with pytest.raises(FileError, match="IM95 is truncated or damaged"):
        dicom.read(folder)


def test_bits_that_are_not_used_do_not_count(tmp_path: Path) -> None:
    def twelve(slices: list[FileDataset]) -> None:
        for number, dataset in enumerate(slices):
            values = VOXELS[number].astype(np.int32) - 2000
            dataset.BitsStored, dataset.HighBit, dataset.RescaleIntercept = 12, 11, 0
            dataset.PixelData = (values & 0xFFF | 0x5000).astype("<u2").tobytes()  # signed, with rubbish above

    assert np.array_equal(dicom.read(make(tmp_path / "s", twelve)).array[0], VOXELS.astype(np.int32) - 2000)


def test_what_fills_up_behind_pixels_does_not_count(tmp_path: Path) -> None:
    def padded(slices: list[FileDataset]) -> None:
        for dataset in slices:
            dataset.PixelData += bytes(10)

    assert np.array_equal(dicom.read(make(tmp_path / "s", padded)).array[0], VOXELS - 1024.0)


def test_values_of_a_table_are_looked_up(tmp_path: Path) -> None:
    def table(slices: list[FileDataset]) -> None:
        for dataset in slices:
            del dataset.RescaleSlope, dataset.RescaleIntercept
            lookup = Dataset()
            lookup.add_new("LUTDescriptor", "US", [4000, 0, 16])
            lookup.add_new("LUTData", "US", (7 * np.arange(4000)).tolist())
            dataset.ModalityLUTSequence = [lookup]

    assert np.array_equal(dicom.read(make(tmp_path / "s", table)).array[0], 7 * VOXELS.astype(np.int32))


def structure_set(folder: Path) -> None:
    """Write a DICOM file that is no image."""
    dataset = slice_of(0)
    del dataset.Rows, dataset.Columns, dataset.PixelData
    dataset.SeriesInstanceUID = OTHER_SERIES
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = RTStructureSetStorage
    folder.mkdir(exist_ok=True)
    dataset.save_as(folder / "RTSTRUCT", enforce_file_format=True)


@pytest.mark.parametrize("below", ["1.2.840", "PATIENT/STUDY/SERIES"])
def test_a_series_may_lie_in_a_folder_below(tmp_path: Path, below: str) -> None:
    case = tmp_path / "case"
    series = make(case / below)
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
        assert caught.value.problem == "has slices in 2 folders: arterial, venous"
        assert caught.value.action == "keep the one series that is meant, all its slices in one folder"
        assert caught.value.path == tmp_path / "case"


def test_slices_of_one_series_in_a_folder_inside_are_missed(tmp_path: Path) -> None:
    folder = make(tmp_path / "case")
    make(folder / "scout", mixed_all)
    assert dicom.read(folder).array.shape == (1, 5, 4, 6)
    (folder / "more").mkdir()
    (folder / "IM95").rename(folder / "more" / "IM95")
    for read in (dicom.read, dicom.read_grid):
        with pytest.raises(FileError, match="case has slices of its series also in the folder more; put all slices"):
            read(folder)


def mixed_all(slices: list[FileDataset]) -> None:
    for dataset in slices:
        dataset.SeriesInstanceUID = OTHER_SERIES


def test_folders_without_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    clutter(tmp_path / "empty")
    structure_set(tmp_path / "structures")
    assert [is_image_folder(tmp_path / name) for name in ("empty", "structures")] == [False, True]
    for name in ("empty", "structures"):
        with pytest.raises(FileError, match=rf"{name} holds no DICOM images; give the folder of one complete series"):
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
    write_labels(tmp_path / "labels.nii.gz", LabelMap((image.array[0] > 200).astype(np.uint8), image.grid))
    assert read_grid(tmp_path / "labels.nii.gz").mismatch(twin) == ""


def test_series_in_paired_folders_are_cases(tmp_path: Path) -> None:
    for case in "abcde":
        series = make(tmp_path / "images" / case)
        image = read_image(series)
        labels = (image.array[0] > np.median(image.array)).astype(np.uint8)
        (tmp_path / "labels").mkdir(exist_ok=True)
        write_labels(tmp_path / "labels" / f"{case}.nii.gz", LabelMap(labels, image.grid))
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
