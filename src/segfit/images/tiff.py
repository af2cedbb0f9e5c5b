"""TIFF: 2D images (grey, RGB, named channels) and 3D stacks with their spacing.

Spacing file, as in nnU-Net: image ``CASE_0000.tif`` and label ``CASE.tif`` share ``CASE.json`` with
``{"spacing": [z, y, x]}`` in array order and mm. Without one, a stack's own calibration counts (OME-XML, ImageJ).
"""

from __future__ import annotations

import io
import logging
import math
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import get_ident
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from segfit.errors import InputError
from segfit.files import read_json, write_bytes, write_json
from segfit.geometry import Grid
from segfit.images import libtiff
from segfit.images.image import (
    COPY_AGAIN,
    FileError,
    Image,
    Regions,
    Remark,
    foreign,
    mm_per_unit,
    reading,
    require_room,
)
from segfit.images.open_files import OpenFiles, opened

__all__ = ["read", "read_grid", "read_label", "regions", "remarks", "spacing_files", "write"]

_CHANNEL_AXES = ("S", "C")  # tifffile's letters for samples per pixel and channels
# Values of TIFF tags, TIFF 6.0 sections 8 and 22; compression 34892 is lossy JPEG of DNG.
_MIN_IS_WHITE, _PALETTE, _JPEGS = 0, 3, (6, 7, 34892)
_ORIENTATION, _UPRIGHT = 274, 1
_SHOWN_LETTERS = 80  # of a spacing file in a message
_LARGEST_STRIP = 2**24  # pixels of one that is unpacked for every part of it that is read
_COMPRESSIONS_AT_HAND = (1, 8, 32946)  # none and Deflate; others tifffile leaves to a package of its own


def read(path: Path, files: OpenFiles | None = None) -> Image:
    """Read a picture as (c, y, x) or a stack as (c, z, y, x); dtype as stored, black and white as 0 and 1.

    Colours (samples per pixel) and named channel axes become channels; any other third axis is z; axes of length 1
    other than y and x are dropped. Colour tables (often a display setting) are not applied, and grey values that store
    white as 0 are not turned round. Raises `FileError` for more axes than that, several images and complex values.
    """
    with _opened(path, files) as file:
        series = _series(path, file)
        pixels = _pixels(path, series)
        channels, spatial = _axes(path, series)
        grid = _grid(path, file, tuple(series.shape[axis] for axis in spatial))
    order = [*channels, *spatial]
    dropped = tuple(axis for axis in range(pixels.ndim) if axis not in order)
    array = pixels.transpose(*dropped, *order).reshape(-1, *grid.shape)
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return Image(array.astype(np.uint8) if array.dtype == bool else array, grid)


def regions(path: Path) -> Regions | None:
    """Return a picture or stack as one that is read by region: by the tiles or strips that it is stored in.

    None where that cannot be done: pixels that another package has to decode, channels that are pages, pages of
    several kinds, strips of whole large pages, black and white.
    """
    with _opened(path, None) as file:
        series = _series(path, file, whole=False)
        channels, spatial = _axes(path, series)
        page, stacked = series.keyframe, spatial[:-2]
        plain = (
            int(page.compression) in _COMPRESSIONS_AT_HAND
            and series.dtype.kind != "b"
            and page.shape == tuple(series.shape[axis] for axis in (*spatial[-2:], *channels))
            and (not channels or page.planarconfig == 1)
            and len(series.pages) == (series.shape[stacked[0]] if stacked else 1)
            and not any(one is None for one in series.pages)
        )
        if not plain:
            return None
        grid = _grid(path, file, tuple(series.shape[axis] for axis in spatial))
        shape = (*grid.shape, math.prod(page.shape[2:]))
        height, width = _tile(page)
        chunk = (*(1 for _ in stacked), min(height, grid.shape[-2]), min(width, grid.shape[-1]))
        if series.dataoffset is not None:  # as in memory
            dtype, offset = page.dtype.newbyteorder(file.byteorder), series.dataoffset
            chunk = (*chunk[:-2], 1, chunk[-1])
            mapped = partial(_mapped, path, dtype, offset, shape)
            return Regions(grid, shape[-1], chunk, lambda box: _channels_first(mapped()[*box]))
    if math.prod(chunk) > _LARGEST_STRIP:
        return None
    return Regions(grid, shape[-1], chunk, lambda box: _channels_first(_decoded(path, grid, box)))


