"""Pictures: channels, bit depths, palettes, and files that are none."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from segfit.images import png_jpeg
from segfit.images.image import FileError

GENERATOR = np.random.default_rng(0)
GREY = GENERATOR.integers(0, 256, (5, 7), np.uint8)
COLOUR = GENERATOR.integers(0, 256, (5, 7, 3), np.uint8)


def test_grey_and_colour(tmp_path: Path) -> None:
    Pillow.fromarray(GREY).save(tmp_path / "a.png")
    image = png_jpeg.read(tmp_path / "a.png")
    assert np.array_equal(image.array, GREY[None])
    assert image.grid.shape == (5, 7)
    assert image.grid.spacing_mm == (1.0, 1.0)
    assert image.grid.affine is None
    for name in ("b.png", "b.bmp"):
        Pillow.fromarray(COLOUR).save(tmp_path / name)
        assert np.array_equal(png_jpeg.read(tmp_path / name).array, COLOUR.transpose(2, 0, 1))
        assert png_jpeg.read_grid(tmp_path / name) == image.grid
    rgba = np.concatenate([COLOUR, COLOUR[..., :1]], axis=2)
    Pillow.fromarray(rgba).save(tmp_path / "c.png")
    assert np.array_equal(png_jpeg.read(tmp_path / "c.png").array, rgba.transpose(2, 0, 1))


def test_sixteen_bits(tmp_path: Path) -> None:
    deep = GREY.astype(np.uint16) * 257
    Pillow.fromarray(deep).save(tmp_path / "a.png")
    image = png_jpeg.read(tmp_path / "a.png")
    assert image.array.dtype == np.uint16
    assert np.array_equal(image.array, deep[None])


def test_jpeg_is_read(tmp_path: Path) -> None:
    Pillow.fromarray(np.full((8, 8, 3), 128, np.uint8)).save(tmp_path / "a.jpg")
    assert np.array_equal(png_jpeg.read(tmp_path / "a.jpg").array, np.full((3, 8, 8), 128))


def test_palettes_are_colours_in_images_and_indices_in_labels(tmp_path: Path) -> None:
    indices = np.array([[0, 1], [2, 1]], np.uint8)
    painted = Pillow.fromarray(indices, mode="P")
    painted.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    painted.save(tmp_path / "a.png")
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])
    assert np.array_equal(png_jpeg.read(tmp_path / "a.png").array, colours[indices].transpose(2, 0, 1))
    assert np.array_equal(png_jpeg.read_label(tmp_path / "a.png").array, indices[None])


def test_black_and_white_labels_are_zero_and_one(tmp_path: Path) -> None:
    mask = GREY > 100
    Pillow.fromarray(mask).save(tmp_path / "a.png")
    label = png_jpeg.read_label(tmp_path / "a.png")
    assert label.array.dtype == np.uint8
    assert np.array_equal(label.array, mask[None])
    assert np.array_equal(png_jpeg.read(tmp_path / "a.png").array, mask[None] * 255)


def test_transparency_of_grey_pictures_is_dropped_and_told(tmp_path: Path) -> None:
    Pillow.fromarray(np.stack([GREY, GREY], axis=2), mode="LA").save(tmp_path / "a.png")
    assert np.array_equal(png_jpeg.read(tmp_path / "a.png").array, GREY[None])
    assert [remark.problem for remark in png_jpeg.remarks(tmp_path / "a.png")] == [
        "is partly transparent; its grey values are used there too"
    ]
    with pytest.raises(FileError, match="is partly transparent, so its labels"):
        png_jpeg.read_label(tmp_path / "a.png")
    Pillow.fromarray(np.stack([GREY, np.full_like(GREY, 255)], axis=2), mode="LA").save(tmp_path / "b.png")
    assert np.array_equal(png_jpeg.read_label(tmp_path / "b.png").array, GREY[None])
    assert png_jpeg.remarks(tmp_path / "b.png") == ()


@pytest.mark.parametrize(("depth", "row"), [(2, b"\0\x1b"), (4, b"\0\x01\x23"), (8, b"\0\0\1\2\3")])
def test_labels_of_few_bits_are_what_is_stored(tmp_path: Path, depth: int, row: bytes) -> None:
    (tmp_path / "a.png").write_bytes(png(4, 1, 0, depth, row))
    assert png_jpeg.read_label(tmp_path / "a.png").array.tolist() == [[[0, 1, 2, 3]]]
    assert png_jpeg.read(tmp_path / "a.png").array.max() == 3 * {2: 85, 4: 17, 8: 1}[depth]  # black to white


def test_labels_in_colours_are_taken_where_they_are_grey(tmp_path: Path) -> None:
    for name, alpha in (("a.png", ()), ("b.png", (np.full_like(GREY, 255),))):
        Pillow.fromarray(np.stack([GREY, GREY, GREY, *alpha], axis=2)).save(tmp_path / name)
        assert np.array_equal(png_jpeg.read_label(tmp_path / name).array, GREY[None])
    Pillow.fromarray(COLOUR).save(tmp_path / "c.png")
    with pytest.raises(FileError, match=r"is a colour image \(35 colours\), expected label values"):
        png_jpeg.read_label(tmp_path / "c.png")
    Pillow.fromarray(GREY).save(tmp_path / "d.png", "JPEG")
    with pytest.raises(FileError, match="is a JPEG image despite its name; JPEG changes label values; export"):
        png_jpeg.read_label(tmp_path / "d.png")
    assert png_jpeg.read(tmp_path / "d.png").array.shape == (1, 5, 7)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_written_labels_come_back(tmp_path: Path, dtype: type) -> None:
    labels = GREY.astype(dtype) * (300 if dtype is np.uint16 else 1)
    png_jpeg.write(tmp_path / "a.png", labels)
    back = png_jpeg.read_label(tmp_path / "a.png").array
    assert back.dtype == dtype
    assert np.array_equal(back[0], labels)


def test_bitmaps_hold_eight_bits(tmp_path: Path) -> None:
    png_jpeg.write(tmp_path / "a.bmp", GREY)
    assert np.array_equal(png_jpeg.read_label(tmp_path / "a.bmp").array, GREY[None])
    with pytest.raises(FileError, match=r"cannot hold values above 254; write .png or .tif instead"):
        png_jpeg.write(tmp_path / "a.bmp", GREY.astype(np.uint16))


def png(width: int, height: int, colour_type: int, depth: int, rows: bytes) -> bytes:
    """Return a PNG written by hand."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    data = zlib.compress(rows, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width", [5, 53, 54])  # rows of 16, 160 and 164 bytes
