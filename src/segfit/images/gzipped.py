"""Files with a binary header and the voxels behind it, plain or gzipped as a whole (NIfTI, MGH).

One pass over the bytes shows truncation before anything is computed, and neither the packed nor the unpacked file is in
memory as a whole.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from isal import igzip
from numpy.typing import NDArray

from segfit.files import write_bytes
from segfit.images.image import FileError, require_memory
from segfit.images.open_files import OpenFiles, opened

__all__ = ["GZIP_MAGIC", "first_bytes", "read_voxels", "unpacked", "write"]

GZIP_MAGIC = b"\x1f\x8b"
_COMPRESSION_LEVEL = 3  # on label maps as fast as level 1 and smaller; level 6 takes four times as long (measured)
_MOST_PACKED = 1032  # bytes that one byte of a gzipped file can stand for
_PIECE = 1 << 18  # bytes unpacked at a time: what stays in the cache
_FIRST_BYTES = 4096  # of a gzipped file: the header is among them


@contextmanager
def unpacked(path: Path, files: OpenFiles | None) -> Iterator[BinaryIO | gzip.GzipFile]:
    """Open a file for reading, unpacked if it is gzipped."""
    with opened(path, files) as handle:
        start = handle.read(2)
        handle.seek(0)
        if start != GZIP_MAGIC:
            yield handle
            return
        with igzip.open(handle) as stream:  # type: ignore[no-untyped-call] # twice as fast as gzip's
            try:
                yield stream
            except gzip.BadGzipFile as error:
                if "Not a gzipped file" not in str(error):
                    raise
                action = "copy it again, or unpack it with gunzip and gzip it again"
                raise FileError(path, "has trailing data after the gzip stream", action) from error


def first_bytes(path: Path, files: OpenFiles | None, length: int) -> bytes:
    """Return the first bytes of what a file holds, unpacked: `length`, or fewer if there are no more."""
    with opened(path, files) as handle:
        content = handle.read(_FIRST_BYTES)
    if content[:2] != GZIP_MAGIC:
        return content[:length]
    start = b""
    while content[:2] == GZIP_MAGIC and len(start) < length:  # a gzip file may have several parts
        part = zlib.decompressobj(wbits=31)
        start += part.decompress(content, length - len(start))
        content = part.unused_data
    return start


def read_voxels(
    path: Path,
    stream: BinaryIO | gzip.GzipFile,
    start: bytes,
    offset: int,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
) -> NDArray[Any]:
    """Read the array that begins `offset` bytes from the beginning, and what follows to the end, where the checksum is.

    Raises `FileError` for a file that is too short, and before memory is taken if it cannot hold the array or the
    memory is not free.

    Parameters
    ----------
    stream : the file, from `unpacked`
    start : what was already read of it, the header
    dtype : as stored, with its byte order
    shape : slowest axis first; one in front of length 1 is not told
    """
    expected, size = math.prod(shape) * dtype.itemsize, path.stat().st_size
    if offset + expected > _MOST_PACKED * size:
        raise FileError(path, f"is truncated (it cannot hold {expected} bytes)", "copy or export it again")
    if not isinstance(stream, gzip.GzipFile) and offset + expected > size:
        raise _truncated(path, max(0, size - offset), expected)
    require_memory(path, shape[shape[0] == 1 :][::-1], expected)
    skipped = len(start)
    while skipped < offset and (piece := stream.read(min(_PIECE, offset - skipped))):
        skipped += len(piece)
    array = np.empty(shape, dtype)
    found = _fill(array, start[offset:], stream)
    if found < expected:
        raise _truncated(path, found, expected)
    while stream.read(_PIECE):
        pass
    return array


def _truncated(path: Path, found: int, expected: int) -> FileError:
    return FileError(path, f"is truncated ({found} of {expected} bytes of voxels)", "copy or export it again")


def _fill(array: NDArray[Any], start: bytes, stream: BinaryIO | gzip.GzipFile) -> int:
    """Fill an array with `start` and what follows; return the bytes there were."""
    target = array.reshape(-1).view(np.uint8)
    found = min(len(start), array.nbytes)
    target[:found] = np.frombuffer(start[:found], np.uint8)
    while found < array.nbytes and (piece := stream.read(min(_PIECE, array.nbytes - found))):
        target[found : found + len(piece)] = np.frombuffer(piece, np.uint8)
        found += len(piece)
    return found


def write(path: Path, content: bytes, *, packed: bool) -> None:
    """Write a file atomically, gzipped if it is to be packed; equal contents give equal files."""
    write_bytes(path, gzip.compress(content, _COMPRESSION_LEVEL, mtime=0) if packed else content)
