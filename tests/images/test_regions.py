from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from segfit.geometry import Grid
from segfit.images import omezarr, tiff
from segfit.images.formats import read_case
from segfit.images.image import Regions
from segfit.images.regions import read_regions

_FLAT, _COLOURS, _STACK = (70, 90), (70, 90, 3), (9, 70, 90)
KINDS: dict[str, tuple[tuple[int, ...], str, dict[str, Any]]] = {
    "plain": (_FLAT, "uint8", {}),
    "deflate": (_FLAT, "uint8", {"compression": "zlib"}),
    "tiles": (_FLAT, "uint8", {"tile": (32, 16)}),
    "packed tiles": (_FLAT, "uint16", {"tile": (32, 16), "compression": "zlib", "predictor": True}),
    "strips": (_FLAT, "uint8", {"rowsperstrip": 7, "compression": "zlib"}),
    "big end first": (_FLAT, "uint16", {"byteorder": ">", "rowsperstrip": 9, "compression": "zlib"}),
    "big end first, as it is": (_FLAT, "uint16", {"byteorder": ">"}),
    "colours": (_COLOURS, "uint8", {"tile": (16, 16), "compression": "zlib", "photometric": "rgb"}),
    "colours as they are": (_COLOURS, "uint8", {"photometric": "rgb"}),
    "stack": (_STACK, "float32", {"tile": (32, 32), "compression": "zlib", "photometric": "minisblack"}),
    "stack as it is": (_STACK, "float32", {"photometric": "minisblack"}),
}


def require_equal(found: Regions | None, whole: np.ndarray[Any, Any]) -> None:
    """Any box is that of the whole, those at the borders and whole chunks among them."""
    assert found is not None
    assert (found.channels, *found.grid.shape) == whole.shape
    generator = np.random.default_rng(0)
    boxes = [[tuple(sorted(generator.choice(n + 1, 2, replace=False))) for n in found.grid.shape] for _ in range(20)]
    boxes += [[(0, n) for n in found.grid.shape], [(0, n) for n in found.chunk]]
    for box in boxes:
        index = [slice(int(low), int(high)) for low, high in box]
        part = found.read(index)
        assert part.dtype == whole.dtype
        np.testing.assert_array_equal(part, whole[(slice(None), *index)])


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_tiff(tmp_path: Path, kind: str) -> None:
    shape, dtype, options = KINDS[kind]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.random.default_rng(0).integers(0, 250, shape).astype(dtype), **options)
    require_equal(tiff.regions(path), tiff.read(path).array)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 70, 90), {"photometric": "rgb", "planarconfig": "separate"}),
        ((2, 9, 70, 90), {"photometric": "minisblack", "metadata": {"axes": "CZYX"}}),
        ((16, 64, 64), {"photometric": "minisblack", "volumetric": True, "tile": (16, 16, 16)}),
    ],
)
def test_tiff_that_is_read_whole(tmp_path: Path, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros(shape, np.uint8), **options)
    assert tiff.regions(path) is None
    assert read_regions([path]) is None


def test_strips_of_whole_large_pages_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros(_FLAT, np.uint8), rowsperstrip=70, compression="zlib")
    assert tiff.regions(path) is not None
    monkeypatch.setattr(tiff, "_LARGEST_STRIP", 70 * 90 - 1)
    assert tiff.regions(path) is None


def test_parts_of_zarr_and_of_several_files(tmp_path: Path) -> None:
    paths = [tmp_path / f"a_000{number}.ome.zarr" for number in range(2)]
    for number, path in enumerate(paths):
        array = np.random.default_rng(number).integers(0, 250, (20, 30, 25)).astype(np.uint8)
        omezarr.write(path, array, Grid(array.shape, (2.0, 1.0, 1.0)))
    whole = read_case(paths).array
    require_equal(read_regions(paths[:1]), whole[:1].astype(np.uint8))
    require_equal(read_regions(paths), whole.astype(np.uint8))
    omezarr.write(paths[1], np.zeros((20, 30, 24), np.uint8), Grid((20, 30, 24), (2.0, 1.0, 1.0)))
    assert read_regions(paths) is None
