"""Files of images and labels by their ending: one visible table, one way in, one way out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.errors import InputError, nearest
from segfit.geometry import Grid
from segfit.images import dicom, metaimage, mgh, nifti, nrrd, omezarr, png_jpeg, tiff
from segfit.images.image import FileError, Image, LabelMap, Regions, Remark, Segment
from segfit.images.open_files import OpenFiles, shared
from segfit.labels import smallest_dtype
from segfit.text import numbers

__all__ = [
    "ENDINGS",
    "FOLDER",
    "Format",
    "check",
    "described",
    "files_beside",
    "files_of",
    "find_format",
    "full_name",
    "is_image_folder",
    "known_ending",
    "label_ending",
    "num_voxels",
    "read_case",
    "read_grid",
    "read_image",
    "read_label",
    "segments_of",
    "split_ending",
    "stacked",
    "write_labels",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How images of one kind are read and written.

    Parameters
    ----------
    name : for messages
    read, read_grid : from a path, which may be among files that are open; see `read_image` and `read_grid`
    num_voxels : where that is quicker to tell than the grid; see `num_voxels`
    regions : where parts of an image can be read, from a path; see `segfit.images.regions`
    read_label : where labels are decoded otherwise than images; None: by `read`
    write : a label map to a path; None: this format is not for labels, for the reason in
        `unfit`, with what to do in `remedy`, and labels of its images have the ending `label_ending`
    reals : whether `write` takes other numbers than whole ones, too
    multichannel : whether a file usually holds all channels of a case, as colours do; volumes usually have a file per
        channel, and the volumes of a 4D file are channels where there is one file alone
    files : every file that an image consists of; None: it is one file; see `files_of`
    beside : files that may be there and then bear on what is read, though they are no part of it
    check : remarks on a file and the image that was read from it; see `check`
    checks_labels : whether the remarks matter for label maps, too
    channel_kind : what the channels of a file are, for messages, where the format says it; None: volumes
    segments : the classes that the header of a label file names, where the format has names
    palette : the colours in which label values are shown, where the format has palettes
    same_depth : whether bits per value must agree between cases, because values span their range
    oriented : whether files usually say how their axes lie
    """

    name: str
    read: Callable[[Path, OpenFiles | None], Image]
    read_grid: Callable[[Path, OpenFiles | None], Grid]
    num_voxels: Callable[[Path, OpenFiles | None], int] | None = None
    regions: Callable[[Path], Regions | None] | None = None
    read_label: Callable[[Path, OpenFiles | None], Image] | None = None
    write: Callable[[Path, LabelMap], None] | None = None
    unfit: str = ""
    remedy: str = "save labels as .nii.gz"
    label_ending: str = ".nii.gz"
    reals: bool = False
    multichannel: bool = False
    files: Callable[[Path, OpenFiles | None], tuple[Path, ...]] | None = None
    beside: Callable[[Path], tuple[Path, ...]] = lambda _: ()
    check: Callable[[Path, Image, OpenFiles | None], tuple[Remark, ...]] = lambda *_: ()
    checks_labels: bool = False
    channel_kind: Callable[[Path, OpenFiles | None], str] | None = None
    segments: Callable[[Path, OpenFiles | None], tuple[Segment, ...]] | None = None
    palette: Callable[[Path, OpenFiles | None], dict[int, str]] | None = None
    same_depth: bool = False
    oriented: bool = False


def _write_picture(path: Path, labels: LabelMap) -> None:
    if labels.grid.ndim != 2:
        raise FileError(path, "cannot hold a 3D label map", "write .nii.gz or .tif instead")
    png_jpeg.write(path, labels.array)


def _by(write: Callable[[Path, NDArray[Any], Grid], None]) -> Callable[[Path, LabelMap], None]:
    """Return the writer of a format that keeps values and geometry alone."""
    return lambda path, labels: write(path, labels.array, labels.grid)


def _format(name: str, module: Any, **more: Any) -> Format:
    """Return a format by its module, whose files hold any numbers and no colours."""
    return Format(name=name, read=module.read, read_grid=module.read_grid, write=_by(module.write), reals=True, **more)


def _unsized(action: str) -> Callable[[Path, Image, OpenFiles | None], tuple[Remark, ...]]:
    """Return the check of a format whose volumes may lack their voxel size."""
    remark = Remark("has no voxel size; 1 mm is assumed", action)
    return lambda _, image, __: () if image.grid.spacing_known or image.grid.ndim == 2 else (remark,)


