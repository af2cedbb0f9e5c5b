"""What a report shows of a case: a slice or two of its image and its annotation, kept when the case is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.dataset.annotation import as_seen, count_values
from segfit.dataset.case_checks import CaseVoxels, Look
from segfit.dataset.manifest import Case
from segfit.files import content_hash, read_arrays, write_arrays
from segfit.geometry import AxisMap, canonical_map
from segfit.images.formats import stacked
from segfit.images.image import Image
from segfit.labels import LabelScheme
from segfit.report.scenes import Scene, in_8_bits

__all__ = ["Slice", "View", "fullest_slice", "kept_view", "look_to_show", "thinned"]

_VERSION = 2  # of what is kept; a change makes it stale
_MAX_SIDE = 448  # pixels of a slice; larger ones are thinned
_SAMPLE = 1 << 16  # voxels that grey values are chosen by, about; of a large volume every so many
_BYTES_PER_VOXEL = 10  # that making a view takes: masks of the annotation, and what they cut out


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """One slice of a case.

    Parameters
    ----------
    axis, index : where it was cut; no axis: the whole picture
    pixels : (rows, columns) grey or (rows, columns, 3) colour, uint8, thinned
    reference : (rows, columns) integer labels, thinned alike
    """

    axis: int | None
    index: int
    pixels: NDArray[np.uint8]
    reference: NDArray[Any]

    def of(self, labels: NDArray[Any]) -> NDArray[Any]:
        """Return this slice of a label map of the whole case."""
        return labels if self.axis is None else labels.take(self.index, self.axis)


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """The slices of a case that are shown.

    Parameters
    ----------
    shape, spacing_mm : of the whole case, one per spatial axis
    canonical : the axes are RAS+ (stored z, y, x): shown in radiological convention and marked R and L
    values : foreground labels that occur in the whole annotation
    axes : from those of the image as it is stored
    scene : more of it, to scroll through, where that was asked for
    """

    slices: tuple[Slice, ...]
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    canonical: bool
    values: tuple[int, ...]
    axes: AxisMap
    scene: Scene | None = None

    @classmethod
    def of_image(
        cls,
        image: Image,
        reference: NDArray[Any],
        prediction: NDArray[Any] | None = None,
        *,
        largest: int = _MAX_SIDE,
        scene: bool = False,
    ) -> View:
        """Return the view of an image and label maps on its grid, along the axes of the body where they are known."""
        axes = canonical_map(image.grid)
        return cls.of(
            axes.apply(image.array),
            axes.apply(reference[None])[0],
            axes.apply_grid(image.grid).spacing_mm,
            axes,
            canonical=image.grid.ndim == 3 and image.grid.affine is not None,
            prediction=None if prediction is None else axes.apply(prediction[None])[0],
            largest=largest,
            scene=scene,
        )

    @classmethod
    def of(
        cls,
        image: NDArray[Any],
        reference: NDArray[Any],
        spacing_mm: tuple[float, ...],
        axes: AxisMap | None = None,
        *,
        canonical: bool = False,
        prediction: NDArray[Any] | None = None,
        largest: int = _MAX_SIDE,
        scene: bool = False,
    ) -> View:
        """Return the whole picture in 2D, the fullest axial and coronal slices in 3D.

        `image` is (c, *spatial) of any number type; a 2D image of 3 or 4 channels is shown in colour. The fullest slice
        of the `prediction` is taken where nothing is in the `reference`. Slices with a side of more than `largest`
        pixels are thinned.
        """
        values = tuple(value for value in count_values(reference) if value > 0)
        coloured = image.ndim == 3 and image.shape[0] in (3, 4)
        picture = np.moveaxis(image[:3], 0, -1) if coloured else image[0]
        low, high = _range(picture, reference > 0)
        slices = []
        for axis in (None,) if reference.ndim == 2 else (0, 1):
            index = 0 if axis is None else fullest_slice(reference, prediction, axis)
            where = (slice(None),) * reference.ndim if axis is None else (slice(None),) * axis + (index,)
            shown = thinned(reference[where], largest)
            slices.append(Slice(axis, index, in_8_bits(thinned(picture[where], largest), low, high), shown))
        axes = axes or AxisMap.identity(reference.ndim)
        more = Scene.of(picture, (low, high), reference, prediction, flipped=canonical) if scene else None
        return cls(tuple(slices), reference.shape, spacing_mm, canonical, values, axes, more)

    def smaller(self, largest: int) -> View:
        """Return its first slice alone, thinned to `largest` pixels a side."""
        one = self.slices[0]
        first = replace(one, pixels=thinned(one.pixels, largest), reference=thinned(one.reference, largest))
        return replace(self, slices=(first,), scene=None)

    def save(self, path: Path) -> None:
        """Write the view into a file."""
        cuts = [(one.axis, one.index) for one in self.slices]
        axes = self.axes.order, self.axes.flip
        scene = self.scene
        more = None if scene is None else (scene.box, scene.step, scene.flipped, scene.columns, scene.window)
        facts = [self.shape, self.spacing_mm, self.canonical, self.values, axes, cuts, more]
        arrays: dict[str, Any] = {"facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
        for number, one in enumerate(self.slices):
            arrays |= {f"pixels_{number}": one.pixels, f"reference_{number}": one.reference}
        if scene is not None:
            arrays |= {"sheet": np.frombuffer(scene.sheet, np.uint8), "scene": scene.reference}
        write_arrays(path, arrays)

    @classmethod
    def load(cls, path: Path) -> View | None:
        """Read a view; None if there is none that is legible."""
        arrays = read_arrays(path)
        if arrays is None:
            return None
        try:
            shape, spacing, canonical, values, (order, flip), cuts, more = json.loads(arrays["facts"].tobytes())
            slices = tuple(
                Slice(axis, index, arrays[f"pixels_{number}"], arrays[f"reference_{number}"])
                for number, (axis, index) in enumerate(cuts)
            )
            scene = None if more is None else _scene(arrays, *more)
        except (KeyError, TypeError, ValueError):
            return None
        axes = AxisMap(tuple(order), tuple(flip))
        return cls(slices, tuple(shape), tuple(spacing), canonical, tuple(values), axes, scene)


def _scene(arrays: Mapping[str, NDArray[Any]], box: Any, step: Any, flipped: bool, columns: int, window: Any) -> Scene:
    ends = tuple((int(start), int(stop)) for start, stop in box)
    sheet = arrays["sheet"].tobytes()
    return Scene(ends, tuple(step), flipped, sheet, columns, tuple(window), arrays["scene"])


def thinned(array: NDArray[Any], largest: int = _MAX_SIDE) -> NDArray[Any]:
    """Return every so many rows and columns of a slice that is too large to show."""
    step = -(-max(array.shape[:2]) // largest)
    return array[::step, ::step]


def fullest_slice(reference: NDArray[Any], prediction: NDArray[Any] | None, axis: int) -> int:
    """Return the slice of maps `(z, y, x)` with most reference foreground, else most predicted, else the middle."""
    others = tuple(i for i in range(reference.ndim) if i != axis)
    for labels in (reference, prediction):
        counts = np.zeros(1) if labels is None else np.count_nonzero(labels > 0, axis=others)
        if counts.any():
            return int(counts.argmax())
    return int(reference.shape[axis]) // 2


def look_to_show(labels: LabelScheme, cache: Path) -> Look:
    """Return what keeps the views of labelled cases while they are checked; see `kept_view`."""
    return Look(partial(_keep, labels, cache), _BYTES_PER_VOXEL, with_test=True)


def kept_view(labels: LabelScheme, cache: Path, content: str) -> View | None:
    """Return the view of the case with this content of its files; None if none was kept.

    None is kept of a case that has nothing labelled: its predictions say which slices are worth to be seen.
    """
    return View.load(_path(labels, cache, content))


def _path(labels: LabelScheme, cache: Path, content: str) -> Path:
    return cache / f"view-{content_hash([_VERSION, content, labels.content_hash()])}.npz"


def _keep(labels: LabelScheme, cache: Path, found: CaseVoxels) -> None:
    case: Case = found.case
    path, first = _path(labels, cache, found.content), found.images[0]
    if path.exists():
        return
    reference = as_seen(case, labels, found.label, first.grid)
    if reference.grid.shape == first.grid.shape and (reference.array > 0).any():
        image = first if first.grid.ndim == 3 else stacked(case.images, found.images)
        View.of_image(image, reference.array[0], scene=True).save(path)


def _range(picture: NDArray[Any], foreground: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the values of a picture (y, x, 3), or of the grey (*sp), that are shown as black and white."""
    step = max(1, round((picture.size / _SAMPLE) ** (1 / picture.ndim)))
    some = _floats(picture[(slice(None, None, step),) * foreground.ndim])
    if picture.ndim > foreground.ndim:
        return min(0.0, float(some.min())), float(np.percentile(some, 99.9))
    inside = picture[foreground]
    return _window(some, _floats(inside[:: max(1, inside.size // _SAMPLE)]))


def _floats(values: NDArray[Any]) -> NDArray[np.float32]:
    return np.nan_to_num(values.astype(np.float32))


def _window(picture: NDArray[np.float32], inside: NDArray[np.float32]) -> tuple[float, float]:
    """Return the grey values shown as black and white.

    Three times the range of the foreground, within that of the image: soft tissue in a CT is not washed out by air.
    """
    low, high = (float(v) for v in np.percentile(picture, [1, 99]))
    if inside.size:
        darkest, brightest = (float(v) for v in np.percentile(inside, [2, 98]))
        reach = brightest - darkest
        if reach > 0:
            low, high = max(low, darkest - reach), min(high, brightest + reach)
    return low, high
