"""What nnU-Net's commands look for beside predictions: ``nnUNetv2_ensemble`` and ``nnUNetv2_apply_postprocessing``."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segfit.bundle.bundle import ModelManifest
from segfit.errors import InputError
from segfit.files import read_arrays, write_arrays, write_bytes, write_json
from segfit.geometry import Grid
from segfit.images.formats import read_grid
from segfit.nnunet.model_export import FLAT_MM, plans_and_dataset
from segfit.nnunet.plans_reader import READER_OF_ENDING

__all__ = ["complete_predictions", "require_readable"]


def require_readable(manifest: ModelManifest, ending: str) -> None:
    """Raise `InputError` where nnU-Net does not read label files of this ending, or not with these values."""
    if ending.lower() not in READER_OF_ENDING:
        known = ", ".join(READER_OF_ENDING)
        raise InputError(f"nnU-Net does not read {ending} files", f"give --ending with one of {known}")
    if manifest.labels.stored is not None:
        values = ", ".join(str(value) for value in manifest.labels.stored)
        raise InputError(
            f"the label values {values} of {manifest.name} are not consecutive, as nnU-Net's are",
            "predict with the model that segfit export --to nnunet makes of it",
        )


def complete_predictions(manifest: ModelManifest, files: Sequence[Path], ending: str) -> None:
    """Write what nnU-Net's commands need beside label files of one folder, with their probabilities or without.

    That is ``dataset.json`` and ``plans.json``, and beside each ``CASE.npz`` the ``CASE.pkl`` with its geometry.
    """
    reader = ""
    for file in files:
        grid = read_grid(file)
        reader = "Tiff3DIO" if ending.lower() == ".tif" and grid.ndim == 3 else READER_OF_ENDING[ending.lower()]
        stem = file.with_name(file.name.removesuffix(ending))
        arrays = read_arrays(stem.with_name(f"{stem.name}.npz"))
        if arrays is None:
            continue
        found = arrays["probabilities"]
        if grid.ndim == 2 and found.ndim == 3:  # it has three axes of all images
            write_arrays(stem.with_name(f"{stem.name}.npz"), {"probabilities": found[:, None]})
        write_bytes(stem.with_name(f"{stem.name}.pkl"), pickle.dumps(_properties(grid, reader)))
    if files:
        plans, dataset = plans_and_dataset(manifest, ending.lower(), reader)
        write_json(files[0].parent / "plans.json", plans)
        write_json(files[0].parent / "dataset.json", dataset)


def _properties(grid: Grid, reader: str) -> dict[str, Any]:
    """Return the geometry of a case as a reader of nnU-Net's keeps it."""
    flat, spacing = grid.ndim == 2, list(grid.spacing_mm)
    shape = [1, *grid.shape] if flat else list(grid.shape)
    affine = np.diag([*spacing[::-1], 1.0]) if grid.affine is None else grid.affine
    found: dict[str, Any] = {}
    if reader == "NibabelIO":
        found["nibabel_stuff"] = {"original_affine": affine}
    elif reader == "SimpleITKIO":
        turned = np.diag([-1.0, -1.0, 1.0]) @ affine[:3] if grid.affine is not None else affine[: grid.ndim]
        own = np.array(spacing[::-1])
        found["sitk_stuff"] = {
            "spacing": tuple(own.tolist()),
            "origin": tuple(turned[:, -1].tolist()),
            "direction": tuple((turned[:, : grid.ndim] / own).ravel().tolist()),
        }
    return found | {
        "spacing": [FLAT_MM * max(1.0, *spacing), *spacing] if flat else spacing,
        "shape_before_cropping": tuple(shape),
        "bbox_used_for_cropping": [[0, size] for size in shape],
        "shape_after_cropping_and_before_resampling": tuple(shape),
    }
