"""What the check says of headers: contradictions, missing places, sizes in a mistaken unit."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from dataset_builder import build

from segfit.dataset.checks import check_dataset
from segfit.errors import Problem


def change(path: Path, **fields: Any) -> None:
    """Change fields of a header."""
    content = gzip.decompress(path.read_bytes())
    header = nibabel.Nifti1Header(content[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(gzip.compress(header.binaryblock + content[348:], 1))


def rescale(root: Path, case: str, factors: tuple[float, ...]) -> None:
    """Make the voxels of all files of a case larger, or smaller, by a factor per axis (x, y, z)."""
    for path in sorted(root.glob(f"*Tr/{case}*.nii.gz")):
        rows = np.diag([*factors, 1.0])
        change(path, pixdim=(1, *factors, 1, 1, 1, 1), srow_x=rows[0], srow_y=rows[1], srow_z=rows[2])


def test_what_all_files_of_a_case_say_is_told_once(tmp_path: Path) -> None:
    root = build(tmp_path)
    for path in root.glob("*Tr/b*.nii.gz"):
        change(path, qform_code=1, qoffset_x=7)
    change(root / "labelsTr" / "c.nii.gz", qform_code=1, qoffset_x=9)
    text = "has an sform and a qform (codes 2 and 1) that lie up to {} mm apart; the sform is used, other programs"
    (first, second) = check_dataset(root)
    assert (first.case, first.fatal) == ("b", False)
    assert first.problem.startswith(f"b_0000.nii.gz {text.format(7)}")
    assert (second.case, second.fatal) == ("c", False)
    assert second.problem.startswith(f"c.nii.gz {text.format(9)}")


def test_skewed_axes_are_told(tmp_path: Path) -> None:
    root = build(tmp_path)
    for path in root.glob("*Tr/b*.nii.gz"):
        change(path, srow_x=(1, 0.5, 0, 0))
    told = check_dataset(root)
    assert Problem(
        "b", "b_0000.nii.gz has axes that are 27 degrees off right angles, which is ignored",
        "resample it to a grid with right angles, or correct its header", False,
    ) in told  # fmt: skip
    for path in root.glob("*Tr/b*.nii.gz"):
        change(path, srow_x=(1, 1e-3, 0, 0))
    assert check_dataset(root) == ()


def test_volumes_without_a_place(tmp_path: Path) -> None:
    root = build(tmp_path)
    tail = "have no sform or qform; RAS+ is assumed"
    action = "write the true orientation into the headers (sform)"
    for count, cases in ((2, "bd"), (5, "abcde")):
        for case in cases:
            for path in root.glob(f"*Tr/{case}*.nii.gz"):
                change(path, sform_code=0, qform_code=0)
        first = cases[0]
        assert check_dataset(root) == (Problem("dataset", f"{count} of 5 cases (first {first}) {tail}", action, False),)


@pytest.mark.parametrize(
    ("factors", "told"),
    [
        ((1000, 1000, 1000), True),
        ((0.001, 0.001, 0.001), True),
        ((10, 10, 10), True),  # cm for mm
        ((0.1, 0.1, 0.1), True),
        ((4, 4, 4), False),
        ((1, 1, 10), False),  # thick slices
        ((1, 1, 25), True),
    ],
)
def test_mistaken_units(tmp_path: Path, factors: tuple[float, ...], told: bool) -> None:
    root = build(tmp_path)
    rescale(root, "b", factors)
    size = ", ".join(f"{factor:.4g}" for factor in factors[::-1])
    problem = f"its voxel size is ({size}) mm, the median of the dataset (1, 1, 1) mm"
    expected = Problem("b", problem, "correct the voxel size in its header if the unit was mistaken", False)
    assert check_dataset(root) == ((expected,) if told else ())


def test_metres_in_all_cases(tmp_path: Path) -> None:
    root = build(tmp_path)
    for path in root.glob("*Tr/*.nii.gz"):
        change(path, xyzt_units=1)
    problem = "the median voxel size is (1000, 1000, 1000) mm, which is implausibly large"
    action = "correct the voxel size in the headers if the unit was mistaken"
    assert check_dataset(root) == (Problem("dataset", problem, action, False),)


def test_pairs_of_analyze_are_named(tmp_path: Path) -> None:
    root = build(tmp_path, channels=1)
    for path in root.glob("imagesTr/*.nii.gz"):
        path.rename(path.with_name(path.name.replace(".nii.gz", ".hdr")))
    assert any("found 5 .hdr" in item.problem for item in check_dataset(root))


def test_an_axis_too_many_is_to_be_left_out(tmp_path: Path) -> None:
    """A slice of one voxel is no place to resample: what is 2D must be so in all files of a case."""
    root = build(tmp_path)
    flat = np.arange(30, dtype=np.float32).reshape(6, 5)
    for path in root.glob("images*/*.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(flat, np.eye(4)), path)
    for path in root.glob("labels*/*.nii.gz"):
        nibabel.save(nibabel.Nifti1Image((flat > 9).astype(np.uint8)[..., None], np.eye(4)), path)
    told = [item for item in check_dataset(root) if item.fatal]
    assert {item.action for item in told} == {"save both with 2 axes, without the axis of length 1"}