_HEADER_SIZE = _unsized("write the true voxel size and directions into its header")
_FILE_SIZE = _unsized('write {"spacing": [z, y, x]} in mm into CASE.json beside it if that is wrong')
_NIFTI = _format(
    "NIfTI",
    nifti,
    check=lambda path, _, files: nifti.remarks(path, files),
    checks_labels=True,
    segments=nifti.segments,
    oriented=True,
)
_NRRD = _format(
    "NRRD",
    nrrd,
    check=_HEADER_SIZE,
    segments=nrrd.segments,
    files=lambda path, files: (path, *nrrd.companions(path, files)),
)
_METAIMAGE = _format(
    "MetaImage",
    metaimage,
    check=_HEADER_SIZE,
    files=lambda path, files: (path, *metaimage.companions(path, files)),
)
_MGH = _format("FreeSurfer MGH", mgh, check=_HEADER_SIZE)
_PICTURE = Format(
    name="PNG or BMP",
    read=png_jpeg.read,
    read_grid=png_jpeg.read_grid,
    read_label=png_jpeg.read_label,
    write=_write_picture,
    multichannel=True,
    check=lambda path, _, files: png_jpeg.remarks(path, files),
    channel_kind=png_jpeg.kind,
    palette=png_jpeg.colours,
    same_depth=True,
)
_JPEG = replace(
    _PICTURE,
    name="JPEG",
    write=None,
    unfit="which changes label values",
    remedy="export labels as .png from the annotation tool; converting a JPEG keeps its errors",
    label_ending=".png",
)
_TIFF = _format(
    "TIFF",
    tiff,
    regions=tiff.regions,
    read_label=tiff.read_label,
    multichannel=True,
    beside=tiff.spacing_files,
    check=lambda path, image, files: tiff.remarks(path, files) + _FILE_SIZE(path, image, files),
    same_depth=True,
)
_OMEZARR = Format(
    name="OME-Zarr",
    read=lambda path, _: omezarr.read(path),
    read_grid=lambda path, _: omezarr.read_grid(path),
    regions=omezarr.regions,
    write=_by(omezarr.write),
    reals=True,
    multichannel=True,
    files=omezarr.files,
    check=lambda path, *_: omezarr.remarks(path),
    checks_labels=True,
)
_DICOM = Format(
    name="a DICOM series",
    read=dicom.read,
    read_grid=dicom.read_grid,
    num_voxels=dicom.num_voxels,
    unfit="which cannot hold labels",
    files=dicom.files,
)

FOLDER = "/"  # stands for the ending of folders whose name has none
ENDINGS: dict[str, Format] = {
    ".nii.gz": _NIFTI,
    ".nii": _NIFTI,
    ".png": _PICTURE,
    ".bmp": _PICTURE,
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".nrrd": _NRRD,
    ".nhdr": _NRRD,
    ".mha": _METAIMAGE,
    ".mhd": _METAIMAGE,
    ".mgz": _MGH,
    ".mgh": _MGH,
    ".ome.zarr": _OMEZARR,
    ".zarr": _OMEZARR,
    FOLDER: _DICOM,
}
_NAMED = tuple(ending for ending in ENDINGS if ending != FOLDER)
_PAIR = (".hdr", ".img")  # Analyze keeps no orientation, so that each program guesses left and right
_SLICES = (".dcm", ".dicom", ".ima")  # how archives name single slices
_ROUNDING = 1e-3  # of label values, which some programs store as floating-point numbers
_SPACING_TOLERANCE = 0.01  # between a table and a header: people write three digits


def full_name(path: Path) -> str:
    """Return the name of a file or folder with its ending: that of a folder without a known one is `FOLDER`."""
    return path.name + (FOLDER if path.is_dir() and not path.name.lower().endswith(_NAMED) else "")


def described(ending: str, noun: str = "") -> str:
    """Say what images with an ending are, for messages: ``.png``, ``.png files`` with a noun, ``DICOM series``."""
    return "DICOM series" if ending == FOLDER else f"{ending} {noun}".strip()


def known_ending(name: str | Path) -> str:
    """Return the known ending of a name as written, nothing for another one.

    The path of a folder without a known ending has the ending `FOLDER`; so has a name that ends in it.
    """
    if isinstance(name, Path):
        name = full_name(name)
    # The longer one of two that end alike stands first.
    return next((name[-len(end) :] for end in ENDINGS if name.lower().endswith(end) and len(name) > len(end)), "")


