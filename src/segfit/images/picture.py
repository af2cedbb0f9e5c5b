"""PNG, JPEG and BMP pictures: two spatial axes, one to four channels."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.files import write_bytes
from segfit.geometry import Grid
from segfit.images.image import FileError, Image, reading

__all__ = ["num_voxels", "read", "read_grid", "read_label", "write"]

_PNG_MAGIC = b"\x89PNG"
_PILLOW_FORMATS = {".png": "PNG", ".bmp": "BMP"}
# Pillow's mode -> mode with the channels we hand out. Other modes (L, RGB, RGBA, I;16, I, F) stay as they are.
_CONVERSION = {"1": "L", "LA": "L", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "LAB": "RGB", "HSV": "RGB"}


def read(path: Path) -> Image:
    """Read a picture as (c, y, x): 1 channel (grey), 3 (RGB) or 4 (RGBA), 8 or 16 bit as stored.

    Palette pictures become RGB (RGBA with transparency); transparency of grey pictures is dropped.
    """
    with reading(path), _open(path) as picture:
        if picture.mode == "P":
            mode = "RGBA" if "transparency" in picture.info else "RGB"
        else:
            mode = _CONVERSION.get(picture.mode, picture.mode)
        pixels = np.array(picture if mode == picture.mode else picture.convert(mode))
    return _image(pixels)


def read_label(path: Path) -> Image:
    """Read a label picture as (1, y, x): grey values, palette indices, or 0 and 1 of a black and white picture."""
    with reading(path), _open(path) as picture:
        mode = picture.mode
        pixels = np.array(picture.getchannel(0) if mode in ("LA", "PA") else picture)
    return _image(pixels.astype(np.uint8) if pixels.dtype == bool else pixels)


def read_grid(path: Path) -> Grid:
    """Read the size alone."""
    with reading(path), _open(path) as picture:
        return _picture_grid((picture.height, picture.width))


def num_voxels(path: Path) -> int:
    """Return the number of pixels; of a PNG without its decoder: the first chunk begins with width and height."""
    with reading(path), path.open("rb") as handle:
        start = handle.read(24)
    if start.startswith(_PNG_MAGIC) and len(start) == 24:
        return int.from_bytes(start[16:20], "big") * int.from_bytes(start[20:24], "big")
    height, width = read_grid(path).shape
    return height * width


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


def _open(path: Path) -> Any:
    """Open with the decoder that the first bytes ask for.

    Decoders are called directly: `PIL.Image.open` warns or fails above a size that honest microscopy reaches.
    """
    from PIL.BmpImagePlugin import BmpImageFile
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile

    with path.open("rb") as handle:
        start = handle.read(8)
    if not start:
        raise FileError(path, "is empty", "copy or export it again, or remove the case")
    decoders: dict[bytes, Callable[[Path], Any]] = {
        _PNG_MAGIC: PngImageFile,
        b"\xff\xd8": JpegImageFile,
        b"BM": BmpImageFile,
    }
    for magic, decoder in decoders.items():
        if start.startswith(magic):
            picture = decoder(path)
            break
    else:
        raise FileError(path, "is not a PNG, JPEG or BMP picture", "export it again or correct its ending")
    raw_modes = [tile[3] for tile in picture.tile if isinstance(tile[3], str)]  # PNG: "RGB;16B" has 16 bits per colour
    if picture.mode in ("RGB", "RGBA", "LA") and any("16" in mode for mode in raw_modes):
        picture.close()
        raise FileError(path, "has 16 bits per colour, which cannot be read without loss", "export it as .tif")
    return picture


def _image(pixels: NDArray[Any]) -> Image:
    array = pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    return Image(array.astype(array.dtype.newbyteorder("="), copy=False), _picture_grid(array.shape[1:]))


def _picture_grid(shape: tuple[int, ...]) -> Grid:
    return Grid(shape, (1.0,) * len(shape))
