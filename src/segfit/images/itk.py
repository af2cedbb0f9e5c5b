"""Pictures that only ITK decodes in full depth (SimpleITK, extra ``itk``): PNG with 16 bits per colour."""

from __future__ import annotations

import struct
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray

from segfit.images.image import COPY_AGAIN, FileError, optional_package, reading

__all__ = ["read_colours"]

_FIRST_CHUNK = 8  # behind the signature: PNG 1.2, 3.1
_ANCILLARY = 0x20  # bit of the first letter of a chunk's name: 3.3
_BEARING = (b"tRNS", b"sBIT")  # those of them that bear on the pixels


def read_colours(path: Path) -> NDArray[Any]:
    """Read the pixels (y, x, colours) of a PNG; `FileError` where ITK cannot or is not installed."""
    sitk = optional_package(path, "SimpleITK", "SimpleITK", "itk")
    with reading(path), TemporaryDirectory() as folder:
        bare = Path(folder) / "pixels.png"
        bare.write_bytes(_without_remarks(path.read_bytes()))
        try:
            pixels: NDArray[Any] = sitk.GetArrayFromImage(sitk.ReadImage(str(bare), imageIO="PNGImageIO"))
        except RuntimeError as error:  # a page of source lines and addresses, the reason last
            reason = str(error).strip().splitlines()[-1].strip()
            raise FileError(path, f"cannot be read ({reason})", COPY_AGAIN) from error
    return pixels


def _without_remarks(content: bytes) -> bytes:
    """Return a PNG without its texts, profiles and the like: where these are damaged, libpng writes to stderr."""
    kept, place = [content[:_FIRST_CHUNK]], _FIRST_CHUNK
    while place + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, place)
        end = place + 12 + length
        if not name[0] & _ANCILLARY or name in _BEARING:
            kept.append(content[place:end])
        place = end
    return b"".join(kept)
