"""OME-Zarr: axes, units, versions, reading in part, and folders that are none."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from segfit.geometry import Grid
from segfit.images import omezarr
from segfit.images.formats import read_case, read_label, write_labels
from segfit.images.image import FileError, LabelMap

TYPES = {"t": "time", "c": "channel"}


def make(
    path: Path,
    array: np.ndarray,
    axes: str = "zyx",
    version: str = "0.4",
    change: Callable[[dict[str, Any]], Any] = lambda multiscale: None,
    unit: str | None = "micrometer",
    **kind: Any,
) -> Path:
    """Write an image of two levels with the scale 1, 2, 3, ... along its axes, by the zarr package alone."""
    places = [1.0 + number for number in range(array.ndim)]
    described = [
        {"name": name, "type": TYPES.get(name, "space")} | ({} if name in TYPES or unit is None else {"unit": unit})
        for name in axes
    ]
    levels = [
        {"path": str(n), "coordinateTransformations": [{"type": "scale", "scale": [p * 2**n for p in places]}]}
        for n in range(2)
    ]
    multiscale: dict[str, Any] = {"axes": described, "datasets": levels}
    attributes: dict[str, Any] = {"multiscales": [multiscale]}
    if version == "0.4":
        multiscale["version"] = version
    else:
        attributes = {"ome": {"version": version, "multiscales": [multiscale]}}
    change(multiscale)
    group = zarr.create_group(str(path), zarr_format=2 if version == "0.4" else 3, attributes=attributes)
    group.create_array("0", data=array, **kind)
    group.create_array("1", data=array[..., ::2, ::2], **kind)
    return path


def numbered(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize(
    ("axes", "shape", "expected", "spacing"),
    [
        ("zyx", (3, 4, 5), (1, 3, 4, 5), (1, 2, 3)),
        ("yx", (4, 5), (1, 4, 5), (1, 2)),
        ("cyx", (2, 4, 5), (2, 4, 5), (2, 3)),
        ("czyx", (2, 3, 4, 5), (2, 3, 4, 5), (2, 3, 4)),
        ("tczyx", (1, 2, 3, 4, 5), (2, 3, 4, 5), (3, 4, 5)),
        ("tczyx", (1, 2, 1, 4, 5), (2, 4, 5), (4, 5)),  # one plane is a picture
    ],
)
def test_axes_and_units(
    tmp_path: Path, version: str, axes: str, shape: tuple[int, ...], expected: tuple[int, ...], spacing: Any
) -> None:
    array = numbered(*shape)
    image = omezarr.read(make(tmp_path / "a.zarr", array, axes, version))
    assert image.array.dtype == np.uint16
    assert np.array_equal(image.array, array.reshape(expected))
    assert image.grid.spacing_mm == pytest.approx(np.array(spacing) / 1000)
    assert image.grid.affine is None
    assert omezarr.read_grid(tmp_path / "a.zarr") == image.grid


def test_axes_are_taken_by_kind_and_name(tmp_path: Path) -> None:
    array = numbered(3, 4, 5, 2)
    image = omezarr.read(make(tmp_path / "a.zarr", array, "xyzc"))
    assert np.array_equal(image.array, array.T)
    assert image.grid.spacing_mm == pytest.approx((0.003, 0.002, 0.001))


@pytest.mark.parametrize(("unit", "factor"), [("nanometer", 1e-6), ("millimeter", 1.0), ("meter", 1e3), (None, 1.0)])
def test_units_become_mm(tmp_path: Path, unit: str | None, factor: float) -> None:
    grid = omezarr.read_grid(make(tmp_path / "a.zarr", numbered(2, 3, 4), unit=unit))
    assert grid.spacing_mm == pytest.approx((factor, 2 * factor, 3 * factor))


def test_scales_of_level_and_image_are_multiplied(tmp_path: Path) -> None:
    def both(multiscale: dict[str, Any]) -> None:
        multiscale["coordinateTransformations"] = [{"type": "scale", "scale": [10.0, 0.5, 0.5]}]

    grid = omezarr.read_grid(make(tmp_path / "a.zarr", numbered(2, 3, 4), change=both))
    assert grid.spacing_mm == pytest.approx((0.01, 0.001, 0.0015))


def chunk_files(path: Path) -> dict[str, Path]:
    level = path / "0"
    return {str(file.relative_to(level)): file for file in level.rglob("*") if file.name[0].isdigit()}


def test_the_grid_is_read_without_any_chunk(tmp_path: Path) -> None:
    path = make(tmp_path / "a.zarr", numbered(4, 6, 8), chunks=(2, 3, 4))
    expected = omezarr.read_grid(path)
    files = chunk_files(path)
    assert len(files) == 8
    for file in files.values():
        file.write_bytes(b"rubbish")
    assert omezarr.read_grid(path) == expected
    with pytest.raises(FileError, match=r"cannot be read \("):
        omezarr.read(path)


def test_a_region_reads_its_own_chunks_alone(tmp_path: Path) -> None:
    array = numbered(2, 4, 6, 8)
    path = make(tmp_path / "a.zarr", array, "czyx", chunks=(1, 2, 3, 4))
    for name, file in chunk_files(path).items():
        if name.split(".")[1:] != ["1", "0", "1"]:
            file.write_bytes(b"rubbish")
    part = omezarr.read(path, (slice(2, 4), slice(0, 3), slice(5, 8)))
    assert np.array_equal(part.array, array[:, 2:4, 0:3, 5:8])
    assert part.grid.shape == (2, 3, 3)
    assert part.grid.spacing_mm == omezarr.read_grid(path).spacing_mm
    with pytest.raises(FileError, match=r"cannot be read \("):
        omezarr.read(path, (slice(1, 4), slice(0, 3), slice(5, 8)))
    with pytest.raises(ValueError, match="holds no voxels"):
        omezarr.read(path, (slice(4, 4), slice(0, 3), slice(5, 8)))


def test_labels_are_written_where_the_image_lies(tmp_path: Path) -> None:
    def moved(multiscale: dict[str, Any]) -> None:
        entries = multiscale["datasets"][0]["coordinateTransformations"]
        entries[0]["scale"] = [1.0, 0.1, 1 / 3, 2 / 7]
        entries.append({"type": "translation", "translation": [0.0, 5.5, -1 / 3, 0.1]})

    image = read_case([make(tmp_path / "a.ome.zarr", numbered(2, 3, 4, 5), "czyx", change=moved)])
    labels = (image.array[0] > 20).astype(np.uint8)
    path = tmp_path / "b.ome.zarr"
    for values in (labels[::-1], labels):  # the second replaces the first
        write_labels(path, LabelMap(values, image.grid))
    assert np.array_equal(read_label(path).array, labels[None])
    assert read_label(path).grid == image.grid
    written = zarr.open_group(str(path), mode="r").attrs["multiscales"][0]
    assert written["version"] == "0.4"
    assert [axis["name"] for axis in written["axes"]] == ["z", "y", "x"]
    assert [axis["unit"] for axis in written["axes"]] == ["micrometer"] * 3
    assert written["datasets"][0]["coordinateTransformations"] == [
        {"type": "scale", "scale": [0.1, 1 / 3, 2 / 7]},
        {"type": "translation", "translation": [5.5, -1 / 3, 0.1]},
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.ome.zarr", "b.ome.zarr"]


def test_labels_beside_may_be_of_another_format(tmp_path: Path) -> None:
    image = read_case([make(tmp_path / "a.zarr", numbered(3, 4, 5))])
    labels = (image.array[0] > 20).astype(np.uint8)
    for name in ("b.nii.gz", "b.tif", "b.nrrd", "b.zarr"):
        write_labels(tmp_path / name, LabelMap(labels, image.grid))
        label = read_label(tmp_path / name)
        assert np.array_equal(label.array, labels[None])
        assert image.grid.mismatch(label.grid) == ""


def test_a_failed_writing_leaves_what_was_there(tmp_path: Path) -> None:
    grid = Grid((2, 3, 4), (1.0, 1.0, 1.0))
    omezarr.write(tmp_path / "a.zarr", np.ones(grid.shape, np.uint8), grid)
    with pytest.raises(Exception, match="object"):
        omezarr.write(tmp_path / "a.zarr", np.full(grid.shape, None), grid)
    assert np.array_equal(omezarr.read(tmp_path / "a.zarr").array, np.ones((1, 2, 3, 4)))
    assert [file.name for file in tmp_path.iterdir()] == ["a.zarr"]


def test_masks_and_foreign_byte_order(tmp_path: Path) -> None:
    mask = omezarr.read(make(tmp_path / "a.zarr", numbered(2, 3, 4) > 10))
    assert mask.array.dtype == np.uint8
    assert np.array_equal(mask.array, numbered(1, 2, 3, 4) > 10)
    swapped = omezarr.read(make(tmp_path / "b.zarr", numbered(2, 3, 4).astype(">u2")))
    assert swapped.array.dtype == np.dtype("uint16")
    assert np.array_equal(swapped.array, numbered(1, 2, 3, 4))


def broken(folder: Path, what: str) -> Path:
    path, array = folder / "a.zarr", numbered(2, 3, 4)
    change: dict[str, Callable[[dict[str, Any]], Any]] = {
        "no axes": lambda m: m.pop("axes"),
        "axes by name": lambda m: m.update(axes=["z", "y", "x"]),
        "no levels": lambda m: m.update(datasets=[]),
        "other axes": lambda m: m["axes"].pop(),
        "rotation": lambda m: m.update(coordinateTransformations=[{"type": "rotation", "rotation": []}]),
        "short scale": lambda m: m.update(coordinateTransformations=[{"type": "scale", "scale": [1.0]}]),
        "zero scale": lambda m: m.update(coordinateTransformations=[{"type": "scale", "scale": [0, 1, 1]}]),
        "unit": lambda m: m["axes"][1].update(unit="parsec"),
        "two channel axes": lambda m: [m["axes"][n].update(type="channel") for n in (0, 1)],
        "lost level": lambda m: m["datasets"][0].update(path="9"),
    }
    match what:
        case "missing":
            return path
        case "file":
            path.write_text("no folder")
        case "empty":
            path.mkdir()
        case "plain":
            zarr.create_group(str(path), zarr_format=2).create_array("0", data=array)
        case "plate":
            zarr.create_group(str(path), zarr_format=3, attributes={"ome": {"plate": {}}})
        case "times":
            make(path, numbered(2, 3, 4, 5), "tzyx")
        case "damaged":
            make(path, array)
            (path / ".zattrs").write_text("{")
        case "complex":
            make(path, array.astype(np.complex64))
        case _:
            make(path, array, change=change[what])
    return path


@pytest.mark.parametrize(
    ("what", "problem", "action"),
    [
        ("missing", "is missing", "add the file"),
        ("file", "is not a folder, as OME-Zarr is", "export it again or correct its ending"),
        ("empty", "is not a Zarr group", "export it again as OME-Zarr"),
        ("plain", 'has no "multiscales" in its metadata', "export it again as OME-Zarr"),
        ("plate", "holds several images", "give the folder of one of them, such as a.zarr/0"),
        ("times", "has 2 time points", "give each an image of its own"),
        ("damaged", "has metadata that is not valid JSON (", "copy or export it again"),
        ("complex", "holds values of type complex64", "export real numbers"),
        ("no axes", 'does not describe its "axes" and "datasets"', "export it again as OME-Zarr"),
        ("axes by name", 'does not describe its "axes" and "datasets"', "export it again as OME-Zarr"),
        ("no levels", 'does not describe its "axes" and "datasets"', "export it again as OME-Zarr"),
        ("other axes", "names 2 axes for an array of 3", "export it again as OME-Zarr"),
        ("rotation", "has the coordinate transformation {'type': 'rotation'", "export it again as OME-Zarr"),
        ("short scale", "has the coordinate transformation {'type': 'scale'", "export it again as OME-Zarr"),
        ("zero scale", "has the voxel size (0.0, 0.002, 0.003) mm", 'write its true "scale"'),
        ("unit", "has the unit 'parsec' for its axis y", 'use "micrometer"'),
        ("two channel axes", "has the axes z, y, x; expected are", "export it again as OME-Zarr"),
        ("lost level", "lacks its resolution level '9'", "copy or export it again"),
    ],
)
def test_broken_folders_are_explained(tmp_path: Path, what: str, problem: str, action: str) -> None:
    path = broken(tmp_path, what)
    with pytest.raises(FileError) as caught:
        omezarr.read(path)
    assert caught.value.problem.startswith(problem)
    assert caught.value.action.startswith(action)
    if path.is_dir():
        shutil.rmtree(path)


@pytest.mark.parametrize("scale", [["0.5", "1", "1"], [None, 1, 1]])
def test_a_scale_that_is_no_number_is_told(tmp_path: Path, scale: list[object]) -> None:
    path = tmp_path / "a.ome.zarr"
    omezarr.write(path, np.zeros((2, 3, 4), np.uint8), Grid((2, 3, 4), (1.0, 1.0, 1.0)))
    metadata = json.loads((path / ".zattrs").read_text())
    metadata["multiscales"][0]["datasets"][0]["coordinateTransformations"] = [{"type": "scale", "scale": scale}]
    (path / ".zattrs").write_text(json.dumps(metadata))
    with pytest.raises(FileError, match=r"has the coordinate transformation .* expected is a scale of 3"):
        omezarr.read_grid(path)


def test_what_an_image_does_not_say_is_told(tmp_path: Path) -> None:
    def problems(**options: Any) -> list[str]:
        shutil.rmtree(tmp_path / "a.zarr", ignore_errors=True)
        return [r.problem for r in omezarr.remarks(make(tmp_path / "a.zarr", numbered(2, 3, 4) + 1, **options))]

    assert problems() == []
    assert problems(unit=None) == ['has no unit for its "scale"; mm is assumed']
    assert problems(change=lambda m: m["datasets"][0].pop("coordinateTransformations")) == [
        "has no scale; voxels of (0.001, 0.001, 0.001) mm are assumed"
    ]
    path = make(tmp_path / "b.zarr", numbered(4, 6, 8) + 1, chunks=(2, 3, 4))
    assert omezarr.remarks(path) == ()
    next(iter(chunk_files(path).values())).unlink()
    assert [r.problem for r in omezarr.remarks(path)] == ["has missing chunks, which are read as 0"]


def test_levels_from_coarse_to_fine_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a.zarr", numbered(2, 8, 8), change=lambda m: m["datasets"].reverse())
    with pytest.raises(FileError, match="does not list its resolution levels from fine to coarse; export it again"):
        omezarr.read(path)


def test_translations_apart_are_told(tmp_path: Path) -> None:
    def at(name: str, *start: float) -> Grid:
        def move(multiscale: dict[str, Any]) -> None:
            entries = multiscale["datasets"][0]["coordinateTransformations"]
            entries.append({"type": "translation", "translation": list(start)})

        return omezarr.read_grid(make(tmp_path / name, numbered(2, 3, 4), change=move))

    here = at("a.zarr", 0.0, 0.0, 0.0)  # voxels of (1, 2, 3) micrometers
    assert omezarr.translated(here, at("b.zarr", 0.4, -0.9, 1.4)) == ""
    assert omezarr.translated(here, at("c.zarr", 0.0, 0.0, 6.0)) == "(0, 0, 0.006) mm away"
    assert omezarr.translated(here, Grid(here.shape, here.spacing_mm)) == ""


class _Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_a_pickle_among_the_chunks_is_never_opened(tmp_path: Path) -> None:
    path, trap = make(tmp_path / "a.zarr", numbered(4, 6, 8)), tmp_path / "trapped"
    good = json.loads((path / "0" / ".zarray").read_text())
    evil = good | {"dtype": "|O", "filters": [{"id": "pickle", "protocol": 5}], "fill_value": None, "compressor": None}
    for chunk in chunk_files(path).values():
        chunk.write_bytes(pickle.dumps(_Trap(trap)))
    (path / "0" / ".zarray").write_text(json.dumps(evil))
    with pytest.raises(FileError) as raised:
        omezarr.read(path)
    assert raised.value.problem == "holds values of type |O"
    assert not trap.exists()


@pytest.mark.parametrize("name", [".zattrs", ".zgroup", "0/.zarray", "chunk"])
def test_a_pipe_in_the_place_of_a_part_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "a.zarr", numbered(4, 6, 8))
    part = next(iter(chunk_files(path).values())) if name == "chunk" else path / name
    part.unlink()
    os.mkfifo(part)
    with pytest.raises(FileError, match="it is a pipe"):
        omezarr.read(path)


def test_a_second_copy_of_the_metadata_is_not_followed(tmp_path: Path) -> None:
    path = make(tmp_path / "a.zarr", numbered(4, 6, 8))
    zarr.consolidate_metadata(str(path), zarr_format=2)
    everything = json.loads((path / ".zmetadata").read_text())
    everything["metadata"]["0/.zarray"]["dtype"] = "<i2"
    (path / ".zmetadata").write_text(json.dumps(everything))
    assert omezarr.read(path).array.dtype == np.uint16


@pytest.mark.parametrize(
    ("version", "change"),
    [
        ("0.4", {"filters": [{"id": "pickle"}]}),
        ("0.4", {"compressor": {"id": "json2"}}),
        ("0.5", {"codecs": [{"name": "numcodecs.pickle"}]}),
        ("0.5", {"codecs": [{"name": "sharding_indexed", "configuration": {"codecs": [{"name": "vlen-utf8"}]}}]}),
    ],
)
def test_codecs_that_are_not_known_are_refused(tmp_path: Path, version: str, change: dict[str, Any]) -> None:
    path = make(tmp_path / "a.zarr", numbered(4, 6, 8), version=version)
    file = path / "0" / (".zarray" if version == "0.4" else "zarr.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(FileError) as raised:
        omezarr.read(path)
    assert raised.value.problem.startswith("is packed by the unknown codec")


def test_known_codecs_are_read(tmp_path: Path) -> None:
    array = numbered(4, 6, 8)
    for number, codecs in enumerate([zarr.codecs.BloscCodec(), zarr.codecs.GzipCodec(), zarr.codecs.ZstdCodec()]):
        parts = {"shards": (4, 6, 8), "chunks": (2, 3, 4)}
        path = make(tmp_path / f"{number}.zarr", array[..., :8], version="0.5", compressors=codecs, **parts)
        assert np.array_equal(omezarr.read(path).array[0], array)
