"""Label maps in colours over their images, as pictures for who looks at predictions.

Label files stay plain numbers, which viewers show as black where the numbers are small. A palette in the file would
show colours, but scikit-image, imageio and ITK (and with them nnU-Net) read the colours then, not the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segfit.dataset.manifest import Case
from segfit.errors import Problem
from segfit.execution.execution import Execution
from segfit.images import png_jpeg
from segfit.images.formats import read_case, read_label
from segfit.images.image import CASE_FAILURES, failure_of
from segfit.labels import LabelScheme
from segfit.planning.mirroring import value_names
from segfit.report.overlays import edges, label_colours
from segfit.report.views import View

__all__ = ["draw_overlays", "draw_picture", "legend"]

_OPACITY = 0.4  # of the inside of a region; its edge is opaque
_LARGEST = 4096  # pixels of a side; larger images are thinned
_COLOURS = (
    "blue",
    "orange",
    "green",
    "pink",
    "light blue",
    "amber",
    "purple",
    "yellow",
)  # as `figures.PALETTE` has them


def draw_overlays(
    cases: Sequence[Case], files: Sequence[Path], folder: Path, labels: LabelScheme, execution: Execution
) -> list[Path]:
    """Draw label maps over their images, as ``folder/<case id>.png``; return the pictures, in order.

    Cases whose label file is not there are left out, and those that cannot be drawn are told to the progress.

    Parameters
    ----------
    files : the label file of each case, on the grid of its image
    """
    pairs = [(case, path) for case, path in zip(cases, files, strict=True) if path.exists()]
    work = partial(_draw, folder, label_colours(labels.stored_values))
    drawn: list[Path] = []
    for _, found in execution.map(work, pairs, description="drawing overlays", name=lambda pair: pair[0].id):
        if isinstance(found, Problem):
            execution.progress.warn(found)
        else:
            drawn.append(found)
    return sorted(drawn)


def legend(labels: LabelScheme) -> str:
    """Return what the colours mean, to go on with in a sentence; empty where there are more classes than colours."""
    names = [name for _, name in sorted(value_names(labels).items())]
    if len(names) > len(_COLOURS):
        return ""
    return ": " + ", ".join(f"{name} is {colour}" for name, colour in zip(names, _COLOURS, strict=False))


def _draw(folder: Path, colours: Mapping[int, str], pair: tuple[Case, Path]) -> Path | Problem:
    case, path = pair
    try:
        image = read_case(case.images, case.spacing_mm)
        label = read_label(path, image.grid.spacing_mm).turned_to(image.grid)
        view = View.of_image(image, label.array[0], largest=_LARGEST)
        target = folder / f"{case.id}.png"
        png_jpeg.write(target, draw_picture(view, colours))
    except (*CASE_FAILURES, OSError) as error:
        found = failure_of(case.id, error, case.images)
        return Problem(case.id, found.problem, found.action, fatal=False, code="not_drawn")
    return target


def draw_picture(view: View, colours: Mapping[int, str]) -> NDArray[np.uint8]:
    """Return the first slice of a view, the axial one of a volume, with its labels in colours: (rows, columns, 3)."""
    pixels, labels = view.slices[0].pixels, view.slices[0].reference
    grey = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    drawn = grey.astype(np.float32)
    edge = edges(labels)
    for value, colour in colours.items():
        inside = labels == value
        if inside.any():
            rgb = np.frombuffer(bytes.fromhex(colour[1:]), np.uint8)
            opacity = np.where(edge[inside], 1.0, _OPACITY)[:, None].astype(np.float32)
            drawn[inside] += opacity * (rgb - drawn[inside])
    side = slice(None, None, -1 if view.canonical else 1)  # as radiologists look at it
    return np.ascontiguousarray(drawn.round().astype(np.uint8)[side, side])
