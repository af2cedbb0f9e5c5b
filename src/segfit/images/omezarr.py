"""OME-Zarr images (extra ``zarr``): a folder of chunks with metadata, versions 0.4 and 0.5, first resolution level.

Metadata keys: OME-NGFF specification, https://ngff.openmicroscopy.org (multiscales, axes, coordinateTransformations).
The format knows spacing but no patient axes, so grids have no affine. A chunk that is absent means empty space, as the
format has it: chunks lost in copying cannot be told from those.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.files import new_folder, require_regular
from segfit.geometry import Grid
from segfit.images.image import (
    FileError,
    Image,
    Regions,
    Remark,
    foreign,
    mm_per_unit,
    optional_package,
    reading,
    require_memory,
)
from segfit.images.open_files import OpenFiles
from segfit.text import numbers

__all__ = ["files", "read", "read_grid", "regions", "remarks", "translated", "write"]

_VERSION = "0.4"  # of what is written: the one that most programs read
_CHUNK_VOXELS = (64, 256, 256)  # of what is written; 4 MiB of uint8
_MOST_CHUNKS = 10**6  # of a part that is read; each takes a tenth of a millisecond and more (assumption)
_METADATA = (".zgroup", ".zattrs", ".zarray", "zarr.json")
_CODECS = {
    *("adler32", "blosc", "bytes", "bz2", "crc32", "crc32c", "delta", "endian", "fixedscaleoffset", "fletcher32"),
    *("gzip", "lz4", "lzma", "packbits", "quantize", "sharding_indexed", "shuffle", "transpose", "zlib", "zstd"),
}
"""Codecs of numbers; others (pickle, for one) can run code that is written in a file."""
_NUMBERS = re.compile(r"[<>|]?[biufc]\d+|bool|u?int\d+|r?float\d+|complex\d+")  # types, as versions 2 and 3 call them
_TYPE_BY_NAME = {"t": "time", "c": "channel"}  # where an axis does not say; others are in space
_MARK = b"OME-Zarr "  # our `Grid.header`: the placement as JSON behind it


def read(path: Path, region: Sequence[slice] | None = None) -> Image:
    """Read the first resolution level as (c, z, y, x), or (c, y, x) if it has one plane; dtype as stored.

    `region` (one slice per spatial axis) reads the chunks it touches and no others. Raises `FileError` for folders that
    are no OME-Zarr image, several time points, damaged chunks, and where zarr is not installed.
    """
    level, whole = _open(path), region is None
    region = [slice(None)] * level.grid.ndim if region is None else list(region)
    index: list[int | slice] = [0] * level.array.ndim
    for axis, part in zip(level.spatial, region, strict=True):
        index[axis] = part
    if level.channel is not None:
        index[level.channel] = slice(None)
    with reading(path):
        _require_bounds(path, level.array, index)
        for chunk in (path / level.array.path).rglob("*") if whole else ():
            if chunk.exists():
                require_regular(chunk)
        voxels = np.asarray(level.array[tuple(index)])
    kept = [axis for axis, part in enumerate(index) if isinstance(part, slice)]  # in the order of the file
    wanted = [*([] if level.channel is None else [level.channel]), *level.spatial]
    voxels = voxels.transpose([kept.index(axis) for axis in wanted])
    if level.channel is None:
        voxels = voxels[None]
    dtype = np.dtype(np.uint8) if voxels.dtype == bool else voxels.dtype.newbyteorder("=")
    if dtype.kind not in "iuf":
        raise FileError(path, f"holds values of type {dtype}", "export real numbers")
    shape = voxels.shape[1:]
    if 0 in shape:
        raise ValueError(f"the region {region} of {path} holds no voxels")
    return Image(np.ascontiguousarray(voxels, dtype=dtype), replace(level.grid, shape=shape))


def regions(path: Path) -> Regions:
    """Return the image as one that is read by region; raises `FileError` as `read` does."""
    level = _open(path)
    channels = 1 if level.channel is None else level.array.shape[level.channel]
    chunk = tuple(level.array.chunks[axis] for axis in level.spatial)
    return Regions(level.grid, channels, chunk, lambda box: read(path, box).array)


def files(path: Path, _: OpenFiles | None = None) -> tuple[Path, ...]:
    """Return all files of a folder, in order."""
    return tuple(sorted(part for part in path.rglob("*") if part.is_file()))


def read_grid(path: Path) -> Grid:
    """Read the metadata alone; raises `FileError` as `read` does."""
    return _open(path).grid


def remarks(path: Path) -> tuple[Remark, ...]:
    """Return what an image does not say or lacks: its scale, the unit of that, chunks."""
    level = _open(path)
    found: list[Remark] = []
    if not level.grid.spacing_known:
        problem = f"has no scale; voxels of {numbers(level.grid.spacing_mm)} mm are assumed"
        found.append(Remark(problem, 'write its true "scale" if that is wrong'))
    elif not level.with_unit:
        found.append(Remark('has no unit for its "scale"; mm is assumed', 'write the "unit" of its axes'))
    with reading(path):
        chunks = level.array.nchunks
        stored = level.array.nchunks_initialized if chunks <= _MOST_CHUNKS else chunks
        empty = level.array.fill_value
    if stored < chunks:
        problem = f"has missing chunks, which are read as {empty or 0}"
        found.append(Remark(problem, "copy it again if they were lost; nothing if it is empty there"))
    if level.images > 1:
        problem = f"has {level.images} images (multiscales); the first is used"
        found.append(Remark(problem, "give each its own folder if another is meant"))
    return tuple(found)


def translated(grid: Grid, other: Grid) -> str:
    """Say how far `other` lies from a grid by their translations, ``(z, y, x) mm``; nothing below half a voxel.

    Nothing either for grids that are not both of OME-Zarr images of as many axes, which alone have translations.
    """
    headers = [one.header for one in (grid, other) if one.header is not None and one.header.startswith(_MARK)]
    if len(headers) < 2 or grid.ndim != other.ndim:
        return ""
    placed = [json.loads(header[len(_MARK) :]) for header in headers]
    units = [[mm_per_unit(str(axis.get("unit", "mm"))) or 1.0 for axis in one["axes"]] for one in placed]
    starts = [np.array(one["translation"]) * unit for one, unit in zip(placed, units, strict=True)]
    apart = starts[1] - starts[0]
    return f"{numbers(apart.tolist())} mm away" if (np.abs(apart) > np.array(grid.spacing_mm) / 2).any() else ""


def write(path: Path, array: NDArray[Any], grid: Grid) -> None:
    """Write a spatial array as a folder with one resolution level; it appears whole and replaces what was there.

    If `grid` comes from an OME-Zarr image, its axes, scale and translation are written back as they were.
    """
    zarr = _package(path)
    axes: list[dict[str, str]] = [{"name": n, "type": "space", "unit": "millimeter"} for n in "zyx"[-grid.ndim :]]
    placement = {"axes": axes, "scale": list(grid.spacing_mm), "translation": [0.0] * grid.ndim}
    if grid.header is not None and grid.header.startswith(_MARK):
        placement = json.loads(grid.header[len(_MARK) :])
    transformations = [{"type": name, name: placement[name]} for name in ("scale", "translation")]
    multiscale = {
        "version": _VERSION,
        "axes": placement["axes"],
        "datasets": [{"path": "0", "coordinateTransformations": transformations}],
    }
    with new_folder(path) as folder:
        group = zarr.create_group(str(folder), zarr_format=2, overwrite=True, attributes={"multiscales": [multiscale]})
        group.create_array(
            "0",
            data=array,
            chunks=tuple(map(min, _CHUNK_VOXELS[-array.ndim :], array.shape)),
            chunk_key_encoding={"name": "v2", "separator": "/"},
        )


@dataclass(frozen=True, slots=True)
class _Level:
    """The array of one resolution, nothing of it read yet."""

    array: Any  # zarr.Array
    channel: int | None  # its axis of channels
    spatial: tuple[int, ...]  # its axes (z,) y, x
    grid: Grid
    with_unit: bool  # whether they say the unit of every axis in space
    images: int  # how many the metadata describe


def _require_bounds(path: Path, array: Any, index: Sequence[int | slice]) -> None:
    """Raise `FileError` if a part of an array has more chunks than can be looked up, or takes more memory than is free.

    Nothing on disk bounds what the metadata declare: chunks that are absent are empty.
    """
    sizes = [len(range(n)[part]) if isinstance(part, slice) else 1 for n, part in zip(array.shape, index, strict=True)]
    chunks = math.prod(math.ceil(size / chunk) for size, chunk in zip(sizes, array.chunks, strict=True))
    if chunks > _MOST_CHUNKS:
        raise _fault(path, f"declares {chunks} chunks of {math.prod(array.chunks)} voxels")
    for shape in (sizes, array.chunks):
        require_memory(path, shape, math.prod(shape) * array.dtype.itemsize)


def _package(path: Path) -> Any:
    return optional_package(path, "zarr", "zarr", "zarr")


def _fault(path: Path, problem: str) -> FileError:
    return FileError(path, problem, "export it again as OME-Zarr 0.4 or 0.5")


def _open(path: Path) -> _Level:
    zarr = _package(path)
    with reading(path), _legible(path):
        if not path.exists():
            raise FileNotFoundError(path)
        if path.is_file():
            raise foreign(path, "a folder, as OME-Zarr is")
        for name in _METADATA:
            if (path / name).exists():
                require_regular(path / name)
        try:
            group = zarr.open_group(str(path), mode="r", use_consolidated=False)  # what is checked is what is read
        except (FileNotFoundError, NotADirectoryError):
            raise _fault(path, "is not a Zarr group") from None
        multiscales = _multiscales(path, dict(group.attrs))
        multiscale, dataset = _first(path, multiscales)
        name = str(dataset.get("path"))
        if ".." not in Path(name).parts:
            _require_numbers(path, name)
        if ".." in Path(name).parts or name not in group:
            raise FileError(path, f"lacks its resolution level {name!r}", "copy or export it again")
        array = group[name]
        if not hasattr(array, "shape"):
            raise _fault(path, f"has no array at {name!r}")
        return _level(path, array, multiscale, dataset, len(multiscales))


def _require_numbers(path: Path, name: str) -> None:
    """Raise `FileError` unless an array holds numbers, packed by known codecs; asked before its codecs are made."""
    for file in (path / name / ".zarray", path / name / "zarr.json"):
        if not file.exists():
            continue
        require_regular(file)
        metadata = json.loads(file.read_bytes())
        metadata = metadata if isinstance(metadata, dict) else {}
        dtype = metadata.get("dtype", metadata.get("data_type", "|b1"))
        if not isinstance(dtype, str) or not _NUMBERS.fullmatch(dtype):
            raise FileError(path, f"holds values of type {dtype}", "export real numbers")
        for codec in _codecs(metadata):
            if codec.removeprefix("numcodecs.") not in _CODECS:
                raise FileError(path, f"is packed by the unknown codec {codec!r}", "export it with zstd, blosc or gzip")


def _codecs(metadata: object) -> Iterator[str]:
    """Yield the names of all codecs in the metadata of an array, those inside shards among them."""
    if not isinstance(metadata, Mapping):
        return
    for key in ("compressor", "filters", "codecs", "index_codecs", "configuration"):
        found = metadata.get(key)
        for item in found if isinstance(found, list) else [found]:
            if isinstance(item, Mapping) and key != "configuration":
                yield str(item.get("id", item.get("name"))).lower()
            yield from _codecs(item)


def _multiscales(path: Path, attributes: Mapping[str, Any]) -> Sequence[Any]:
    """Return the descriptions of images."""
    described = attributes.get("ome", attributes)  # 0.5 has it one floor deeper
    described = described if isinstance(described, dict) else {}
    multiscales = described.get("multiscales")
    if isinstance(multiscales, list) and multiscales:
        return multiscales
    for key, what in (("plate", "images of a plate"), ("well", "images of a well"), ("labels", "label maps")):
        if key in described:
            inside = _first_inside(described[key])
            action = f"give the folder of one of them, such as {path.name}/{inside}"
            raise FileError(path, f"holds several {what}", action)
    if "bioformats2raw.layout" in described:
        raise FileError(path, "holds several images", f"give the folder of one of them, such as {path.name}/0")
    raise _fault(path, 'has no "multiscales" in its metadata')


@contextmanager
def _legible(path: Path) -> Iterator[None]:
    """Turn metadata that is not JSON into a `FileError`."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise FileError(path, f"has metadata that is not valid JSON ({error})", "copy or export it again") from None


