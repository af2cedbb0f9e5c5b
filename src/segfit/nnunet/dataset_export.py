"""Any dataset as a folder of nnU-Net v2: one file per channel, consecutive labels, ``dataset.json``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from segfit.dataset.annotation import read_labels
from segfit.dataset.manifest import Case, Dataset
from segfit.errors import InputError, StageError
from segfit.execution.execution import LOCAL, Execution
from segfit.files import new_folder, remove_leftovers, write_json
from segfit.geometry import Grid
from segfit.images import nifti, png_jpeg, tiff
from segfit.images.formats import num_voxels, read_image, split_ending, write_labels
from segfit.images.image import LabelMap
from segfit.labels import LabelScheme

__all__ = ["ENDING_OF_COPY", "declaration", "export_nnunet"]

ENDING_OF_COPY = {".bmp": ".png", ".jpg": ".png", ".jpeg": ".png", ".png": ".png", ".tif": ".tif", ".tiff": ".tif"}
"""Ending of the copy by ending of the original; everything else becomes .nii.gz."""

_BYTES_PER_VOXEL = 12  # of a channel of 32 bits, that reading a file and writing its channels takes (measured)


def export_nnunet(dataset: Dataset, folder: Path | str, *, execution: Execution = LOCAL) -> Path:
    """Write a dataset as nnU-Net v2 reads it, into a folder that must not exist yet; return the folder.

    Channels that share a file are split, label values become consecutive, masks are merged; voxels and geometry stay
    as they are. The folder appears when it is complete. Raises `InputError` for a file that cannot be read, and if the
    folder is there; `StageError` if it cannot be written.
    """
    target = Path(folder).expanduser().absolute()
    if target.exists():
        raise InputError(f"{target} exists already", "choose another folder")
    if not dataset.training:
        raise InputError(f"dataset {dataset.name} has no training case", "add images with labels")
    ending = ENDING_OF_COPY.get(split_ending(dataset.training[0].images[0])[1].lower(), ".nii.gz")
    items = [("Tr", case) for case in dataset.training] + [("Ts", case) for case in dataset.test]
    try:
        with new_folder(target) as made:
            work = partial(_write_case, folder=made, labels=dataset.labels, ending=ending)
            for _ in execution.map(
                work,
                items,
                description="Writing cases",
                name=lambda item: item[1].id,
                size=lambda item: _predicted_bytes(item[1], len(dataset.channel_names)),
            ):
                pass
            for part in made.iterdir():
                remove_leftovers(part)
            content = declaration(
                dataset.name,
                dataset.labels,
                dataset.channel_names,
                num_training=len(dataset.training),
                ending=ending,
            )
            write_json(made / "dataset.json", content)
    except OSError as error:
        raise StageError(
            f"{target} cannot be written ({error.strerror})", "free disk space or choose another folder with --out"
        ) from error
    return target


def declaration(
    name: str, scheme: LabelScheme, channel_names: Sequence[str], *, num_training: int, ending: str
) -> dict[str, Any]:
    """Return the content of ``dataset.json``; label values are the inner ones."""
    labels: dict[str, Any] = {
        item.name: item.values[0] if len(item.values) == 1 else list(item.values) for item in scheme.labels
    }
    if scheme.ignore_value is not None:
        labels["ignore"] = scheme.ignore_value
    result: dict[str, Any] = {
        "name": name,
        "channel_names": {str(number): channel for number, channel in enumerate(channel_names)},
        "labels": labels,
        "numTraining": num_training,
        "file_ending": ending,
    }
    if scheme.region_order is not None:
        result["regions_class_order"] = list(scheme.region_order)
    return result


def _predicted_bytes(case: Case, channels: int) -> int:
    """Return the memory that writing a case takes, about: its channels file by file, then its label."""
    return num_voxels(case.images[0]) * ceil(channels / len(case.images)) * _BYTES_PER_VOXEL


def _write_case(item: tuple[str, Case], *, folder: Path, labels: LabelScheme, ending: str) -> None:
    part, case = item
    images, annotated = folder / f"images{part}", folder / f"labels{part}"
    images.mkdir(exist_ok=True)
    number = 0
    grid: Grid | None = None
    for path in case.images:
        stored = read_image(path, case.spacing_mm)
        grid = grid or stored.grid
        image = stored.turned_to(grid)
        as_it_is = image is stored and image.array.shape[0] == 1 and split_ending(path)[1].lower() == ending
        for channel in image.array:
            target = images / f"{case.id}_{number:04d}{ending}"
            number += 1
            if as_it_is:
                shutil.copyfile(path, target)
            else:
                _write(target, channel, image.grid)
        if ending == ".tif" and image.grid.ndim == 3:  # one spacing file for all channels, as nnU-Net reads it
            write_json(images / f"{case.id}.json", {"spacing": list(image.grid.spacing_mm)})
    if case.label_files:
        label = read_labels(case, labels, grid)
        write_labels(annotated / f"{case.id}{ending}", LabelMap(label.array[0], label.grid, labels, case.images))


def _write(path: Path, channel: NDArray[Any], grid: Grid) -> None:
    if path.suffix == ".png":
        png_jpeg.write(path, channel)
    elif path.suffix == ".tif":
        tiff.write(path, channel, grid)
        path.with_suffix(".json").unlink(missing_ok=True)
    else:
        nifti.write(path, channel, grid)
