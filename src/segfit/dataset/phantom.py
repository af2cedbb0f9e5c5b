"""Small synthetic datasets: for the demo, for tests, and to look at without a patient behind them.

A body with an organ in it and a lesion at the organ's rim, in random pose, with noise and a smooth bias field: hard
enough to need learning, small enough to be learned on a processor in a minute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from segfit.errors import InputError
from segfit.files import write_json
from segfit.geometry import Grid
from segfit.images import nifti, png_jpeg
from segfit.images.formats import write_labels
from segfit.images.image import LabelMap

__all__ = ["make_phantom"]

_Floats = NDArray[np.float64]

_BODY, _ORGAN, _LESION, _VESSEL = 320.0, 480.0, 640.0, 180.0  # intensities; air is 0
_COLOURS = {"air": (238, 236, 240), "body": (222, 176, 200), "organ": (170, 92, 152), "lesion": (84, 48, 120)}
_NOISE_STD = 40.0
_BIAS_STRENGTH = 0.25  # largest relative change of intensity by the bias field, about
_EDGE = 0.12  # half-width of blurred edges, relative to the structure's radius


def make_phantom(
    folder: Path | str,
    *,
    cases: int = 12,
    test_cases: int = 4,
    seed: int = 0,
    shape: Sequence[int] = (20, 48, 48),
    spacing_mm: Sequence[float] = (3.0, 1.0, 1.0),
    kind: Literal["volume", "picture"] = "volume",
) -> Path:
    """Write a dataset in the nnU-Net layout (with labels of the test cases) into `folder` and return it.

    Parameters
    ----------
    cases, test_cases : numbers of cases in imagesTr and imagesTs
    seed : equal seeds give equal files; case k of a larger dataset is case k of a smaller one
    shape, spacing_mm : typical size, array order; cases vary around them. Pictures take the last two axes of `shape`
    kind : "volume": int16 NIfTI with one channel; "picture": RGB PNG in 2D

    Raises `InputError` if `folder` already holds something.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty", "give a new folder for the phantom dataset")
    ending = ".nii.gz" if kind == "volume" else ".png"
    for part, count in (("Tr", cases), ("Ts", test_cases)):
        for number in range(count):
            generator = np.random.default_rng((seed, part == "Ts", number))
            name = f"phantom_{part.lower()}_{number:03d}"
            image_path = folder / f"images{part}" / f"{name}_0000{ending}"
            label_path = folder / f"labels{part}" / f"{name}{ending}"
            image: NDArray[Any]
            if kind == "volume":
                image, labels, grid = _volume(generator, tuple(shape), tuple(spacing_mm))
                nifti.write(image_path, image, grid)
            else:
                image, labels, grid = _picture(generator, tuple(shape)[-2:])
                png_jpeg.write(image_path, image)
            write_labels(label_path, LabelMap(labels, grid))
    channels = ("MRI",) if kind == "volume" else ("red", "green", "blue")
    declaration = {
        "name": "Phantom",
        "description": "Synthetic: an organ and a lesion at its rim inside a body",
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": {"background": 0, "organ": 1, "lesion": 2},
        "numTraining": cases,
        "file_ending": ending,
    }
    write_json(folder / "dataset.json", declaration)
    return folder


@dataclass(frozen=True, slots=True)
class _Scene:
    """Soft memberships (0..1, *shape) of each structure, outermost first, and the label map."""

    body: _Floats
    organ: _Floats
    vessel: _Floats
    lesion: _Floats
    labels: NDArray[np.uint8]


