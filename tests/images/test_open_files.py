"""Files that several readers look into are opened once."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from segfit.geometry import Grid
from segfit.images.formats import check, files_of, find_format, read_grid, read_image, read_label, write_labels
from segfit.images.image import LabelMap
from segfit.images.open_files import OpenFiles
from series_builder import clutter, write_series

_OPENS: list[Counter[Path]] = []  # hooks cannot be taken away: it counts where somebody asks


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _OPENS and isinstance(arguments[0], str | bytes):
        _OPENS[-1][Path(os.fsdecode(arguments[0]))] += 1


sys.addaudithook(_hook)


@contextmanager
def _counted() -> Iterator[Counter[Path]]:
    _OPENS.append(Counter())
    try:
        yield _OPENS[-1]
    finally:
        _OPENS.pop()


LABELS = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
_ENDINGS = [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".tif", ".png", ".bmp"]


def _written(folder: Path, ending: str) -> Path:
    path, flat = folder / f"a{ending}", ending in (".png", ".bmp")
    shape = (6, 4) if flat else (2, 3, 4)
    write_labels(path, LabelMap(LABELS.reshape(shape), Grid(shape, (1.0,) * len(shape))))
    return path


@pytest.mark.parametrize("ending", _ENDINGS)
def test_a_file_is_opened_once_for_all_who_look_into_it(tmp_path: Path, ending: str) -> None:
    path = _written(tmp_path, ending)
    with _counted() as opens, OpenFiles() as files:
        image = read_image(path, files=files)
        check(path, image, files)
        label = read_label(path, files=files)
        palette = find_format(path).palette
        if palette is not None:
            palette(path, files)
        parts = files_of(path, files)
    assert np.array_equal(image.array, label.array)
    assert np.array_equal(image.array.ravel(), LABELS.ravel())
    assert {part: opens[part] for part in parts} == dict.fromkeys(parts, 1)


@pytest.mark.parametrize("ending", _ENDINGS)
@pytest.mark.parametrize("read", [read_image, read_label, read_grid])
def test_reading_alone_opens_a_file_once(tmp_path: Path, ending: str, read: Any) -> None:
    path = _written(tmp_path, ending)
    with _counted() as opens:
        read(path)
    assert opens[path] == 1


def test_slices_of_a_series_are_opened_once(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    folder = write_series(tmp_path / "a", np.zeros((40, 3, 4)))  # more files than stay open
    clutter(folder)
    for read in (read_image, read_grid):
        with _counted() as opens:
            read(folder)
        assert {opens[path] for path in folder.glob("slice*")} == {1}
    with _counted() as opens, OpenFiles() as files:
        read_image(folder, files=files)
        assert len(files_of(folder, files)) == 40
    assert {opens[path] for path in folder.glob("slice*")} == {1}


def test_files_are_told_when_they_are_opened_and_read_from_their_start(tmp_path: Path) -> None:
    told: dict[Path, bytes] = {}

    def take(path: Path, handle: BinaryIO) -> None:
        assert path not in told
        told[path] = handle.read()

    paths = [tmp_path / str(number) for number in range(40)]
    for path in paths:
        path.write_bytes(path.name.encode())
    with OpenFiles(take) as files:
        for path in paths:
            assert [files.at_start(path).read() for _ in range(3)] == [path.name.encode()] * 3
            assert [files.start(path, 1) for _ in range(2)] == [path.name.encode()[:1]] * 2
        first = files.at_start(paths[-1])
        assert not first.closed
    assert first.closed
    assert told == {path: path.name.encode() for path in paths}
