"""Writes a small good dataset for tests, and spoils it. Written with nibabel and without flushing, which is quick."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

SHAPE = (2, 3, 4)


def write_volume(path: Path, array: np.ndarray | None = None, spacing: float = 1.0, shift: float = 0.0) -> None:
    """Write a NIfTI volume: a ramp unless an array (z, y, x) is given."""
    voxels = np.arange(24, dtype=np.int16).reshape(SHAPE) if array is None else array
    affine = np.diag([spacing] * 3 + [1.0])
    affine[0, 3] = shift
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(nibabel.Nifti1Image(voxels.T, affine, dtype=voxels.dtype).to_bytes(), 1))


def a_label(*values: int) -> np.ndarray:
    """Return a label map whose first voxels hold `values`."""
    labels = np.zeros(SHAPE, np.uint8 if max(values, default=0) < 256 else np.uint16)
    labels.flat[: len(values)] = values
    return labels


def edit(root: Path, **changes: Any) -> None:
    """Change dataset.json; the value None removes a key."""
    content = json.loads((root / "dataset.json").read_text()) | changes
    (root / "dataset.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def build(folder: Path, cases: int = 5, channels: int = 2) -> Path:
    """Write a good dataset: cases a, b, ... with channels T1, T2, CT and labels 1 and 2."""
    root = folder / "Dataset001_Test"
    root.mkdir()
    for case in "abcdefgh"[:cases]:
        for channel in range(channels):
            ramp = np.arange(24, dtype=np.int16).reshape(SHAPE) + ord(case)  # no two cases have the same image
            write_volume(root / "imagesTr" / f"{case}_{channel:04d}.nii.gz", ramp)
        write_volume(root / "labelsTr" / f"{case}.nii.gz", a_label(1, 2))
    declaration = {
        "channel_names": {str(i): name for i, name in enumerate(("T1", "T2", "CT")[:channels])},
        "labels": {"background": 0, "organ": 1, "lesion": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(declaration))
    return root