def _volume(
    generator: np.random.Generator, shape: tuple[int, ...], spacing_mm: tuple[float, ...]
) -> tuple[NDArray[np.int16], NDArray[np.uint8], Grid]:
    """Return int16 voxels, labels and a grid with RAS+ axes, all (z, y, x)."""
    size = tuple(int(n) + int(generator.integers(-(n // 12), n // 12 + 1)) for n in shape)
    spacing = tuple(round(float(s * generator.uniform(0.92, 1.08)), 3) for s in spacing_mm)
    scene = _scene(generator, size, spacing)
    clean = np.zeros(size)
    for membership, value in (
        (scene.body, _BODY),
        (scene.organ, _ORGAN),
        (scene.vessel, _VESSEL),
        (scene.lesion, _LESION),
    ):
        clean += membership * (value - clean)
    noisy = clean * _bias(generator, size) + generator.normal(0.0, _NOISE_STD, size)
    affine = np.diag([*spacing[::-1], 1.0])
    affine[:3, 3] = generator.uniform(-40.0, 40.0, 3).round(2)
    return np.clip(noisy.round(), 0, 4095).astype(np.int16), scene.labels, Grid(size, spacing, affine)


def _picture(
    generator: np.random.Generator, shape: tuple[int, ...]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Grid]:
    """Return uint8 pixels (y, x, 3), labels (y, x) and their grid."""
    size = tuple(int(n) + int(generator.integers(-(n // 12), n // 12 + 1)) for n in shape)
    scene = _scene(generator, size, (1.0, 1.0))
    clean = np.full((*size, 3), _COLOURS["air"], dtype=float)
    for membership, name in ((scene.body, "body"), (scene.organ, "organ"), (scene.lesion, "lesion")):
        clean += membership[..., None] * (np.asarray(_COLOURS[name]) - clean)
    noisy = clean * _bias(generator, size)[..., None] + generator.normal(0.0, 10.0, clean.shape)
    return np.clip(noisy.round(), 0, 255).astype(np.uint8), scene.labels, Grid(size, (1.0, 1.0))


def _scene(generator: np.random.Generator, shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> _Scene:
    """Place body, organ, vessel and lesion at random; geometry is in mm around the centre of the volume."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing_mm, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"))
    half = np.array([n * s / 2 for n, s in zip(shape, spacing_mm, strict=True)])
    ndim = len(shape)
    body = _distance(points, np.zeros(ndim), half * generator.uniform(0.82, 0.95, ndim), np.eye(ndim))
    turn = _rotation(generator, ndim)
    centre = half * generator.uniform(-0.22, 0.22, ndim)
    radii = half.min() * np.array([0.62, 0.48, 0.40][:ndim]) * generator.uniform(0.85, 1.15, ndim)
    organ = _distance(points, centre, radii, turn) + _ripple(generator, points, half)
    # The lesion sits at the organ's rim, on a random side, half inside.
    side = _direction(generator, ndim)
    rim = centre + turn @ (radii * side)
    lesion = _distance(points, rim, half.min() * generator.uniform(0.22, 0.36, ndim), _rotation(generator, ndim))
    # A thin tube through the organ, part of it: intensity alone does not tell organ from background.
    along = _direction(generator, ndim)
    offset = points - centre.reshape(-1, *[1] * ndim)
    across = offset - np.tensordot(along, offset, axes=1) * along.reshape(-1, *[1] * ndim)
    vessel = np.linalg.norm(across, axis=0) / (0.09 * half.min())
    labels = np.zeros(shape, dtype=np.uint8)
    labels[(organ < 1) & (body < 1)] = 1
    labels[(lesion < 1) & (body < 1)] = 2
    soft_organ = _soft(organ)
    return _Scene(_soft(body), soft_organ, 0.6 * _soft(vessel) * soft_organ, _soft(lesion) * _soft(body), labels)


def _distance(points: _Floats, centre: _Floats, radii: _Floats, turn: _Floats) -> _Floats:
    """Return the relative distance to an ellipsoid's centre: 1 on its surface."""
    offset = points - centre.reshape(-1, *[1] * len(centre))
    own_axes = np.tensordot(turn.T, offset, axes=1) / radii.reshape(-1, *[1] * len(centre))
    return np.asarray(np.linalg.norm(own_axes, axis=0))


def _soft(distance: _Floats) -> _Floats:
    """Return 1 inside, 0 outside and a smooth edge between, as partial volumes blur it."""
    ramp = np.clip((1 + _EDGE - distance) / (2 * _EDGE), 0.0, 1.0)
    return ramp * ramp * (3 - 2 * ramp)


def _ripple(generator: np.random.Generator, points: _Floats, half: _Floats) -> _Floats:
    """Return a small smooth wave that makes a surface less perfect."""
    wave = generator.uniform(1.5, 3.0, len(half)) * np.pi / (2 * half)
    return 0.08 * np.sin(np.tensordot(wave, points, axes=1) + generator.uniform(0, 2 * np.pi))


def _bias(generator: np.random.Generator, shape: tuple[int, ...]) -> _Floats:
    """Return a smooth multiplicative field around 1: a random polynomial of second order."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij", sparse=True)
    field: Any = np.zeros(shape)
    for axis in axes:
        linear, square = generator.uniform(-1, 1, 2)
        field = field + linear * axis + square * (axis**2 - 1 / 3)
    result: _Floats = np.exp(_BIAS_STRENGTH * field / len(shape))
    return result


def _direction(generator: np.random.Generator, ndim: int) -> _Floats:
    vector = generator.normal(size=ndim)
    result: _Floats = vector / np.linalg.norm(vector)
    return result


def _rotation(generator: np.random.Generator, ndim: int) -> _Floats:
    """Return a random rotation matrix."""
    basis, upper = np.linalg.qr(generator.normal(size=(ndim, ndim)))
    result: _Floats = basis * np.sign(np.diag(upper))
    return result
