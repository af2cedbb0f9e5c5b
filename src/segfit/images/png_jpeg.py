"""PNG, JPEG and BMP images: two spatial axes, one to four channels."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from segfit.files import write_bytes
from segfit.geometry import Grid
from segfit.images import itk
from segfit.images.image import COPY_AGAIN, FileError, Image, Remark, foreign, reading, require_room
from segfit.images.open_files import OpenFiles, opened

__all__ = ["colours", "kind", "read", "read_grid", "read_label", "remarks", "write"]

_PNG_MAGIC = b"\x89PNG"
_ORIENTATION = 0x0112  # EXIF 2.3, 4.6.4 A: 1 is upright
_PILLOW_FORMATS = {".png": "PNG", ".bmp": "BMP"}
# Pillow's mode -> mode with the channels we hand out. Other modes (L, RGB, RGBA, I;16, I, F) stay as they are.
_CONVERSION = {"1": "L", "LA": "L", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "LAB": "RGB", "HSV": "RGB"}
_GREY_STEPS = {"L;2": 85, "L;4": 17}  # what Pillow multiplies grey values of 2 and 4 bits by, to make them 0 to 255
_OPAQUE = 255


def read(path: Path, files: OpenFiles | None = None) -> Image:
    """Read a picture as (c, y, x): 1 channel (grey), 3 (RGB) or 4 (RGBA), 8 or 16 bit as stored.

    Palette pictures become RGB (RGBA with transparency); transparency of grey pictures is dropped.
    """
    with reading(path), _open(path, files) as picture:
        deep = _deep_mode(picture)
        if deep:
            if deep.startswith("LA"):
                raise FileError(path, "is grey with transparency in 16 bits", "save it without transparency")
            picture.load()  # fails on what is broken, and ITK does not
            return _image(itk.read_colours(path))
        if picture.mode == "P":
            mode = "RGBA" if "transparency" in picture.info else "RGB"
        else:
            mode = _CONVERSION.get(picture.mode, picture.mode)
        pixels = np.array(picture if mode == picture.mode else picture.convert(mode))
    return _image(pixels)


def read_label(path: Path, files: OpenFiles | None = None) -> Image:
    """Read a label picture as (1, y, x): grey values as stored, palette indices, or 0 and 1 of black and white.

    Colours are taken where they are grey everywhere and opaque. Raises `FileError` for other colours, transparency that
    is not the same everywhere, and JPEG.
    """
    with reading(path), _open(path, files) as picture:
        if picture.format == "JPEG":
            action = "export the labels again as .png; converting this file keeps its errors"
            raise FileError(path, "is a JPEG image despite its name; JPEG changes label values", action)
        if _deep_mode(picture):
            raise FileError(path, "has 16 bits per colour", "save labels as one channel of label values")
        step = _GREY_STEPS.get(_raw_mode(picture), 1)
        pixels = np.array(picture)
        has_alpha = picture.mode in ("LA", "RGBA")
    if has_alpha:
        alpha, pixels = pixels[..., -1], pixels[..., :-1]
        if (alpha != alpha.flat[0]).any():
            problem = "is partly transparent, so its labels are ambiguous"
            raise FileError(path, problem, "save labels as one opaque channel of label values")
    if pixels.ndim == 3:
        if (pixels != pixels[..., :1]).any():
            found = len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0))
            problem = f"is a colour image ({found} colours), expected label values"
            raise FileError(path, problem, "save labels as one channel, one value per colour")
        pixels = pixels[..., 0]
    return _image(pixels.astype(np.uint8) if pixels.dtype == bool else pixels // step if step > 1 else pixels)


def read_grid(path: Path, files: OpenFiles | None = None) -> Grid:
    """Read the size alone."""
    with reading(path), _open(path, files) as picture:
        return Grid((picture.height, picture.width), (1.0, 1.0), spacing_known=False)


def remarks(path: Path, files: OpenFiles | None = None) -> tuple[Remark, ...]:
    """Return what an image says that is not followed here: how it is turned, transparent, or to be printed."""
    found: list[Remark] = []
    with reading(path), _open(path, files) as picture:
        if picture.getexif().get(_ORIENTATION, 1) not in (0, 1):
            problem = "is rotated or mirrored by its EXIF orientation, which is ignored"
            found.append(Remark(problem, "save it upright if its label was drawn on the displayed image"))
        if picture.mode == "LA" and picture.getchannel(1).getextrema()[0] < _OPAQUE:
            problem = "is partly transparent; its grey values are used there too"
            found.append(Remark(problem, "save it without transparency, on the intended background"))
        if picture.mode == "CMYK":
            problem = "is CMYK and is converted to RGB"
            found.append(Remark(problem, "save it as RGB like the others if its colours matter"))
    return tuple(found)


def colours(path: Path, files: OpenFiles | None = None) -> dict[int, str]:
    """Return the colours (``#ff0000``) in which the labels of a palette picture are shown; none for others."""
    with reading(path), _open(path, files) as picture:
        if picture.mode != "P":
            return {}
        table, counts = picture.getpalette(), picture.histogram()
    return {n: f"#{bytes(table[3 * n : 3 * n + 3]).hex()}" for n in range(len(table) // 3) if counts[n]}


def kind(path: Path, files: OpenFiles | None = None) -> str:
    """Return what the channels of a picture are, for messages."""
    with reading(path), _open(path, files) as picture:
        if picture.mode in ("P", "PA"):
            return "a palette, read as RGB" + " and alpha" * ("transparency" in picture.info)
        names = {"RGB": "RGB", "RGBA": "RGB and alpha", "CMYK": "CMYK, read as RGB"}
        return names.get(picture.mode, "grey")


def write(path: Path, array: NDArray[Any]) -> None:
    """Write (y, x) uint8 or uint16, or (y, x, 3) uint8, atomically; 16 bit needs PNG."""
    from PIL import Image as Pillow

    ending = path.suffix.lower()
    if array.dtype not in (np.uint8, np.uint16):
        raise FileError(path, "cannot hold label values below 0 or above 65535", "write .tif or .nii.gz instead")
    if ending == ".bmp" and array.dtype != np.uint8:
        raise FileError(path, "cannot hold values above 254", "write .png or .tif instead")
    buffer = io.BytesIO()
    Pillow.fromarray(array).save(buffer, _PILLOW_FORMATS[ending])
    write_bytes(path, buffer.getvalue())


@contextmanager
def _open(path: Path, files: OpenFiles | None) -> Iterator[Any]:
    """Open with the decoder that the first bytes ask for.

    Decoders are called directly: `PIL.Image.open` warns or fails above a size that honest microscopy reaches.
    """
    from PIL.BmpImagePlugin import BmpImageFile
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile

    decoders: dict[bytes, Callable[[BinaryIO], Any]] = {
        _PNG_MAGIC: PngImageFile,
        b"\xff\xd8": JpegImageFile,
        b"BM": BmpImageFile,
    }
    with opened(path, files) as handle:
        start = handle.read(8)
        handle.seek(0)
        decoder = next((decoder for magic, decoder in decoders.items() if start.startswith(magic)), None)
        if decoder is None:
            raise foreign(path, "a PNG, JPEG or BMP image", files)
        try:
            picture = decoder(handle)
        except SyntaxError as error:  # how decoders say that a header is wrong
            raise FileError(path, f"cannot be read (corrupt header: {error})", COPY_AGAIN) from None
        with picture:
            require_room(path, picture.size, picture.width * picture.height * len(picture.getbands()))
            if getattr(picture, "n_frames", 1) > 1:
                raise FileError(path, "is animated: it has several frames", "save the one that is meant")
            yield picture


def _deep_mode(picture: Any) -> str:
    """Return how a PNG stores 16 bits per colour (``RGB;16B``), of which Pillow keeps 8; empty for other pictures."""
    mode = _raw_mode(picture)
    return mode if "16" in mode and picture.mode in ("RGB", "RGBA", "LA") else ""


def _raw_mode(picture: Any) -> str:
    """Return how the pixels are stored, in Pillow's names."""
    return next((tile[3] for tile in picture.tile if isinstance(tile[3], str)), "")


def _image(pixels: NDArray[Any]) -> Image:
    array = pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    grid = Grid(array.shape[1:], (1.0, 1.0), spacing_known=False)
    return Image(array.astype(array.dtype.newbyteorder("="), copy=False), grid)
