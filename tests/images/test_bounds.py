"""No number in a file makes a reader work or take memory without end."""

from __future__ import annotations

import bz2
import gzip
import json
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from segfit.geometry import Grid
from segfit.images import image as image_module
from segfit.images.formats import num_voxels, read_image, write_labels
from segfit.images.image import FileError, LabelMap, problem_of
from series_builder import write_series

_TRILLION = 10**12


def stored(folder: Path, name: str) -> Path:
    """Write zeros in a format."""
    path = folder / name
    shape = (8, 9) if path.suffix in (".png", ".bmp") else (7, 8, 9)
    if name == "series":
        return write_series(path, np.zeros(shape, np.int16))
    write_labels(path, LabelMap(np.zeros(shape, np.int16), Grid(shape, (1.0,) * len(shape))))
    return path


@pytest.mark.parametrize(
    "name", ["a.nii", "a.nii.gz", "a.mgz", "a.mgh", "a.nrrd", "a.mha", "a.png", "a.bmp", "a.tif", "a.zarr", "series"]
)
def test_more_than_is_free_is_told_before_it_is_taken(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored(tmp_path, name)
    monkeypatch.setattr(image_module, "_LARGE_BYTES", 0)
    monkeypatch.setattr(image_module, "free_bytes", lambda: 1 << 20)
    read_image(path)
    monkeypatch.setattr(image_module, "free_bytes", lambda: None)  # not told by every system
    read_image(path)
    monkeypatch.setattr(image_module, "free_bytes", lambda: 20)
    with pytest.raises(FileError) as caught:
        read_image(path)
    problem = problem_of("a", caught.value)
    sizes = "9 x 8" if name in ("a.png", "a.bmp") else "7 x 8 x 9" if name in ("a.zarr", "a.tif") else "9 x 8 x 7"
    assert problem.problem.startswith(f"{name} declares {sizes} voxels in its header; reading them takes ")
    assert problem.transient  # free memory helps: the check is not kept


def nrrd(path: Path, voxels: bytes, **changed: str) -> Path:
    fields = {"type": "uint8", "dimension": "2", "sizes": "5 4", "encoding": "raw"}
    fields |= {name.replace("_", " "): value for name, value in changed.items()}
    lines = "".join(f"{name}: {value}\n" for name, value in fields.items())
    path.write_bytes(f"NRRD0004\n{lines}\n".encode() + voxels)
    return path


@pytest.mark.parametrize("skip", [{"line_skip": str(_TRILLION)}, {"byte_skip": str(_TRILLION)}])
@pytest.mark.parametrize("packed", [False, True])
def test_skipping_ends_with_the_file(skip: dict[str, str], packed: bool, tmp_path: Path) -> None:
    voxels, encoding = (gzip.compress(bytes(20)), "gzip") if packed else (bytes(20), "raw")
    with pytest.raises(FileError, match="is truncated"):
        read_image(nrrd(tmp_path / "a.nrrd", voxels, encoding=encoding, **skip))


@pytest.mark.parametrize("encoding", ["gzip", "bzip2"])
@pytest.mark.parametrize(
    ("skip", "problem"), [("0", "has more bytes of voxels"), (str(_TRILLION), "is truncated"), ("-1", "")]
)
def test_a_bomb_is_unpacked_piece_by_piece(encoding: str, skip: str, problem: str, tmp_path: Path) -> None:
    packed = (zlib if encoding == "gzip" else bz2).compress(bytes(1 << 26))
    path = nrrd(tmp_path / "a.nrrd", packed, encoding=encoding, byte_skip=skip)
    tracemalloc.start()
    try:
        if problem:
            with pytest.raises(FileError, match=problem):
                read_image(path)
        else:
            assert not read_image(path).array.any()
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_the_offset_of_a_nifti_file_is_skipped_piece_by_piece(tmp_path: Path) -> None:
    path = stored(tmp_path, "a.nii")
    content = bytearray(path.read_bytes())
    content[108:112] = np.float32(1 << 26).tobytes()  # vox_offset
    packed = tmp_path / "b.nii.gz"
    packed.write_bytes(gzip.compress(bytes(content) + bytes((1 << 26) - len(content) + 7 * 8 * 9)))
    tracemalloc.start()
    try:
        assert read_image(packed).array.shape == (1, 7, 8, 9)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [(_TRILLION,) * 3, (1000, 1000, 1000)])
def test_chunks_of_a_zarr_array_are_not_looked_up_without_end(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = stored(tmp_path, "a.zarr")
    metadata = json.loads((path / "0" / ".zarray").read_text())
    (path / "0" / ".zarray").write_text(json.dumps(metadata | {"shape": shape, "chunks": [1, 1, 1]}))
    assert num_voxels(path) == np.prod(np.array(shape, dtype=object))
    with pytest.raises(FileError, match=r"declares \d+ chunks of 1 voxels") as caught:
        read_image(path)
    assert not caught.value.transient
    assert zarr.open_array(str(path / "0"), mode="r").shape == shape  # which another program opens


def test_entities_of_ome_xml_are_not_expanded(tmp_path: Path) -> None:
    about = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "aa">]><OME>&a;</OME>'
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 5), np.uint8), description=about, metadata=None)
    with pytest.raises(FileError) as caught:
        read_image(tmp_path / "a.tif")
    assert caught.value.problem == "defines entities in its OME-XML"
