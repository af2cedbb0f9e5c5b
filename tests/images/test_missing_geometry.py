"""Headers that do not say, or say impossibly, how large voxels are and where they lie."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from segfit.images.formats import read_grid, read_image
from segfit.images.image import FileError


def header(path: Path, **fields: Any) -> Path:
    """Write a file whose header has these raw fields."""
    image = nibabel.Nifti1Image(np.zeros((4, 3, 2), np.int16), np.diag([1.0, 2.0, 3.0, 1.0]))
    image.set_qform(np.diag([1.0, 2.0, 3.0, 1.0]), 1)
    content = image.to_bytes()
    raw = nibabel.Nifti1Header(content[:348], check=False)
    for name, value in fields.items():
        raw[name] = value
    path.write_bytes(gzip.compress(raw.binaryblock + content[348:]))
    return path


@pytest.mark.parametrize(
    ("pixdim", "told"),
    [
        ((1, 0, 0, 0, 0, 0, 0, 0), "(0.0, 0.0, 0.0)"),
        ((1, np.nan, np.nan, np.nan, 1, 1, 1, 1), "(nan, nan, nan)"),
        ((1, 1, 2, np.inf, 1, 1, 1, 1), "(1.0, 2.0, inf)"),
    ],
)
def test_missing_voxel_sizes_are_refused(tmp_path: Path, pixdim: tuple[float, ...], told: str) -> None:
    path = header(tmp_path / "a.nii.gz", pixdim=pixdim)
    for read in (read_image, read_grid):
        with pytest.raises(FileError) as caught:
            read(path)
        assert str(caught.value) == (
            f"{path} has the voxel size {told} mm (x, y, z); write the true positive sizes into its header (pixdim)"
        )


def test_an_unusable_sform_gives_way_to_the_qform(tmp_path: Path) -> None:
    for row in ((np.nan,) * 4, (0, 0, 0, 0), (np.inf, 0, 0, 0)):
        grid = read_grid(header(tmp_path / "a.nii.gz", srow_x=row))
        np.testing.assert_allclose(grid.affine, np.diag([1.0, 2.0, 3.0, 1.0]), atol=1e-6)  # type: ignore[arg-type]


def test_two_unusable_forms_are_refused(tmp_path: Path) -> None:
    path = header(tmp_path / "a.nii.gz", srow_y=(np.nan,) * 4, qform_code=0)
    with pytest.raises(FileError, match=r"a\.nii\.gz has a singular orientation matrix; export it again with a valid"):
        read_grid(path)


def test_a_place_that_is_not_said_stays_unknown_and_fits_any(tmp_path: Path) -> None:
    unknown = read_grid(header(tmp_path / "a.nii.gz", sform_code=0, qform_code=0))
    assert unknown.affine is None
    assert unknown.spacing_mm == (3.0, 2.0, 1.0)
    known = read_grid(header(tmp_path / "b.nii.gz"))
    assert (known.mismatch(unknown), known.snapped(unknown)) == ("", "")
    assert (unknown.mismatch(known), unknown.snapped(known)) == ("", "")
    larger = read_grid(header(tmp_path / "c.nii.gz", sform_code=0, qform_code=0, pixdim=(1, 1, 2, 4, 1, 1, 1, 1)))
    assert known.mismatch(larger) == "its spacing is (4, 2, 1) mm, expected (3, 2, 1) mm"
