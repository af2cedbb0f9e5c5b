"""The small image that a model carries, with what the model made of it where it was made.

Elsewhere the model predicts it again: if the labels are the same, the installation computes what it should. Unless the
user hands on an image of a case the image is made up, of the size and grey values that the training images have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from segfit.bundle.bundle import MANIFEST, TEST_CASE, Bundle, ModelManifest, TestCase, write_manifest, write_zip
from segfit.bundle.files import BundleFiles
from segfit.dataset.manifest import Case
from segfit.device import resolve_device
from segfit.errors import InputError, SegfitError, reason_of, warning
from segfit.files import write_bytes
from segfit.fingerprint.appearance import SHARES
from segfit.geometry import Grid
from segfit.images.image import Image
from segfit.images.open_files import OpenFiles
from segfit.inference.model import Model
from segfit.inference.sources import as_spacing, read_source
from segfit.progress import SILENT, Progress

__all__ = ["ENOUGH", "add_test_case", "agreement", "expected_of", "image_of", "phantom", "write_packed"]

ENOUGH = 0.99  # share of labels that must agree; other processors round otherwise, which turns ties (assumption)
_MOST_VOXELS = 2**21
_SLICES = 3  # of a volume whose slices are seen one by one
_SMOOTH = 0.06  # of the size: how coarse the made-up structures are


def add_test_case(
    folder: Path, manifest: ModelManifest, device: str = "cpu", *, progress: Progress = SILENT
) -> ModelManifest:
    """Have the model that was just written to a folder predict a phantom, and keep both; return its manifest.

    Without mirroring, and on an image that is about one patch, so that it takes as long as a few steps of training.
    """
    bundle = Bundle(manifest, folder, files=BundleFiles.of(folder, MANIFEST))
    try:
        case, content = expected_of(bundle, phantom(bundle.manifest), "phantom", device)
    except (SegfitError, MemoryError) as error:  # the second stage of a cascade alone, no memory for another copy
        progress.warn(warning("no_test_case", f"the model has no test case ({reason_of(error)})"))
        return bundle.manifest
    write_bytes(folder / TEST_CASE, content)
    return write_manifest(folder, bundle.manifest.model_copy(update={"test_case": case}))


def write_packed(bundle: Bundle, path: Path, stated: Mapping[str, str], image: Image | None = None) -> None:
    """Write a model as one zip, with what the user `stated` of it, and `image` for its test case."""
    manifest, content = bundle.manifest, b""
    if image is not None:
        case, content = expected_of(bundle, image, "case")
        manifest = manifest.model_copy(update={"test_case": case})
    elif manifest.test_case is not None and bundle.files is not None:
        content = bundle.files.read(TEST_CASE)
    weights = {name: bundle.stored(name) for name in manifest.files}
    write_zip(path, manifest.model_copy(update=dict(stated)), weights, content)


def image_of(bundle: Bundle, case: Case) -> Image:
    """Return the image of a case as a model reads it."""
    manifest = bundle.manifest
    ndim = manifest.members[0].configuration.preprocessing.image_ndim
    with OpenFiles() as files:
        return read_source(list(case.images), ndim, len(manifest.channel_names), as_spacing(case.spacing_mm), files)[0]


def expected_of(bundle: Bundle, image: Image, kind: str, device: str = "cpu") -> tuple[TestCase, bytes]:
    """Return what describes a test case, and the content of its file."""
    grid = image.grid
    image = Image(image.array, replace(grid, header=None))
    case = TestCase.model_validate(
        {
            "kind": kind,
            "spacing_mm": grid.spacing_mm,
            "spacing_known": grid.spacing_known,
            "affine": None if grid.affine is None else grid.affine.tolist(),
        }
    )
    labels = _predicted(bundle, image, device, SILENT)
    return case, save({"image": np.ascontiguousarray(image.array), "labels": np.ascontiguousarray(labels)})


def agreement(bundle: Bundle, device: str = "auto", *, progress: Progress = SILENT) -> tuple[float, int]:
    """Return the share of voxels in which a model predicts its test case as it did where it was made, and their number.

    Raises `InputError` if it has none, or a damaged one.
    """
    case = bundle.manifest.test_case
    if case is None or bundle.files is None:
        raise InputError(f"{bundle.source} has no test case", "make the model again, or import it")
    try:
        arrays = load(bundle.files.read(TEST_CASE))
        image, labels = arrays["image"], arrays["labels"]
        affine = None if case.affine is None else np.array(case.affine, dtype=np.float64)
        known = Image(image, Grid(image.shape[1:], case.spacing_mm, affine, spacing_known=case.spacing_known))
        if labels.shape != image.shape[1:]:
            raise ValueError("its labels have another shape")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{bundle.source / TEST_CASE} is damaged ({error})", "copy the model again") from None
    found = _predicted(bundle, known, device, progress)
    return float((found == labels).mean()), labels.size


def _predicted(bundle: Bundle, image: Image, device: str, progress: Progress) -> NDArray[Any]:
    model = Model(bundle, resolve_device(device), mirror=False, precision="fp32")
    prepared = model.prepare(image)
    return model.finish(prepared, model.logits(prepared, progress=progress)).labels


def phantom(manifest: ModelManifest) -> Image:
    """Return a made-up image of about a patch: smooth structures with the grey values that training images have."""
    rng = np.random.default_rng(0)
    grid = _grid(manifest)
    channels = [_ranked(rng, grid.shape) for _ in manifest.channel_names]
    known = manifest.training_images
    if known is not None and known.quantiles:
        usual = np.median(np.array(known.quantiles), axis=0)  # of the middle case, by channel
        array = np.stack([np.interp(ranks, SHARES, one) for ranks, one in zip(channels, usual, strict=True)])
    else:
        normal = manifest.members[0].configuration.preprocessing.normalization
        scales = [
            (100.0, 50.0) if how.statistics is None else (how.statistics.mean, how.statistics.std) for how in normal
        ]
        array = np.stack([mean + std * (4 * ranks - 2) for ranks, (mean, std) in zip(channels, scales, strict=True)])
    return Image(array.astype(np.float32), grid)


def _grid(manifest: ModelManifest) -> Grid:
    """Return a grid that the largest patch about covers, in voxels as training images have."""
    configuration = manifest.members[0].configuration
    spec = configuration.preprocessing
    sizes = dict(zip(spec.transpose[spec.image_ndim - configuration.ndim :], configuration.patch_size, strict=True))
    wanted = dict(zip(spec.transpose, spec.spacing_mm, strict=True))
    own = manifest.spacing_mm or tuple(wanted[axis] or 1.0 for axis in range(spec.image_ndim))
    shape = [
        max(8, round(sizes[axis] * (wanted[axis] or own[axis]) / own[axis])) if axis in sizes else _SLICES
        for axis in range(spec.image_ndim)
    ]
    known = manifest.training_images
    if known is not None:
        shape = [min(size, max(8, int(most))) for size, most in zip(shape, known.shape.high, strict=True)]
    shrink = min(1.0, (_MOST_VOXELS / np.prod(shape, dtype=np.float64)) ** (1 / len(shape)))
    shape = [max(2, int(size * shrink)) for size in shape]
    affine = np.diag([*own[::-1], 1.0]) if len(shape) == 3 else None
    return Grid(tuple(shape), own, affine, spacing_known=own != (1.0, 1.0))


def _ranked(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return smooth noise whose values are the shares of voxels below them, from 0 to 1."""
    from scipy import ndimage

    smooth = ndimage.gaussian_filter(rng.standard_normal(shape), [_SMOOTH * size for size in shape], mode="wrap")
    ranks = np.empty(smooth.size)
    ranks[np.argsort(smooth, axis=None, kind="stable")] = np.linspace(0, 1, smooth.size)
    return ranks.reshape(shape)
