"""Hashes of cases: whatever an image consists of counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segfit.dataset.contents import FileHashes
from segfit.dataset.manifest import Case
from segfit.errors import InputError
from segfit.files import hash_file
from segfit.geometry import Grid
from segfit.images.formats import write_labels
from segfit.images.image import LabelMap
from series_builder import clutter, write_series

GRID = Grid((2, 3, 4), (1.0, 1.0, 1.0))
LABELS = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize(
    ("ending", "part"), [(".mhd", "a.zraw"), (".nhdr", "a.raw.gz"), (".zarr", "a.zarr/0/0/0/0"), (".nrrd", "a.nrrd")]
)
def test_every_part_of_an_image_counts(tmp_path: Path, ending: str, part: str) -> None:
    path = tmp_path / f"a{ending}"
    write_labels(path, LabelMap(LABELS, GRID))
    case = Case(id="a", images=(path,), label=path)
    before, hashes = FileHashes().case(case), FileHashes()
    assert hashes.case(case) == before
    changed = tmp_path / part
    changed.write_bytes(changed.read_bytes() + b"x")
    assert hashes.case(case) != before
    assert FileHashes().case(case) == hashes.case(case)


@pytest.mark.parametrize("folder", ["a", "a/series"])
def test_every_slice_of_a_series_counts_and_nothing_else(tmp_path: Path, folder: str) -> None:
    series = write_series(tmp_path / folder, LABELS)
    case = Case(id="a", images=(tmp_path / "a",))
    before, hashes = FileHashes().case(case), FileHashes()
    for path in {series, tmp_path / "a"}:
        clutter(path)
    assert hashes.case(case) == before
    seen = {before}
    for path in sorted(series.glob("slice*")):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert hashes.case(case) not in seen
        seen.add(hashes.case(case))
    assert len(seen) == 3
    assert FileHashes().case(case) == hashes.case(case)


def test_an_image_of_one_file_has_the_hash_of_the_file(tmp_path: Path) -> None:
    write_labels(tmp_path / "a.nii.gz", LabelMap(LABELS, GRID))
    assert FileHashes().image(tmp_path / "a.nii.gz") == hash_file(tmp_path / "a.nii.gz")


def test_the_place_of_a_dataset_does_not_count(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_labels(tmp_path / folder / "a.zarr", LabelMap(LABELS, GRID))
    hashes = FileHashes()
    assert hashes.image(tmp_path / "one" / "a.zarr") == hashes.image(tmp_path / "two" / "a.zarr")


def test_lost_files_are_explained(tmp_path: Path) -> None:
    write_labels(tmp_path / "a.mhd", LabelMap(LABELS, GRID))
    (tmp_path / "a.zraw").unlink()
    with pytest.raises(InputError, match=r"a\.zraw cannot be read \(No such file or directory\); restore it"):
        FileHashes().image(tmp_path / "a.mhd")


def test_a_part_added_beside_a_link_to_nothing_counts(tmp_path: Path) -> None:
    path, hashes = tmp_path / "a.zarr", FileHashes()
    write_labels(path, LabelMap(LABELS, GRID))
    (path / "link").symlink_to(tmp_path / "nowhere")
    before = hashes.image(path)
    (path / "further").write_bytes(b"x")
    assert hashes.image(path) != before


@pytest.mark.parametrize("beside", ["images/a.json", "images/a_0000.json", "images/b.json", "labels/c.json"])
def test_every_file_that_tells_a_spacing_counts(tmp_path: Path, beside: str) -> None:
    images, label = [tmp_path / "images" / f"{name}_0000.tif" for name in "ab"], tmp_path / "labels" / "c.tif"
    for path in (*images, label):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    case, hashes = Case(id="a", images=tuple(images), label=label), FileHashes()
    before = hashes.case(case)
    (tmp_path / beside).write_text("1")
    told = hashes.case(case)
    (tmp_path / beside).write_text("22")
    assert len({before, told, hashes.case(case)}) == 3
    assert hashes.of(case).case(case) == hashes.case(case)


def test_what_was_not_looked_at_again_does_not_count_as_read(tmp_path: Path) -> None:
    path, hashes = tmp_path / "a.nii.gz", FileHashes(tmp_path / "hashes.json")
    write_labels(path, LabelMap(LABELS, GRID))
    digest = hashes.image(path)
    hashes.save()
    path.unlink()
    assert hashes.as_read().image(path) == digest
    hashes.look_again()
    for unread in (hashes.as_read(), FileHashes(tmp_path / "hashes.json").as_read()):
        with pytest.raises(InputError, match="cannot be read"):
            unread.image(path)