def _first_inside(collection: object) -> str:
    """Return the folder of the first image of a plate, a well or a group of labels; "0" where that is not told."""
    if isinstance(collection, list) and collection and isinstance(collection[0], str):
        return collection[0]
    for key, inside in (("wells", "/0"), ("images", "")):
        listed = collection.get(key) if isinstance(collection, dict) else None
        if isinstance(listed, list) and listed and isinstance(listed[0], dict) and "path" in listed[0]:
            return f"{listed[0]['path']}{inside}"
    return "0"


def _first(path: Path, multiscales: Sequence[Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the description of the first image and of its first resolution level."""
    try:
        multiscale = multiscales[0]
        dataset = multiscale["datasets"][0]
        usable = all(isinstance(axis, dict) and "name" in axis for axis in multiscale["axes"])
    except (KeyError, IndexError, TypeError):
        usable = False
    if not usable:
        raise _fault(path, 'does not describe its "axes" and "datasets"')
    return multiscale, dataset


def _level(path: Path, array: Any, multiscale: Mapping[str, Any], dataset: Mapping[str, Any], images: int) -> _Level:
    axes: list[Mapping[str, Any]] = multiscale["axes"]
    if len(axes) != array.ndim:
        raise _fault(path, f"names {len(axes)} axes for an array of {array.ndim}")
    kinds = [str(axis.get("type") or _TYPE_BY_NAME.get(axis["name"], "space")) for axis in axes]
    channels = [number for number, kind in enumerate(kinds) if kind == "channel"]
    spatial = [number for number, kind in enumerate(kinds) if kind == "space"]
    for number, kind in enumerate(kinds):
        if kind not in ("channel", "space") and array.shape[number] != 1:
            what = "time points" if kind == "time" else f"steps along {axes[number]['name']}"
            raise FileError(path, f"has {array.shape[number]} {what}", "give each an image of its own")
    if len(channels) > 1 or len(spatial) not in (2, 3):
        found = ", ".join(str(axis["name"]) for axis in axes)
        raise _fault(path, f"has the axes {found}; expected are z, y, x or y, x, with channels or without")
    if 0 in array.shape:
        raise _fault(path, f"has no voxels (shape {array.shape})")
    names = [str(axes[number]["name"]) for number in spatial]
    if sorted(names) == sorted("zyx"[-len(names) :]):
        spatial.sort(key=lambda number: "zyx".index(axes[number]["name"]))
    if len(spatial) == 3 and array.shape[spatial[0]] == 1:
        spatial = spatial[1:]  # one plane is a picture, as in TIFF
    scale, translation = _transformations(path, array.ndim, multiscale, dataset)
    for other in multiscale["datasets"][1:]:
        coarser, _ = _transformations(path, array.ndim, multiscale, other)
        if coarser != scale and all(one <= first for one, first in zip(coarser, scale, strict=True)):
            raise _fault(path, "does not list its resolution levels from fine to coarse")
    spacing = tuple(scale[number] * _unit(path, axes[number]) for number in spatial)
    if not all(math.isfinite(s) and s > 0 for s in spacing):
        raise FileError(path, f"has the voxel size {spacing} mm (array order)", 'write its true "scale"')
    placement = {
        "axes": [axes[number] for number in spatial],
        "scale": [scale[number] for number in spatial],
        "translation": [translation[number] for number in spatial],
    }
    shape = tuple(array.shape[number] for number in spatial)
    scaled = any(
        entry.get("type") == "scale"
        for one in (dataset, multiscale)
        for entry in one.get("coordinateTransformations") or []
    )
    grid = Grid(shape, spacing, None, _MARK + json.dumps(placement).encode(), spacing_known=scaled)
    with_unit = all(axes[number].get("unit") for number in spatial)
    return _Level(array, channels[0] if channels else None, tuple(spatial), grid, with_unit, images)


def _unit(path: Path, axis: Mapping[str, Any]) -> float:
    """Return the millimetres of an axis's unit; without a unit, numbers are taken as mm."""
    unit = axis.get("unit")
    factor = 1.0 if unit is None else mm_per_unit(str(unit))
    if factor is None:
        raise FileError(path, f"has the unit {unit!r} for its axis {axis['name']}", 'use "micrometer" or "millimeter"')
    return factor


def _transformations(
    path: Path, ndim: int, multiscale: Mapping[str, Any], dataset: Mapping[str, Any]
) -> tuple[list[float], list[float]]:
    """Return scale and translation per axis: those of the level, then those of the image."""
    scale, translation = [1.0] * ndim, [0.0] * ndim
    for source in (dataset, multiscale):
        for entry in source.get("coordinateTransformations") or []:
            kind = entry.get("type") if isinstance(entry, dict) else None
            if kind == "identity":
                continue
            values = entry.get(kind) if kind in ("scale", "translation") else None
            numbers = values if isinstance(values, list) else []
            if len(numbers) != ndim or not all(type(value) in (int, float) for value in numbers):
                problem = f"has the coordinate transformation {entry!r}, expected is a scale of {ndim} numbers"
                raise _fault(path, problem)
            if kind == "scale":
                scale = [float(a * b) for a, b in zip(scale, numbers, strict=True)]
                translation = [float(a * b) for a, b in zip(translation, numbers, strict=True)]
            else:
                translation = [float(a + b) for a, b in zip(translation, numbers, strict=True)]
    return scale, translation