def test_bitmaps_of_any_width_are_read(tmp_path: Path, width: int) -> None:
    pixels = np.arange(2 * width * 3, dtype=np.uint8).reshape(2, width, 3)
    Pillow.fromarray(pixels).save(tmp_path / "a.bmp")
    np.testing.assert_array_equal(png_jpeg.read(tmp_path / "a.bmp").array, np.moveaxis(pixels, -1, 0))


def test_large_pictures_are_no_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Pillow.fromarray(GREY).save(tmp_path / "a.png")
    monkeypatch.setattr(Pillow, "MAX_IMAGE_PIXELS", 5)  # pillow itself refuses twice that
    with pytest.raises(Pillow.DecompressionBombError):
        Pillow.open(tmp_path / "a.png")
    assert np.array_equal(png_jpeg.read(tmp_path / "a.png").array, GREY[None])
    assert png_jpeg.read_grid(tmp_path / "a.png").shape == GREY.shape


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"no picture at all", "is not a PNG, JPEG or BMP image"),
        (png(3, 2, 2, 16, b"\0" + bytes(18)), "cannot be read ("),  # one row of two
        (png(1, 1, 4, 16, bytes(5)), "is grey with transparency in 16 bits"),
        (b"\x89PNG\r\n\x1a\nrubbish", "cannot be read ("),
        (b"\xff\xd8\xff\xe0rubbish", "cannot be read ("),
    ],
)
def test_broken_pictures_are_explained(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(FileError) as caught:
        png_jpeg.read(path)
    assert caught.value.problem.startswith(problem)
    assert caught.value.path == path


@pytest.mark.parametrize(("colour_type", "colours"), [(2, 3), (6, 4)])
def test_sixteen_bits_per_colour_are_kept(tmp_path: Path, colour_type: int, colours: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 2**16, (2, 3, colours), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    (tmp_path / "a.png").write_bytes(png(3, 2, colour_type, 16, rows))
    found = png_jpeg.read(tmp_path / "a.png")
    assert found.array.dtype == np.uint16
    assert np.array_equal(found.array, np.moveaxis(pixels, -1, 0))
    assert png_jpeg.read_grid(tmp_path / "a.png") == found.grid
    with pytest.raises(FileError, match="has 16 bits per colour; save labels as one channel"):
        png_jpeg.read_label(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.jpg"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_cut_pictures_are_explained(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(FileError, match=r"cannot be read \("):
        png_jpeg.read(path)


def test_missing_picture(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none\.png is missing"):
        png_jpeg.read(tmp_path / "none.png")


def test_an_animated_picture_is_not_read_as_its_first_frame(tmp_path: Path) -> None:
    frames = [Pillow.fromarray(np.full((4, 5), value, np.uint8)) for value in (0, 200)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    for read in (png_jpeg.read, png_jpeg.read_label):
        with pytest.raises(FileError, match="is animated: it has several frames; save the one that is meant"):
            read(tmp_path / "a.png")


def test_a_picture_that_is_stored_turned_is_known(tmp_path: Path) -> None:
    pixels = Pillow.fromarray(np.zeros((4, 5, 3), np.uint8))
    exif = pixels.getexif()
    exif[0x0112] = 6
    pixels.save(tmp_path / "turned.jpg", exif=exif)
    pixels.save(tmp_path / "upright.jpg")
    assert [remark.problem for remark in png_jpeg.remarks(tmp_path / "turned.jpg")] == [
        "is rotated or mirrored by its EXIF orientation, which is ignored"
    ]
    assert png_jpeg.remarks(tmp_path / "upright.jpg") == ()