def _tile(page: Any) -> tuple[int, int]:
    """Return the height and width of the tiles of a page, or of its strips."""
    return (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)


def _channels_first(pixels: NDArray[Any]) -> NDArray[Any]:
    array = np.moveaxis(pixels, -1, 0)
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def _mapped(path: Path, dtype: np.dtype[Any], offset: int, shape: tuple[int, ...]) -> NDArray[Any]:
    with reading(path):
        return np.memmap(path, dtype, "r", offset, shape)


def _decoded(path: Path, grid: Grid, box: Sequence[slice]) -> NDArray[Any]:
    """Return the pixels (*box, channels) of a file with tiles or strips."""
    *slices, rows, columns = (range(*part.indices(n)) for part, n in zip(box, grid.shape, strict=True))
    with _opened(path, None) as file:
        series = _series(path, file, whole=False)
        page = series.keyframe
        height, width = _tile(page)
        across = math.ceil(page.imagewidth / width)
        result = np.zeros((*map(len, slices), len(rows), len(columns), math.prod(page.shape[2:])), page.dtype)
        for layer, pixels in zip(*slices or ((0,),), result if slices else (result,), strict=True):
            one = series.pages[layer]
            for down in range(rows.start // height, (rows.stop - 1) // height + 1):
                for right in range(columns.start // width, (columns.stop - 1) // width + 1):
                    number = down * across + right
                    file.filehandle.seek(one.dataoffsets[number])
                    packed = file.filehandle.read(one.databytecounts[number])
                    part, _, _ = page.decode(packed or None, number)
                    if part is not None:  # else never written: zeros
                        part = part.reshape(-1, *part.shape[-2:])
                        _lay(part, pixels, down * height - rows.start, right * width - columns.start)
    return result


def _lay(part: NDArray[Any], pixels: NDArray[Any], row: int, column: int) -> None:
    """Copy a tile whose first pixel lies at a row and column, inside or outside, into the pixels that it covers."""
    target = tuple(
        slice(max(0, first), max(0, min(first + size, most)))
        for first, size, most in zip((row, column), part.shape, pixels.shape, strict=False)
    )
    source = tuple(slice(one.start - first, one.stop - first) for one, first in zip(target, (row, column), strict=True))
    pixels[target] = part[source]


def read_label(path: Path, files: OpenFiles | None = None) -> Image:
    """Read a label map as `read` does; `FileError` where JPEG has changed its values."""
    with _opened(path, files) as file:
        if any(int(page.compression) in _JPEGS for page in file.series[0].pages[:1]):
            action = "export the labels again without compression or with LZW or Deflate"
            raise FileError(path, "is JPEG-compressed, which changes label values", action)
    return read(path, files)


def remarks(path: Path, files: OpenFiles | None = None) -> tuple[Remark, ...]:
    """Return what an image says that is not followed here: how it is turned, its colour table, smaller images."""
    found: list[Remark] = []
    with _heard() as messages, _opened(path, files) as file:
        first = file.series[0]
        page = first.pages[0]
        tag = page.tags.get(_ORIENTATION)
        if tag is not None and tag.value not in (0, _UPRIGHT):
            problem = "is rotated or mirrored by its Orientation tag, which is ignored"
            found.append(Remark(problem, "save it upright if its label was drawn on the displayed image"))
        if page.photometric == _MIN_IS_WHITE and page.bitspersample > 1:
            problem = "stores white as 0 (photometric MinIsWhite) and is used as stored"
            found.append(Remark(problem, "save it with black as 0 if the others are"))
        table = page.colormap
        if page.photometric == _PALETTE and table is not None and (table != table[:1]).any():
            problem = "has a colour map, which is ignored: its values are indices"
            found.append(Remark(problem, "save it as RGB if its colours matter"))
        if len(file.series) > 1:
            sizes = ", ".join("x".join(map(str, other.shape)) for other in file.series[1:])
            problem = f"has smaller images too ({sizes}), which are ignored"
            found.append(Remark(problem, "save them as separate files unless they are previews"))
    if messages:
        problem = f"has parts that cannot be read ({_in_short(messages[0])})"
        found.append(Remark(problem, "open it in another program; export it again if something is missing"))
    return tuple(found)


class _Listener(logging.Handler):
    """Keeps what is logged by this thread."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self._thread = get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self.messages.append(record.getMessage())


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Collect what tifffile logs of a file, which nobody could relate to it on stderr."""
    listener, logger = _Listener(), logging.getLogger("tifffile")
    logger.addHandler(listener)
    try:
        yield listener.messages
    finally:
        logger.removeHandler(listener)


def _in_short(message: str) -> str:
    """Return a message of tifffile without its names for places in the file."""
    _, _, inner = message.partition(" raised TiffFileError('")
    text = re.sub(r"<tifffile\.TiffTag (\d+)[^>]*>", r"tag \1:", inner.removesuffix("')") or message)
    return " ".join(re.sub(r"<[^>]*>|, raised .*", "", text).split())


def read_grid(path: Path, files: OpenFiles | None = None) -> Grid:
    """Read the size and the spacing alone."""
    with _opened(path, files) as file:
        series = _series(path, file)
        _, spatial = _axes(path, series)
        return _grid(path, file, tuple(series.shape[axis] for axis in spatial))


def write(path: Path, array: NDArray[Any], grid: Grid) -> None:
    """Write a spatial array atomically, and the spacing file beside a 3D stack."""
    import tifffile

    buffer = io.BytesIO()
    axes = "ZYX"[-array.ndim :]
    tifffile.imwrite(buffer, array, photometric="minisblack", compression="zlib", metadata={"axes": axes})
    write_bytes(path, buffer.getvalue())
    if grid.ndim == 3:
        write_json(path.with_suffix(".json"), {"spacing": list(grid.spacing_mm)})


def spacing_files(path: Path) -> tuple[Path, Path]:
    """Return where the spacing of a stack may be, the first one first: ``CASE.json`` for ``CASE_0000.tif``."""
    return path.with_name(re.sub(r"_\d{4}$", "", path.stem) + ".json"), path.with_suffix(".json")


@contextmanager
def _opened(path: Path, files: OpenFiles | None) -> Iterator[Any]:
    import tifffile

    with reading(path), opened(path, files) as handle, _heard():
        if handle.read(2) not in (b"II", b"MM"):
            raise foreign(path, "a TIFF file", files)
        handle.seek(0)
        if _pages_are_lost(handle):
            raise FileError(path, "is truncated (pages are missing)", "copy or export it again")
        handle.seek(0)
        with tifffile.TiffFile(handle) as file:
            if file.is_ome and "<!ENTITY" in file.ome_metadata:  # asked before anybody parses it
                raise FileError(path, "defines entities in its OME-XML", "export it again without them")
            yield file


def _pages_are_lost(handle: BinaryIO) -> bool:
    """Return whether the chain of pages leads out of the file: decoders then hand out the pages before the cut.

    TIFF 6.0, section 2: each page directory ends with the offset of the next; BigTIFF has wider fields.
    """
    head = handle.read(16)
    order = {b"II": "<", b"MM": ">"}[head[:2]]
    wide = head[2:4] in (b"+\0", b"\0+")  # version 43
    number, pointer, entry_bytes = ("Q", "Q", 20) if wide else ("H", "I", 12)
    (offset,) = struct.unpack_from(order + pointer, head, 8 if wide else 4)
    seen: set[int] = set()
    while offset and offset not in seen:
        seen.add(offset)
        handle.seek(offset)
        count = handle.read(struct.calcsize(number))
        if len(count) < struct.calcsize(number):
            return True
        handle.seek(struct.unpack(order + number, count)[0] * entry_bytes, 1)
        following = handle.read(struct.calcsize(pointer))
        if len(following) < struct.calcsize(pointer):
            return True
        (offset,) = struct.unpack(order + pointer, following)
    return False


def _axes(path: Path, series: Any) -> tuple[list[int], list[int]]:
    """Return which axes of a series hold channels (none or one) and which are spatial: (z,) y, x."""
    long = [i for i, size in enumerate(series.shape) if size > 1]
    channels = [i for i in long if series.axes[i] in _CHANNEL_AXES]
    slices = [i for i in long if series.axes[i] not in (*_CHANNEL_AXES, "Y", "X")]
    if len(channels) > 1 or len(slices) > 1:
        sizes = "x".join(map(str, series.shape))
        raise FileError(path, f"has the axes {series.axes} ({sizes})", "save one 3D stack per channel and time point")
    return channels, [*slices, series.axes.index("Y"), series.axes.index("X")]


def _series(path: Path, file: Any, *, whole: bool = True) -> Any:
    """Return the image of a file; `FileError` if there are several of its size, or no real numbers.

    Also, where it is read as a `whole`, if there is no room for it. Smaller ones are previews of the first, as scanners
    add them.
    """
    first, *others = file.series
    if any(math.prod(other.shape) >= math.prod(first.shape) for other in others):
        sizes = ", ".join("x".join(map(str, one.shape)) for one in file.series)
        raise FileError(path, f"holds {len(file.series)} images ({sizes})", "save the one that is meant alone")
    if first.dtype is None or first.dtype.kind not in "biuf":
        raise FileError(path, f"holds values of type {first.dtype}", "export real numbers")
    if whole:
        require_room(path, first.shape, first.nbytes)
    return first


def _pixels(path: Path, series: Any) -> NDArray[Any]:
    """Decode a series as stored; bits so that 1 is white, whatever decodes them."""
    page = series.pages[0]
    white_is_zero = page.photometric == _MIN_IS_WHITE
    try:
        pixels: NDArray[Any] = np.asarray(series.asarray())
    except (ValueError, ImportError, KeyError) as error:
        if int(page.compression) in _COMPRESSIONS_AT_HAND and "imagecodecs" not in str(error):
            raise
        pixels = _decode_by_pillow(path, series)
        return 255 - pixels if white_is_zero and pixels.dtype == np.uint8 else pixels  # Pillow turned it round
    return ~pixels if white_is_zero and pixels.dtype == bool else pixels


def _decode_by_pillow(path: Path, series: Any) -> NDArray[Any]:
    """Decode what tifffile leaves to another package; Pillow knows LZW, JPEG, fax and Zstandard."""
    from PIL.Image import DecompressionBombError
    from PIL.TiffImagePlugin import TiffImageFile

    compression = series.pages[0].compression
    name = getattr(compression, "name", f"compression {compression}")
    action = "save it with Deflate or none, or pip install imagecodecs"
    try:
        if series.axes[0] in _CHANNEL_AXES:
            raise FileError(path, f"is compressed with {name}, channel by channel, which is not supported", action)
        pages = []
        with libtiff.errors() as heard, TiffImageFile(path) as file:
            try:
                for page in series.pages:
                    file.seek(page.index)
                    pages.append(np.array(file))
            except OSError:
                if not heard:
                    raise
        if heard:
            raise FileError(path, f"is damaged: its compressed pixels cannot be unpacked ({heard[0]})", COPY_AGAIN)
        return np.stack(pages).reshape(series.shape)
    except DecompressionBombError:
        raise FileError(path, f"is compressed with {name} and too large to decompress", action) from None
    except (KeyError, SyntaxError):  # how Pillow says that it does not know a compression
        raise FileError(path, f"is compressed with {name}, which is not supported", action) from None


def _grid(path: Path, file: Any, shape: tuple[int, ...]) -> Grid:
    """Return the grid of a stack: spacing from the file beside it, or of its own, or 1 mm where nothing is said."""
    if len(shape) == 2:
        return Grid(shape, (1.0, 1.0), spacing_known=False)
    by_case, beside = spacing_files(path)
    source = by_case if by_case.exists() or by_case.is_symlink() else beside
    if not source.exists() and not source.is_symlink():
        own = _ome_spacing(file) or _imagej_spacing(file)
        return Grid(shape, own or (1.0, 1.0, 1.0), spacing_known=own is not None)
    try:
        content = read_json(source)
    except InputError as error:
        raise FileError(source, "is not valid JSON", 'write {"spacing": [z, y, x]} in mm') from error
    listed = content.get("spacing") if isinstance(content, dict) else None
    numbers = isinstance(listed, list) and all(type(v) is float or (type(v) is int and abs(v) < 2**63) for v in listed)
    spacing = _usable([float(v) for v in listed]) if numbers and listed is not None else None
    if spacing is None:
        came = repr(content)
        came = came if len(came) <= _SHOWN_LETTERS else f"{came[:_SHOWN_LETTERS]}..."
        raise FileError(source, f'must hold {{"spacing": [z, y, x]}} with positive numbers, got {came}', "correct it")
    return Grid(shape, spacing)


def _ome_spacing(file: Any) -> tuple[float, float, float] | None:
    """Return (z, y, x) in mm as OME-XML has it, None unless all three are given.

    OME schema 2016-06, Pixels: PhysicalSizeX and so on, in PhysicalSizeXUnit, which is µm where it is absent.
    """
    if not file.is_ome:
        return None
    try:
        root = ElementTree.fromstring(file.ome_metadata)
    except ElementTree.ParseError:
        return None
    pixels = next((element for element in root.iter() if element.tag.rpartition("}")[2] == "Pixels"), None)
    if pixels is None:
        return None
    sizes = [pixels.get(f"PhysicalSize{axis}") for axis in "ZYX"]
    units = [mm_per_unit(pixels.get(f"PhysicalSize{axis}Unit", "µm")) for axis in "ZYX"]
    return _usable([size and unit and float(size) * unit for size, unit in zip(sizes, units, strict=True)])


def _imagej_spacing(file: Any) -> tuple[float, float, float] | None:
    """Return (z, y, x) in mm as ImageJ has it, None unless all three are given.

    ImageJ writes ``spacing`` (z) and ``unit`` into its description, and pixels per unit into the resolution tags.
    Units that are no length (pixel) count as mm, so that the proportions are kept.
    """
    if not file.is_imagej:
        return None
    about, tags = file.imagej_metadata or {}, file.pages[0].tags
    unit = str(about.get("unit", "")).replace("\\u00B5", "µ").replace("\\u00b5", "µ")
    per_unit = [tags[name].value if name in tags else (0, 1) for name in ("YResolution", "XResolution")]
    sizes = [about.get("spacing"), *(below / above if above else None for above, below in per_unit)]
    return _usable([size and abs(float(size)) * (mm_per_unit(unit) or 1.0) for size in sizes])


def _usable(sizes: Sequence[float | str | None]) -> tuple[float, float, float] | None:
    numbers = [size for size in sizes if isinstance(size, float) and math.isfinite(size) and size > 0]
    return (numbers[0], numbers[1], numbers[2]) if len(numbers) == 3 else None
