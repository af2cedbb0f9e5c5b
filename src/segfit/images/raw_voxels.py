"""What text headers have in common (NRRD, MetaImage), and the voxels behind them: unpacked and counted.

So voxels refute a wrong header.
"""

from __future__ import annotations

import bz2
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from segfit.images.image import COPY_AGAIN, FileError, require_memory
from segfit.images.open_files import OpenFiles, opened
from segfit.text import count as amount

__all__ = ["COMPRESSION_LEVEL", "Encoding", "Payload", "TextHeader", "numbers", "whole_numbers"]

COMPRESSION_LEVEL = 3  # as of NIfTI: on label maps as fast as level 1 and smaller
Encoding = Literal["raw", "zlib", "bzip2", "text", "hex"]
_PIECE = 1 << 18  # bytes unpacked at a time
_MOST_PACKED = {"zlib": 1032, "bzip2": 1_100_000}  # bytes that one of a packed file can stand for
_GZIP_OR_ZLIB = 47  # window bits that find out which of the two it is
_GZIP_MAGIC = b"\x1f\x8b"
_PATTERN = re.compile(r"%\d*d")  # for the numbers of several files


@dataclass(frozen=True, slots=True)
class TextHeader:
    """The fields of a file, by their names in small letters, and how many bytes they take."""

    path: Path
    fields: Mapping[str, str]
    length: int

    def field(self, name: str) -> str:
        """Return a field; `FileError` if there is none."""
        value = self.fields.get(name.lower())
        if not value:
            raise FileError(self.path, f'has no "{name}" in its header', "export it again, or write it into the header")
        return value

    def file_beside(self, name: str) -> Path:
        """Return the file that the header names as that of its voxels; `FileError` for several."""
        if name.upper().startswith("LIST") or _PATTERN.search(name):
            raise FileError(self.path, "keeps its voxels in several files", "save it as one .nrrd or .mha")
        return self.path.parent / name


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """What a header says of its voxels.

    Parameters
    ----------
    path : the image, which messages name
    file : where the voxels are; the image itself, or the file that its header names: `FileError` if that is not there
    start : bytes of `file` before them
    dtype : as stored, with its byte order
    shape : of the stored array, slowest axis first
    skip_lines, skip_bytes : what to leave out behind `start`, the bytes after unpacking; -1: all bytes but those at the
        end that the array needs
    """

    path: Path
    file: Path
    start: int
    encoding: Encoding
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    skip_lines: int = 0
    skip_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.file.is_file():
            problem = (
                f"keeps its voxels in {self.file.name}, which is {'a folder' if self.file.is_dir() else 'missing'}"
            )
            raise FileError(self.path, problem, "copy both files, or correct the name in its header")

    def read(self, files: OpenFiles | None = None) -> NDArray[Any]:
        """Return the array in native byte order; `FileError` unless there are exactly as many voxels as it needs."""
        with opened(self.file, files) as handle:
            handle.seek(self.start)
            for _ in range(self.skip_lines):
                if not handle.readline():
                    break  # what a header says is longer than any file
            array = self._text(handle) if self.encoding == "text" else self._binary(handle)
        return array.astype(self.dtype.newbyteorder("="), copy=False).reshape(self.shape)

    def _text(self, handle: BinaryIO) -> NDArray[Any]:
        words = handle.read().replace(b",", b" ").split()
        if len(words) != prod(self.shape):
            raise self._wrong_size(len(words), prod(self.shape), "numbers")
        try:
            return np.array(words).astype(self.dtype)
        except (ValueError, OverflowError):
            problem = f"has voxels that are not numbers of type {self.dtype.name}"
            raise FileError(self.path, problem, COPY_AGAIN) from None

    def _binary(self, handle: BinaryIO) -> NDArray[Any]:
        expected = prod(self.shape) * self.dtype.itemsize
        held = self.file.stat().st_size * _MOST_PACKED.get(self.encoding, 1)  # where more is declared, it is truncated
        require_memory(self.path, self.shape[::-1], min(expected, held))
        skip = max(0, self.skip_bytes)
        content = bytearray()
        for piece in self._pieces(handle):
            content += piece[skip:]
            skip = max(0, skip - len(piece))
            if len(content) > expected:
                if self.skip_bytes >= 0:
                    raise self._wrong_size(None, expected, "bytes of voxels")
                if len(content) > 2 * expected + _PIECE:
                    del content[: len(content) - expected]  # the last ones count
        if len(content) < expected:
            raise self._wrong_size(len(content), expected, "bytes of voxels")
        return np.frombuffer(content, self.dtype, offset=len(content) - expected)

    def _pieces(self, handle: BinaryIO) -> Iterator[bytes]:
        match self.encoding:
            case "raw":
                yield from iter(lambda: handle.read(_PIECE), b"")
            case "hex":
                try:
                    yield bytes.fromhex(handle.read().decode("ascii"))
                except ValueError:
                    raise FileError(self.path, "has voxels that are not hexadecimal numbers", COPY_AGAIN) from None
            case "zlib" | "bzip2":
                try:
                    yield from self._unpacked(handle)
                except (OSError, isal_zlib.error) as error:  # type: ignore[misc]
                    problem = f"is damaged: its compressed voxels cannot be unpacked ({error})"
                    raise FileError(self.path, problem, COPY_AGAIN) from error

    def _unpacked(self, handle: BinaryIO) -> Iterator[bytes]:
        def unpacker() -> Any:
            return bz2.BZ2Decompressor() if self.encoding == "bzip2" else isal_zlib.decompressobj(wbits=_GZIP_OR_ZLIB)

        stream = unpacker()
        while packed := handle.read(_PIECE):
            while True:
                while True:
                    yield (unpacked := stream.decompress(packed, _PIECE))
                    packed = b"" if self.encoding == "bzip2" else stream.unconsumed_tail
                    if stream.eof or not (packed or len(unpacked) == _PIECE):
                        break
                packed = stream.unused_data
                if not (stream.eof and packed.startswith(_GZIP_MAGIC)):
                    break
                stream = unpacker()  # a gzip file may have several parts
            if stream.eof:
                return
        if not stream.eof:
            raise FileError(self.path, "is truncated (the end of its compressed voxels is missing)", COPY_AGAIN)

    def _wrong_size(self, found: int | None, expected: int, what: str) -> FileError:
        asked = f"{' x '.join(map(str, self.shape[::-1]))} of type {self.dtype.name}"
        if found is not None and found < expected:
            return FileError(self.path, f"is truncated ({found} of {expected} {what}: {asked})", COPY_AGAIN)
        problem = f"has more {what} than the {expected} declared in its header ({asked})"
        return FileError(self.path, problem, "correct sizes and type in its header, or export it again")


def numbers(path: Path, field: str, text: str, count: int) -> list[float]:
    """Return the numbers of a line of a header; `FileError` unless there are `count`."""
    try:
        values = [float(word) for word in text.split()]
    except ValueError:
        values = []
    if len(values) != count:
        raise _unexpected(path, field, text, amount(count, "number"))
    return values


def whole_numbers(path: Path, field: str, text: str, count: int, least: int) -> list[int]:
    """Return the numbers of a line of a header as `numbers` does; `FileError` unless all are whole, `least` or more."""
    values = numbers(path, field, text, count)
    if not all(value.is_integer() and value >= least for value in values):
        raise _unexpected(path, field, text, f"whole numbers of {least} or more")
    return [int(value) for value in values]


def _unexpected(path: Path, field: str, text: str, expected: str) -> FileError:
    problem = f'has "{field}" {text.strip()!r} in its header, expected {expected}'
    return FileError(path, problem, "correct it or export it again")
