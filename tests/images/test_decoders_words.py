"""What decoders print by themselves becomes a remark or an error of the file, or nothing, and never stands alone."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image as Pillow

from segfit.images import libtiff
from segfit.images.formats import check, read_image
from segfit.images.image import FileError
from series_builder import write_series

_RNG = np.random.default_rng(0)
_PIXELS = _RNG.integers(0, 255, (40, 50)).astype(np.uint8)
_EXIF = b"MM\0*\0\0\0\x08\0\x05garbage"


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _with_chunks(path: Path, *chunks: bytes) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[:33] + b"".join(chunks) + content[33:])
    return path


def _tiff(path: Path, tag: int, field: int, value: int) -> Path:
    """Write a TIFF and change one field of one tag: 2 its type, 4 its length, 8 its place."""
    tifffile.imwrite(path, _PIXELS, photometric="minisblack")
    content = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", content, 4)
    (number,) = struct.unpack_from("<H", content, start)
    places = range(start + 2, start + 2 + 12 * number, 12)
    place = next(at for at in places if struct.unpack_from("<H", content, at)[0] == tag)
    struct.pack_into("<H" if field == 2 else "<I", content, place + field, value)
    path.write_bytes(content)
    return path


def _packed(path: Path, compression: str, start: int, damage: bytes) -> Path:
    Pillow.fromarray(_PIXELS > 128 if compression == "group4" else _PIXELS).save(path, compression=compression)
    content = path.read_bytes()
    path.write_bytes(content[:start] + damage + content[start + len(damage) :])
    return path


@pytest.mark.parametrize(
    ("compression", "start", "damage"),
    [("group4", 60, b"\x55" * 30), ("jpeg", 300, b"\xff" * 30), ("tiff_lzw", 200, b"\xff" * 60)],
)
def test_damaged_pixels_that_pillow_lets_pass_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], compression: str, start: int, damage: bytes
) -> None:
    good, bad = _packed(tmp_path / "a.tif", compression, 60, b""), tmp_path / "b.tif"
    assert read_image(good).array.shape == (1, 40, 50)
    with pytest.raises(FileError) as caught:
        read_image(_packed(bad, compression, start, damage))
    assert caught.value.problem.startswith("is damaged: its compressed pixels cannot be unpacked (")
    assert caught.value.path == bad
    assert caught.value.action
    assert capfd.readouterr().err == ""


def test_what_libtiff_says_is_that_of_one_file_in_any_thread(tmp_path: Path) -> None:
    paths = [_packed(tmp_path / f"good{n}.tif", "group4", 60, b"") for n in range(6)]
    paths += [_packed(tmp_path / f"bad{n}.tif", "group4", 60, b"\x55" * 30) for n in range(6)]

    def damaged(path: Path) -> bool:
        try:
            read_image(path)
        except FileError:
            return True
        return False

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(damaged, paths)) == [False] * 6 + [True] * 6


def test_pictures_are_read_where_libtiff_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libtiff, "_functions", lambda: None)
    assert read_image(_packed(tmp_path / "a.tif", "tiff_lzw", 60, b"")).array.shape == (1, 40, 50)


@pytest.mark.parametrize(
    ("tag", "field", "value", "said"),
    [
        (282, 2, 99, "tag 282: invalid data type 99"),
        (282, 8, 2**31, "tag 282: invalid value offset 2147483648"),
        (305, 8, 2**31, "tag 305: invalid value offset 2147483648"),
    ],
)
def test_what_tifffile_logs_is_a_remark_on_the_file(
    tmp_path: Path, tag: int, field: int, value: int, said: str
) -> None:
    path = _tiff(tmp_path / "a.tif", tag, field, value)
    image = read_image(path)
    assert np.array_equal(image.array[0], _PIXELS)
    [remark] = check(path, image)
    assert said in remark.problem
    assert remark.action
    sound = tmp_path / "b.tif"
    tifffile.imwrite(sound, _PIXELS)
    assert check(sound, read_image(sound)) == ()


def test_texts_and_profiles_do_not_bear_on_deep_pictures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pixels = _RNG.integers(0, 60000, (8, 9, 3)).astype(np.uint16)
    path = tmp_path / "a.png"
    sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=True), str(path))
    _with_chunks(path, _chunk(b"iCCP", b"x\0\0garbage"), _chunk(b"zTXt", b"c\0\0garbage"))
    assert np.array_equal(read_image(path).array, np.moveaxis(pixels, -1, 0))
    assert capfd.readouterr().err == ""


def _odd_files(root: Path) -> dict[str, Callable[[Path], object]]:
    """Return how to write files of which decoders print something, by name in ``images/``."""
    volume = _RNG.integers(-1000, 1000, (6, 7, 8)).astype(np.int16)

    def picture(path: Path) -> None:
        Pillow.fromarray(np.stack([_PIXELS] * 3, axis=-1)).save(path)
        _with_chunks(path, _chunk(b"eXIf", _EXIF))

    def series(path: Path) -> None:
        for file in write_series(path, volume.transpose(2, 1, 0)).iterdir():
            slice_ = pydicom.dcmread(file)
            slice_.SpecificCharacterSet = "ISO_IR 100"
            slice_.PatientName = "abc"
            slice_.save_as(file)
            content = file.read_bytes()
            assert b"ISO_IR 100" in content
            file.write_bytes(content.replace(b"ISO_IR 100", b"ISO_IR 999"))

    return {
        "tag.tif": lambda path: _tiff(path, 282, 2, 99),
        "fax.tif": lambda path: _packed(path, "group4", 60, b"\x55" * 30),
        "exif.png": picture,
        "series": series,
        "far.nii": lambda path: nibabel.save(nibabel.Nifti1Image(volume, np.diag([1e38, 1, 1, 1])), path),
        "far.mgz": lambda path: nibabel.save(nibabel.MGHImage(volume, np.diag([1e38, 1e38, 1, 1])), path),
    }


@pytest.mark.filterwarnings("ignore")  # of the libraries that write the files
@pytest.mark.parametrize("name", _odd_files(Path()))
def test_nothing_stands_between_the_lines_of_a_check(tmp_path: Path, name: str) -> None:
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    _odd_files(tmp_path)[name](tmp_path / "images" / name)
    flat = name.endswith((".tif", ".png"))
    label = np.zeros((40, 50) if flat else (6, 7, 8), np.uint8)
    label[2:4, 2:4] = 1
    if flat:
        Pillow.fromarray(label).save(tmp_path / "labels" / f"{Path(name).stem}.png")
    else:
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), tmp_path / "labels" / f"{Path(name).stem}.nii.gz")
    command = [sys.executable, "-m", "segfit", "check", str(tmp_path), "--json"]
    around = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=around)
    assert json.loads(done.stdout)["problems"]
    told = [line for line in done.stderr.splitlines() if not line.startswith(("Checking cases", "Reading labels"))]
    assert told == []