def split_ending(name: str | Path) -> tuple[str, str]:
    """Return ``(stem, ending)`` of a name as `known_ending` tells it; `InputError` for an unknown ending."""
    name = full_name(name) if isinstance(name, Path) else name
    ending = known_ending(name)
    if ending:
        return name.removesuffix(ending), ending
    found = Path(name).suffix
    if found.lower() in _SLICES:
        raise InputError(f"{name} is a slice of a DICOM series", "give the folder of the series")
    if found.lower() in _PAIR:
        raise InputError(f"{name} is half of an Analyze or NIfTI pair (.hdr and .img)", "convert it to .nii.gz")
    raise InputError(
        f"{name}: the file ending {found!r} is not known{nearest(found, list(_NAMED))}",
        f"known are {', '.join(_NAMED)}",
    )


def find_format(path: Path) -> Format:
    """Return the format that the name of a file or folder asks for; `InputError` for an unknown ending."""
    return ENDINGS[split_ending(path)[1].lower()]


def label_ending(ending: str) -> str:
    """Return the ending of label maps that belong to images with a known `ending`: the same where it can hold them."""
    format_ = ENDINGS[ending.lower()]
    return ending if format_.write is not None else format_.label_ending


def files_of(path: Path, files: OpenFiles | None = None) -> tuple[Path, ...]:
    """Return every file that an image consists of: itself, what its header points to, or what its folder holds.

    Files beside it that may exist or not are not among them, see `files_beside`. Raises `InputError` for an unknown
    ending and a header that cannot be read.
    """
    inside = find_format(path).files
    return (path,) if inside is None else inside(path, files)


def files_beside(path: Path) -> tuple[Path, ...]:
    """Return where files may be that bear on what is read from another (the spacing of a TIFF stack)."""
    format_ = ENDINGS.get(known_ending(path).lower())
    return () if format_ is None else format_.beside(path)


def is_image_folder(path: Path, *, nested: bool = True) -> bool:
    """Return whether a folder is one image: OME-Zarr, or a DICOM series.

    `nested`: the series may lie in a folder inside. Where a folder of images may be given too, only slices directly
    inside tell the two apart.
    """
    return path.is_dir() and (path.name.lower().endswith(_NAMED) or dicom.holds_slices(path, nested=nested))


def read_image(path: Path, spacing_mm: Sequence[float] | None = None, files: OpenFiles | None = None) -> Image:
    """Read one file: channels first, dtype as stored (float32 where the file scales its values).

    Volumes are (c, z, y, x), the volumes of a 4D file being its channels; pictures (c, y, x). Raises `InputError`
    saying what is wrong with the file and what to do.

    Parameters
    ----------
    spacing_mm : voxel size that is known from elsewhere, one for all axes or one per axis in array order; for files
        that do not say it. Raises `InputError` where a file says another.
    files : those that are open; each that is read is opened once, here or by whoever looks into it further
    """
    with shared(files) as files:
        image = find_format(path).read(path, files)
    return Image(image.array, _sized(path, image.grid, spacing_mm))


def read_grid(path: Path, spacing_mm: Sequence[float] | None = None) -> Grid:
    """Read where the voxels are, from the header alone where the format allows it; see `read_image`."""
    with OpenFiles() as files:
        return _sized(path, find_format(path).read_grid(path, files), spacing_mm)


def _sized(path: Path, grid: Grid, spacing_mm: Sequence[float] | None) -> Grid:
    """Return a grid with a voxel size from elsewhere, if its file says none; `FileError` if it says another."""
    if spacing_mm is None:
        return grid
    given = tuple(spacing_mm) * (grid.ndim if len(spacing_mm) == 1 else 1)
    if len(given) != grid.ndim:
        action = f'write one number, or "{" ".join("zyx"[-grid.ndim :])}" separated by blanks'
        raise FileError(path, f"has {grid.ndim} axes but was given the voxel size {numbers(given)} mm", action)
    if not grid.spacing_known:
        return replace(grid, spacing_mm=given, header=None, spacing_known=True)
    if not np.allclose(given, grid.spacing_mm, rtol=_SPACING_TOLERANCE, atol=0):
        problem = f"has voxels of {numbers(grid.spacing_mm)} mm (array order) but was given {numbers(given)} mm"
        raise FileError(path, problem, "correct or clear it in the table, or correct the header")
    return grid


def check(path: Path, image: Image, files: OpenFiles | None = None) -> tuple[Remark, ...]:
    """Return what the user should know of a file beside its voxels: contradictions, what is ignored, what is missing.

    `image` is what was read from it, or from the case that it belongs to. None for a file that cannot be read.
    """
    try:
        with shared(files) as files:
            return find_format(path).check(path, image, files)
    except InputError:
        return ()  # whoever reads it says why


