"""TIFF: pictures (grey, RGB, named channels) and 3D stacks with their spacing.

Spacing file, as in the reference: image ``CASE_0000.tif`` and label ``CASE.tif`` share ``CASE.json`` with
``{"spacing": [z, y, x]}`` in array order and mm. Without one, a stack's own calibration counts (OME-XML, ImageJ).
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from segfit.errors import InputError
from segfit.files import read_json, write_bytes, write_json
from segfit.geometry import Grid
from segfit.images.image import FileError, Image, mm_per_unit, reading

__all__ = ["read", "read_grid", "spacing_file", "write"]

_CHANNEL_AXES = ("S", "C")  # tifffile's letters for samples per pixel and channels


def read(path: Path) -> Image:
    """Read a picture as (c, y, x) or a stack as (c, z, y, x); dtype as stored.

    Colours (samples per pixel) and named channel axes become channels; any other third axis is z; axes of length 1
    other than y and x are dropped. Colour tables (often a display setting) are not applied. Raises `FileError` for more
    axes than that.
    """
    with _opened(path) as file:
        series = file.series[0]
        try:
            pixels = np.asarray(series.asarray())
        except ValueError as error:  # a compression that tifffile leaves to another package (LZW, JPEG, fax)
            if "imagecodecs" not in str(error) or series.axes[0] in _CHANNEL_AXES:
                raise
            pixels = _decode_by_pillow(path).reshape(series.shape)
        channels, spatial = _axes(path, series)
        grid = _grid(path, file, tuple(series.shape[axis] for axis in spatial))
    order = [*channels, *spatial]
    dropped = tuple(axis for axis in range(pixels.ndim) if axis not in order)
    array = pixels.transpose(*dropped, *order).reshape(
        math.prod(pixels.shape[axis] for axis in channels), *[pixels.shape[axis] for axis in spatial]
    )
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return Image(array.astype(np.uint8) if array.dtype == bool else array, grid)


def read_grid(path: Path) -> Grid:
    """Read the size and the spacing alone."""
    with _opened(path) as file:
        series = file.series[0]
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


def spacing_file(path: Path) -> Path:
    """Return where the spacing of a stack is looked for: ``CASE.json`` for ``CASE_0000.tif`` and ``CASE.tif``."""
    by_case = path.with_name(re.sub(r"_\d{4}$", "", path.stem) + ".json")
    return by_case if by_case.exists() else path.with_suffix(".json")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import tifffile

    with reading(path):
        if path.stat().st_size == 0:
            raise FileError(path, "is empty", "copy or export it again, or remove the case")
        if _pages_are_lost(path):
            raise FileError(path, "is truncated (pages are missing)", "copy or export it again")
        with tifffile.TiffFile(path) as file:
            yield file


def _pages_are_lost(path: Path) -> bool:
    """Return whether the chain of pages leads out of the file: decoders then hand out the pages before the cut.

    TIFF 6.0, section 2: each page directory ends with the offset of the next; BigTIFF has wider fields.
    """
    with path.open("rb") as handle:
        head = handle.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None:
            return False  # no TIFF at all: the decoder says so
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


def _decode_by_pillow(path: Path) -> NDArray[Any]:
    from PIL import ImageSequence
    from PIL.TiffImagePlugin import TiffImageFile

    with TiffImageFile(path) as file:
        return np.stack([np.array(page) for page in ImageSequence.Iterator(file)])


def _grid(path: Path, file: Any, shape: tuple[int, ...]) -> Grid:
    """Return the grid of a stack: spacing from the file beside it, or of its own, or 1 mm where nothing is said."""
    if len(shape) == 2:
        return Grid(shape, (1.0, 1.0))
    source = spacing_file(path)
    if not source.exists():
        return Grid(shape, _ome_spacing(file) or _imagej_spacing(file) or (1.0, 1.0, 1.0))
    try:
        content = read_json(source)
    except InputError as error:
        raise FileError(source, "is not valid JSON", 'write {"spacing": [z, y, x]} in mm') from error
    spacing = content.get("spacing") if isinstance(content, dict) else None
    numbers = isinstance(spacing, list) and len(spacing) == 3 and all(type(v) in (int, float) for v in spacing)
    if not numbers or not all(math.isfinite(v) and v > 0 for v in spacing):  # type: ignore[union-attr]
        raise FileError(
            source, f'must hold {{"spacing": [z, y, x]}} with positive numbers, got {content!r}', "correct it"
        )
    return Grid(shape, tuple(float(v) for v in spacing))  # type: ignore[union-attr]


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
