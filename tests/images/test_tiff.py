"""TIFF: pictures, stacks, channels, compressions, and the spacing beside a stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from segfit.files import write_json
from segfit.geometry import Grid
from segfit.images import tiff
from segfit.images.image import FileError

STACK = np.random.default_rng(0).integers(0, 60000, (4, 5, 6), np.uint16)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, ">u2"])
def test_pictures(tmp_path: Path, dtype: Any) -> None:
    grey = (STACK[0] % 200).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", grey)
    image = tiff.read(tmp_path / "a.tif")
    assert np.array_equal(image.array, grey[None])
    assert image.array.dtype == np.dtype(dtype).newbyteorder("=")
    assert image.grid == Grid((5, 6), (1.0, 1.0))
    assert tiff.read_grid(tmp_path / "a.tif") == image.grid


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_colours_become_channels(tmp_path: Path, planar: Any) -> None:
    channels = STACK[:3]
    pixels = channels if planar == "separate" else channels.transpose(1, 2, 0)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", planarconfig=planar)
    assert np.array_equal(tiff.read(tmp_path / "a.tif").array, channels)


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        ("ZYX", (4, 5, 6), (1, 4, 5, 6)),
        ("TYX", (4, 5, 6), (1, 4, 5, 6)),
        ("CYX", (3, 5, 6), (3, 5, 6)),
        ("ZCYX", (4, 2, 5, 6), (2, 4, 5, 6)),
        ("TZCYX", (1, 4, 2, 5, 6), (2, 4, 5, 6)),
    ],
)
def test_axes_are_taken_by_name(tmp_path: Path, axes: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    pixels = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", metadata={"axes": axes})
    image = tiff.read(tmp_path / "a.tif")
    assert image.array.shape == expected
    assert tiff.read_grid(tmp_path / "a.tif") == image.grid
    if "ZC" in axes:
        pixels = pixels.reshape(4, 2, 5, 6).transpose(1, 0, 2, 3)
    assert np.array_equal(image.array.ravel(), pixels.ravel())


def test_narrow_stacks_are_no_colours(tmp_path: Path) -> None:
    stack = STACK[:, :, :3]
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack")
    assert np.array_equal(tiff.read(tmp_path / "a.tif").array, stack[None])


def test_too_many_axes(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 5, 6), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", metadata={"axes": "TZYX"})
    with pytest.raises(FileError, match=r"has the axes TZYX \(2x3x5x6\); save one 3D stack per channel"):
        tiff.read(tmp_path / "a.tif")


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressions(tmp_path: Path, compression: str) -> None:
    pages = [Pillow.fromarray(page) for page in STACK]
    pages[0].save(tmp_path / "a.tif", compression=compression, save_all=True, append_images=pages[1:])
    assert np.array_equal(tiff.read(tmp_path / "a.tif").array, STACK[None])
    colour = (STACK[:3] % 256).astype(np.uint8).transpose(1, 2, 0)
    Pillow.fromarray(colour).save(tmp_path / "b.tif", compression=compression)
    assert np.array_equal(tiff.read(tmp_path / "b.tif").array, colour.transpose(2, 0, 1))


def test_spacing_stands_beside_the_stack(tmp_path: Path) -> None:
    for name in ("case_0000.tif", "case.tif"):
        tifffile.imwrite(tmp_path / name, STACK, photometric="minisblack")
        assert tiff.read_grid(tmp_path / name).spacing_mm == (1.0, 1.0, 1.0)
    write_json(tmp_path / "case.json", {"spacing": [3, 0.5, 0.25]})
    for name in ("case_0000.tif", "case.tif"):
        assert tiff.read(tmp_path / name).grid == Grid((4, 5, 6), (3.0, 0.5, 0.25))


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("um", 1e-3), ("micron", 1e-3), ("\\u00B5m", 1e-3), ("mm", 1.0), ("cm", 10.0), ("pixel", 1.0), (None, 1.0)],
)
def test_imagej_stacks_have_their_own_spacing(tmp_path: Path, unit: str | None, factor: float) -> None:
    about = {"axes": "ZYX", "spacing": 3.0} | ({} if unit is None else {"unit": unit})
    tifffile.imwrite(tmp_path / "case.tif", STACK, imagej=True, resolution=(1 / 0.25, 1 / 0.5), metadata=about)
    expected = (3.0 * factor, 0.5 * factor, 0.25 * factor)  # tifffile's resolution is x before y
    assert tiff.read_grid(tmp_path / "case.tif").spacing_mm == pytest.approx(expected, rel=1e-6)
    assert tiff.read(tmp_path / "case.tif").grid == tiff.read_grid(tmp_path / "case.tif")
    write_json(tmp_path / "case.json", {"spacing": [5, 1, 1]})
    assert tiff.read(tmp_path / "case.tif").grid.spacing_mm == (5.0, 1.0, 1.0)


def test_ome_stacks_have_their_own_spacing(tmp_path: Path) -> None:
    about: dict[str, Any] = {"axes": "ZYX", "PhysicalSizeX": 0.25, "PhysicalSizeY": 500.0, "PhysicalSizeYUnit": "nm"}
    about |= {"PhysicalSizeZ": 0.003, "PhysicalSizeZUnit": "mm"}
    tifffile.imwrite(tmp_path / "case.ome.tif", STACK, photometric="minisblack", metadata=about)
    image = tiff.read(tmp_path / "case.ome.tif")
    assert np.array_equal(image.array, STACK[None])
    assert image.grid.spacing_mm == pytest.approx((0.003, 0.0005, 0.00025))  # µm where no unit stands
    assert tiff.read_grid(tmp_path / "case.ome.tif") == image.grid


@pytest.mark.parametrize(
    "metadata",
    [
        {"imagej": True, "metadata": {"axes": "ZYX", "unit": "um"}, "resolution": (2, 2)},
        {"imagej": True, "metadata": {"axes": "ZYX", "unit": "um", "spacing": 0.0}, "resolution": (2, 2)},
        {"imagej": True, "metadata": {"axes": "ZYX", "unit": "um", "spacing": 3.0}, "resolution": (0, 0)},
        {"ome": True, "metadata": {"axes": "ZYX", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}},
        {"ome": True, "metadata": {"axes": "ZYX", **{f"PhysicalSize{axis}": 2.0 for axis in "XYZ"},
                                   "PhysicalSizeZUnit": "pixel"}},
        {"resolution": (300, 300), "resolutionunit": "INCH"},
    ],
)  # fmt: skip
def test_half_a_calibration_is_none(tmp_path: Path, metadata: Any) -> None:
    tifffile.imwrite(tmp_path / "a.tif", STACK, photometric="minisblack", **metadata)
    assert tiff.read_grid(tmp_path / "a.tif").spacing_mm == (1.0, 1.0, 1.0)


def test_colour_tables_are_not_applied(tmp_path: Path) -> None:
    indices = (STACK[0] % 5).astype(np.uint8)
    table = np.zeros((3, 256), np.uint16)
    table[1] = np.arange(256) * 256
    tifffile.imwrite(tmp_path / "a.tif", indices, photometric="palette", colormap=table)
    assert np.array_equal(tiff.read(tmp_path / "a.tif").array, indices[None])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_four_colours(tmp_path: Path, dtype: Any) -> None:
    rgba = STACK.astype(dtype).transpose(1, 2, 0)
    tifffile.imwrite(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    image = tiff.read(tmp_path / "a.tif")
    assert image.array.dtype == dtype
    assert np.array_equal(image.array, STACK.astype(dtype))
    assert image.grid.spacing_mm == (1.0, 1.0)


@pytest.mark.parametrize("content", ['{"spacing": [3, 1]}', '{"spacing": [3, 1, 0]}', '{"spacing": "3"}', "[3, 1, 1]"])
def test_wrong_spacing_files_are_explained(tmp_path: Path, content: str) -> None:
    tifffile.imwrite(tmp_path / "case_0000.tif", STACK, photometric="minisblack")
    (tmp_path / "case.json").write_text(content)
    with pytest.raises(FileError, match=r'case.json must hold {"spacing": \[z, y, x\]} with positive numbers, got'):
        tiff.read(tmp_path / "case_0000.tif")
    (tmp_path / "case.json").write_text("{")
    with pytest.raises(FileError, match=r"case\.json is not valid JSON; write"):
        tiff.read(tmp_path / "case_0000.tif")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_written_labels_come_back(tmp_path: Path, dtype: Any) -> None:
    labels = (STACK % 200).astype(dtype)[:, :, :3]
    grid = Grid(labels.shape, (3.0, 0.5, 0.25))
    tiff.write(tmp_path / "case.tif", labels, grid)
    back = tiff.read(tmp_path / "case.tif")
    assert np.array_equal(back.array, labels[None])
    assert back.array.dtype == dtype
    assert back.grid == grid
    tiff.write(tmp_path / "flat.tif", labels[0], Grid(labels.shape[1:], (1.0, 1.0)))
    assert np.array_equal(tiff.read(tmp_path / "flat.tif").array, labels[:1])
    assert not (tmp_path / "flat.json").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "is empty"), (b"no tiff at all", "is not a TIFF file"), (b"II*\0", "cannot be read (")],
)
def test_broken_files_are_explained(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(FileError) as caught:
        tiff.read(tmp_path / "a.tif")
    assert caught.value.problem.startswith(problem)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("form", ["plain", "big", "imagej", "zlib", "pages"])
def test_a_cut_stack_never_loses_slices_quietly(tmp_path: Path, form: str, share: float) -> None:
    """Decoders hand out the pages before the cut without an error."""
    path = tmp_path / "a.tif"
    if form == "pages":
        pages = [Pillow.fromarray(page) for page in STACK]
        pages[0].save(path, compression="tiff_lzw", save_all=True, append_images=pages[1:])
    else:
        arguments: dict[str, Any] = {
            "plain": {"photometric": "minisblack"},
            "big": {"photometric": "minisblack", "bigtiff": True},
            "imagej": {"imagej": True, "metadata": {"axes": "ZYX"}},
            "zlib": {"photometric": "minisblack", "compression": "zlib"},
        }[form]
        tifffile.imwrite(path, STACK, **arguments)
    assert np.array_equal(tiff.read(path).array, STACK[None])
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    try:
        cut = tiff.read(path).array
    except FileError:
        return
    assert share == 0.999  # what was lost is padding behind the last page
    assert np.array_equal(cut, STACK[None])


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "group4"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_black_and_white_is_0_and_1_however_it_is_stored(tmp_path: Path, compression: str, photometric: int) -> None:
    mask = STACK[0] > 30000
    Pillow.fromarray(mask).save(tmp_path / "a.tif", compression=compression, tiffinfo={262: photometric})
    with Pillow.open(tmp_path / "a.tif") as file:
        assert file.tag_v2[262] == photometric
        assert np.array_equal(np.array(file), mask)
    for read in (tiff.read, tiff.read_label):
        assert np.array_equal(read(tmp_path / "a.tif").array, mask[None])


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_grey_values_that_store_white_as_0_are_kept_and_told(tmp_path: Path, compression: str) -> None:
    grey = (STACK[0] % 256).astype(np.uint8)
    Pillow.fromarray(grey).save(tmp_path / "a.tif", compression=compression, tiffinfo={262: 0})
    assert np.array_equal(
        tiff.read(tmp_path / "a.tif").array, 255 - grey[None]
    )  # Pillow stores what it shows, inverted
    assert ["stores white as 0" in remark.problem for remark in tiff.remarks(tmp_path / "a.tif")] == [True]


def test_complex_values_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", STACK[0].astype(np.complex64))
    for read in (tiff.read, tiff.read_grid, tiff.read_label):
        with pytest.raises(FileError, match=r"a\.tif holds values of type complex64; export real numbers"):
            read(tmp_path / "a.tif")


def test_several_images_are_refused_and_previews_told(tmp_path: Path) -> None:
    for name, second in (("a.tif", STACK), ("b.tif", STACK[0, :2, :3])):
        with tifffile.TiffWriter(tmp_path / name) as file:
            file.write(STACK, photometric="minisblack", metadata=None, compression="zlib")
            file.write(second, photometric="minisblack", metadata=None)
    with pytest.raises(FileError, match=r"holds 2 images \(.*\); save the one that is meant alone"):
        tiff.read(tmp_path / "a.tif")
    assert np.array_equal(tiff.read(tmp_path / "b.tif").array, STACK[None])
    assert [remark.problem for remark in tiff.remarks(tmp_path / "b.tif")] == [
        "has smaller images too (2x3), which are ignored"
    ]


def test_compressions_that_nobody_can_unpack_are_named(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", STACK[0].astype(np.uint8), metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        file.pages[0].tags["Compression"].overwrite(34712)  # type: ignore[union-attr]
    with pytest.raises(
        FileError, match=r"is compressed with JPEG2000, which is not supported; save it with Deflate or none"
    ):
        tiff.read(tmp_path / "a.tif")


def test_labels_packed_by_jpeg_are_refused(tmp_path: Path) -> None:
    Pillow.fromarray((STACK[0] % 2 * 255).astype(np.uint8)).save(tmp_path / "a.tif", compression="jpeg")
    assert tiff.read(tmp_path / "a.tif").array.shape == (1, 5, 6)
    with pytest.raises(FileError, match=r"a\.tif is JPEG-compressed, which changes label values; export the labels"):
        tiff.read_label(tmp_path / "a.tif")
