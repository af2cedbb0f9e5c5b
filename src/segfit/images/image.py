"""An image: voxels and where they are."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segfit.errors import InputError, Problem, SegfitError, reason_of
from segfit.execution.memory import free_bytes
from segfit.geometry import AxisMap, Grid
from segfit.images.open_files import OpenFiles, opened
from segfit.labels import LabelScheme
from segfit.text import by_axis, gigabytes

__all__ = [
    "CASE_FAILURES",
    "COPY_AGAIN",
    "FileError",
    "Image",
    "LabelMap",
    "Regions",
    "Remark",
    "Segment",
    "absence",
    "failure_of",
    "foreign",
    "foreign_start",
    "mm_per_unit",
    "optional_package",
    "problem_of",
    "reading",
    "require_memory",
    "require_room",
    "voxels_in_words",
]

# Lengths as files name them: OME-Zarr (UDUNITS-2 names), OME-XML (symbols), ImageJ (both, and "micron").
_MM_PER_UNIT = {
    **dict.fromkeys(("angstrom", "å"), 1e-7),
    **dict.fromkeys(("picometer", "pm"), 1e-9),
    **dict.fromkeys(("nanometer", "nm"), 1e-6),
    **dict.fromkeys(("micrometer", "micron", "microns", "um", "µm", "μm"), 1e-3),  # micro sign and Greek mu
    **dict.fromkeys(("millimeter", "mm"), 1.0),
    **dict.fromkeys(("centimeter", "cm"), 10.0),
    **dict.fromkeys(("decimeter", "dm"), 100.0),
    **dict.fromkeys(("meter", "m"), 1000.0),
    **dict.fromkeys(("inch", "in"), 25.4),
}

CASE_FAILURES = (SegfitError, MemoryError, RuntimeError)
"""What may go wrong with one case, in its files, in memory or on a device, and not with the others."""

COPY_AGAIN = "copy or export it again, or remove the case"
# First bytes of files that are not what their ending says: what the file is, what to do.
_ENDING = "correct its ending or export it again"
_KNOWN_STARTS = {
    b"\x89PNG": ("is a PNG image", _ENDING),
    b"\xff\xd8\xff": ("is a JPEG image", _ENDING),
    b"BM": ("is a BMP image", _ENDING),
    b"II*\0": ("is a TIFF file", _ENDING),
    b"MM\0*": ("is a TIFF file", _ENDING),
    b"II+\0": ("is a TIFF file", _ENDING),
    b"GIF8": ("is a GIF image", "export it again as .png"),
    b"RIFF": ("is a WebP image or a sound file", "export it again as .png"),
    b"\0\0\0\x0cjP": ("is a JPEG 2000 image", "export it again as .png or .tif"),
    b"\x5c\x01\0\0": ("is a NIfTI file", _ENDING),
    b"\0\0\0\1\0\0": ("is a FreeSurfer volume", _ENDING),
    b"PK\x03\x04": ("is a zip archive", "unpack it"),
    b"\x1f\x8b": ("is gzipped", "unpack it or correct its ending"),
    b"%PDF": ("is a PDF document", "export the image in it"),
    b"<": ("is a web page or another text file", "download the file itself"),
    b"/annex/objects/": ("is a git-annex pointer, not the file itself", "fetch it with datalad get, or git annex get"),
    b"version https://git-lfs": ("is a Git LFS pointer, not the file itself", "fetch it with git lfs pull"),
}
_LONGEST_START = 32  # bytes that tell
_LARGE_BYTES = 1 << 28  # of an image, from which on it is asked whether its file can hold it (assumption)
_READING = 2  # times its voxels is the least memory that an image takes: as stored, and as what is made of it
_MOST_BYTES = 1 << 80  # written out in a message
_MOST_PACKED = 8300  # pixels per byte of a file: Deflate packs 1032 bytes into one, each 8 pixels of black and white


class Remark(NamedTuple):
    """Something that a file says and that is not followed, or that it does not say; `problem` follows its name."""

    problem: str
    action: str


class Segment(NamedTuple):
    """A class as a label file names it: where a layer of it (a channel) has a value."""

    name: str
    value: int
    layer: int = 0


class Regions(NamedTuple):
    """An image of which parts are read, not the whole."""

    grid: Grid
    channels: int
    chunk: tuple[int, ...]  # voxels per spatial axis that are read together anyway
    read: Callable[[Sequence[slice]], NDArray[Any]]  # a box of the grid, (c, *box), dtype as stored


class FileError(InputError):
    """One image file is unusable: `problem` follows its name. `transient`: for the machine as it is now."""

    def __init__(self, path: Path, problem: str, action: str, transient: bool = False) -> None:
        super().__init__(problem, action)
        self.path, self.transient = path, transient
        self.args = (path, problem, action, transient)

    def __str__(self) -> str:
        return f"{self.path} {super().__str__()}"


def problem_of(
    case: str, error: InputError, action: str = "fix or remove the case", images: Sequence[Path] = ()
) -> Problem:
    """Return an error as a problem of a case; `action` is for errors that do not say what to do.

    `images` are those of the case: a file inside one that is a folder is named together with it.
    """
    if isinstance(error, FileError):
        folder = next((image for image in images if image in error.path.parents), error.path)
        name = error.path.relative_to(folder.parent).as_posix()
        return Problem(case, f"{name} {error.problem}", error.action, transient=error.transient, file=str(error.path))
    return Problem(case, error.problem.removeprefix(f"case {case}: "), error.action or action)


def failure_of(case: str, error: Exception, images: Sequence[Path] = ()) -> Problem:
    """Return any of `CASE_FAILURES` as a problem of a case; `images` as in `problem_of`."""
    if isinstance(error, InputError):
        return problem_of(case, error, images=images)
    if isinstance(error, SegfitError):
        return Problem(case, error.problem.removeprefix(f"case {case}: "), error.action, code="failed")
    if isinstance(error, MemoryError):
        return Problem(case, "does not fit into memory", "free memory or use a larger machine", code="out_of_memory")
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        problem = f"{where}{error.strerror or error}"
        return Problem(case, problem, "free space or correct permissions, then rerun", code="file_system")
    reason = " ".join(str(error).split()) or type(error).__name__
    return Problem(case, f"could not be computed ({reason})", "report this if the image is sound", code="failed")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises on missing, truncated or foreign bytes into a `FileError`."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except FileNotFoundError:
        raise FileError(path, *absence(path, "add the file or correct its name")) from None
    except Exception as error:
        raise FileError(path, f"cannot be read ({reason_of(error)})", COPY_AGAIN) from error


def absence(path: Path, action: str) -> tuple[str, str]:
    """Return why there is no file or folder at a path, and what to do: `action` where nothing more is known."""
    try:
        mode, target = path.lstat().st_mode, str(path.readlink()) if path.is_symlink() else ""
    except OSError:
        return "is missing", action
    if "annex/objects" in target:
        return "was not fetched: it is a link into git-annex", f"run datalad get {path}, or git annex get"
    if target:
        return f"is a link to {target}, which is missing", "restore that file or the link"
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return "is missing", action
    return "is a pipe, socket or device, not a file", "copy the image into a file"


def foreign(
    path: Path, expected: str, files: OpenFiles | None = None, action: str = "export it again or correct its ending"
) -> FileError:
    """Return what is wrong with a file that does not begin as `expected`, such as "a TIFF file".

    `action` is for a file of which it is not known what it is instead.
    """
    with reading(path), opened(path, files) as handle:
        return foreign_start(path, expected, handle.read(_LONGEST_START), action)


def foreign_start(path: Path, expected: str, start: bytes, action: str) -> FileError:
    """Return what is wrong with a file that holds other bytes than `expected`; `start` are its first ones, unpacked."""
    if not start:
        return FileError(path, "is empty", COPY_AGAIN)
    for mark, (what, known_action) in _KNOWN_STARTS.items():
        if start.startswith(mark):
            return FileError(path, f"{what}, not {expected}" if " not " not in what else what, known_action)
    return FileError(path, f"is not {expected}", action)


def require_room(path: Path, shape: Sequence[int], num_bytes: int) -> None:
    """Raise `FileError`, before any is taken, if a file declares more memory of voxels than it can hold or is free."""
    size = path.stat().st_size
    if num_bytes > _LARGE_BYTES and num_bytes > _MOST_PACKED * size:
        sizes = " x ".join(map(str, shape))
        problem = f"declares {sizes} pixels in its header but has {size} bytes; the header is corrupt"
        raise FileError(path, problem, COPY_AGAIN)
    require_memory(path, shape, num_bytes)


def require_memory(path: Path, shape: Sequence[int], num_bytes: int) -> None:
    """Raise `FileError` if the voxels of a file take more memory than is free, before they get it."""
    free = free_bytes() if num_bytes > _LARGE_BYTES else None
    if free is not None and _READING * num_bytes > free:
        sizes, needed = " x ".join(map(str, shape)), gigabytes(min(_READING * num_bytes, _MOST_BYTES) / 2**30)
        problem = (
            f"declares {sizes} voxels in its header; reading them takes {needed}, {gigabytes(free / 2**30)} are free"
        )
        action = "correct its header if it is wrong; else free memory, crop it or use a larger machine"
        raise FileError(path, problem, action, transient=True)


def optional_package(path: Path, module: str, package: str, extra: str) -> Any:
    """Import a package that only some formats need; `FileError` naming the extra where it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        raise FileError(path, f"needs {package}, which is not installed", f'pip install "segfit[{extra}]"') from None


