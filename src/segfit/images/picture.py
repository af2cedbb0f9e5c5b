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
from segfit.images import itk
from segfit.images.image import FileError, Image, reading

__all__ = ["is_turned", "num_voxels", "read", "read_grid", "read_label", "write"]

_PNG_MAGIC = b"\x89PNG"
_ORIENTATION = 0x0112  # EXIF 2.3, 4.6.4 A: 1 is upright
_PILLOW_FORMATS = {".png": "PNG", ".bmp": "BMP"}
# Pillow's mode -> mode with the channels we hand out. Other modes (L, RGB, RGBA, I;16, I, F) stay as they are.
_CONVERSION = {"1": "L", "LA": "L", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "LAB": "RGB", "HSV": "RGB"}


def read(path: Path) -> Image:
    """Read a picture as (c, y, x): 1 channel (grey), 3 (RGB) or 4 (RGBA), 8 or 16 bit as stored.

    Palette pictures become RGB (RGBA with transparency); transparency of grey pictures is dropped.
    """
    with reading(path), _open(path) as picture:
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


def read_label(path: Path) -> Image:
    """Read a label picture as (1, y, x): grey values, palette indices, or 0 and 1 of a black and white picture."""
    with reading(path), _open(path) as picture:
        mode = picture.mode
        if _deep_mode(picture):
            raise FileError(path, "has 16 bits per colour", "save labels as one channel of label values")
        pixels = np.array(picture.getchannel(0) if mode in ("LA", "PA") else picture)
    return _image(pixels.astype(np.uint8) if pixels.dtype == bool else pixels)


def read_grid(path: Path) -> Grid:
    """Read the size alone."""
    with reading(path), _open(path) as picture:
        return _picture_grid((picture.height, picture.width))


def is_turned(path: Path) -> bool:
    """Return whether a picture asks to be turned or mirrored for display (EXIF), which is not done here."""
    with reading(path), _open(path) as picture:
        return picture.getexif().get(_ORIENTATION, 1) not in (0, 1)


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
    if getattr(picture, "n_frames", 1) > 1:
        picture.close()
        raise FileError(path, "is animated: it holds several pictures", "save the one that is meant")
    return picture


def _deep_mode(picture: Any) -> str:
    """Return how a PNG stores 16 bits per colour (``RGB;16B``), of which Pillow keeps 8; empty for other pictures."""
    modes = [tile[3] for tile in picture.tile if isinstance(tile[3], str)]
    return next((mode for mode in modes if "16" in mode and picture.mode in ("RGB", "RGBA", "LA")), "")


def _image(pixels: NDArray[Any]) -> Image:
    array = pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    return Image(array.astype(array.dtype.newbyteorder("="), copy=False), _picture_grid(array.shape[1:]))


def _picture_grid(shape: tuple[int, ...]) -> Grid:
    return Grid(shape, (1.0,) * len(shape))