def num_voxels(path: Path) -> int:
    """Return how many voxels a channel of a file has: what work on it costs, known quickly and before it is read.

    1 for a file that cannot be read: whoever reads it tells why.
    """
    try:
        format_ = find_format(path)
        with OpenFiles() as files:
            if format_.num_voxels is None:
                return prod(format_.read_grid(path, files).shape)
            return format_.num_voxels(path, files)
    except InputError:
        return 1


def read_case(
    paths: Sequence[Path], spacing_mm: Sequence[float] | None = None, files: OpenFiles | None = None
) -> Image:
    """Read the channel files of one case and stack them as float32 (c, *spatial); the grid is the first file's.

    Files that store the same voxels in another order of axes are turned (`Grid.turn`). Raises `InputError` if a file
    cannot be read or the files do not share one grid (`Grid.mismatch`). `spacing_mm` and `files` as in `read_image`.
    """
    return stacked(paths, (read_image(path, spacing_mm, files) for path in paths))


def stacked(paths: Sequence[Path], read: Iterable[Image]) -> Image:
    """Stack the channel files of one case that were read one by one, as `read_case` does."""
    assert paths
    images: list[Image] = []
    for path, image in zip(paths, read, strict=True):
        if images:
            image = image.turned_to(images[0].grid)
        difference = images[0].grid.mismatch(image.grid) if images else ""
        if difference:
            raise FileError(path, f"does not fit {paths[0].name}: {difference}", "resample it to that file's grid")
        images.append(image)
    channels = sum(image.array.shape[0] for image in images)
    array = np.empty((channels, *images[0].grid.shape), dtype=np.float32)
    np.concatenate([image.array for image in images], out=array, casting="unsafe")
    return Image(array, images[0].grid)


def read_label(
    path: Path,
    spacing_mm: Sequence[float] | None = None,
    files: OpenFiles | None = None,
    *,
    layered: bool = False,
) -> Image:
    """Read a label map as (1, *spatial), int16, or int32 where values need it.

    Floating-point files are accepted if every value is an integer but for rounding (`_ROUNDING`). Raises `InputError`
    otherwise, for more than one channel unless it may be `layered`, and for lossy formats. `spacing_mm` is that of its
    image, for files that do not say it; `files` as in `read_image`.
    """
    format_ = find_format(path)
    if format_.write is None:
        raise FileError(path, f"is {format_.name}, {format_.unfit}", format_.remedy)
    with shared(files) as files:
        image = (format_.read_label or format_.read)(path, files)
    array = image.array
    if array.shape[0] != 1 and not layered:
        raise FileError(path, f"has {array.shape[0]} channels", "save labels as one channel of label values")
    if array.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            rounded = np.rint(array)
            whole = np.abs(array - rounded) <= _ROUNDING  # False for infinite values
        if not whole.all():
            example = array[~whole].flat[0]
            raise FileError(path, f"has the value {example!s}, labels must be integers", "round or export it again")
        array = rounded
    low, high = int(array.min()), int(array.max())
    if low < -(2**31) or high >= 2**31:
        outside = array.max() if high >= 2**31 else array.min()
        raise FileError(path, f"has the label value {outside:.15g}, which exceeds 32 bits", "number labels from 0")
    small = low >= -(2**15) and high < 2**15
    grid = image.grid if image.grid.spacing_known else _sized(path, image.grid, spacing_mm)
    return Image(array.astype(np.int16 if small else np.int32), grid)


def segments_of(path: Path, files: OpenFiles | None = None) -> tuple[Segment, ...]:
    """Return the classes that a label file names; none for one that names none or cannot be read."""
    try:
        read = find_format(path).segments
        return () if read is None else read(path, files)
    except InputError:
        return ()  # whoever reads it says why


def write_labels(path: Path, labels: LabelMap) -> None:
    """Write a label map atomically on the grid it belongs to.

    Values are written as uint8 if all are below 255, as uint16 up to 65535, as nnU-Net does, else as int32, which PNG
    and BMP cannot hold.
    """
    format_ = find_format(path)
    if format_.write is None:
        raise FileError(path, f"would be {format_.name}, {format_.unfit}", f"write {format_.label_ending} instead")
    low, high = int(labels.array.min()), int(labels.array.max())
    array = np.ascontiguousarray(labels.array, dtype=smallest_dtype(low, high))
    format_.write(path, replace(labels, array=array))