def mm_per_unit(unit: str) -> float | None:
    """Return how many millimetres a named unit of length has, None for a name that is none."""
    name = unit.strip().lower().replace("metre", "meter")
    return _MM_PER_UNIT.get(name)


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """Voxels with their grid.

    Parameters
    ----------
    array : (c, z, y, x) or (c, y, x); dtype as read, float32 after `read_case`; label maps have one channel
    grid : geometry of the spatial axes, in the order of the array
    """

    array: NDArray[Any]
    grid: Grid

    def __post_init__(self) -> None:
        given: tuple[Any, Any] = self.array, self.grid
        if not isinstance(given[0], np.ndarray) or not isinstance(given[1], Grid):
            got = " and ".join(type(one).__name__ for one in given)
            raise InputError(f"an image is an array with its Grid, got {got}", "give numpy.asarray(image)")
        if self.array.shape[1:] != self.grid.shape:
            raise ValueError(f"array with spatial shape {self.array.shape[1:]} does not fit its grid {self.grid.shape}")

    def __repr__(self) -> str:
        return f"Image({voxels_in_words(self.array, self.grid)})"

    def reoriented(self, axes: AxisMap) -> Image:
        """Return the image with its axes reordered and flipped; its affine follows."""
        if axes.is_identity:
            return self
        return Image(np.ascontiguousarray(axes.apply(self.array)), axes.apply_grid(self.grid))

    def turned_to(self, grid: Grid) -> Image:
        """Return the image with its axes ordered as in `grid` if that lays it on `grid` (`Grid.turn`), else itself."""
        axes = None if not grid.mismatch(self.grid) else grid.turn(self.grid)
        return self if axes is None else self.reoriented(axes)


@dataclass(frozen=True, slots=True, eq=False)
class LabelMap:
    """Label values with their grid, as they are written to a file.

    Parameters
    ----------
    array : (z, y, x) or (y, x), integer; the values that files hold
    grid : as read from the source file; outputs of the same format get its geometry back exactly
    scheme : what the values mean, where that is known
    source : the files of the image that it belongs to
    """

    array: NDArray[np.integer[Any]]
    grid: Grid
    scheme: LabelScheme | None = None
    source: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.array.shape != self.grid.shape:
            raise ValueError(f"label map of shape {self.array.shape} does not fit its grid {self.grid.shape}")

    def __repr__(self) -> str:
        return f"LabelMap({voxels_in_words(self.array, self.grid)})"


def voxels_in_words(array: NDArray[Any], grid: Grid) -> str:
    """Return ``1x40x56x40 float32, 3x0.78x0.78 mm``."""
    return f"{by_axis(array.shape)} {array.dtype}, {'x'.join(f'{value:.4g}' for value in grid.spacing_mm)} mm"
