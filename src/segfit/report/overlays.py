"""Slices with contours: image, reference and prediction side by side, as one inline SVG per plane.

The slice is embedded once as a JPEG at its own resolution; contours are vectors over it, scaled by the spacing.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from segfit.report.data import Overlay
from segfit.report.figures import colour
from segfit.report.scenes import as_jpeg
from segfit.report.views import View

__all__ = ["Plane", "draw_plane", "edges", "label_colours", "panel_height", "planes"]

_ROW_WIDTH, _GAP, _TITLE = 1020.0, 8.0, 18.0
_OTHER = "#8a94a0"  # labels without a name, e.g. the ignore label


@dataclass(frozen=True, slots=True, eq=False)
class Plane:
    """One slice of a case, ready to draw.

    Parameters
    ----------
    pixels : (rows, columns) grey or (rows, columns, 3) colour, uint8
    reference, prediction : (rows, columns) integer labels
    size_mm : height and width of the whole slice
    caption : which slice it is
    sides : letters at the left and right edge, empty where unknown
    scale_bar : spacing is in mm, so that a scale bar makes sense
    """

    pixels: NDArray[np.uint8]
    reference: NDArray[Any]
    prediction: NDArray[Any]
    size_mm: tuple[float, float]
    caption: str
    sides: tuple[str, str] = ("", "")
    scale_bar: bool = False


def planes(overlay: Overlay) -> list[Plane]:
    """Return the slices to show, with what was predicted there."""
    view, shown = overlay.view, []
    side = slice(None, None, -1) if view.canonical else slice(None)
    for one, cut in zip(view.slices, overlay.cuts, strict=True):
        flip = (slice(None), slice(None)) if one.axis is None else (side, side)
        rows, columns = (size * mm for i, (size, mm) in enumerate(_sides(view)) if i != one.axis)
        caption = ""
        if one.axis is not None:
            name = ("Axial", "Coronal")[one.axis] if view.canonical else "zy"[one.axis]
            caption = f"slice {one.index + 1} of {view.shape[one.axis]}"
            caption = f"{name} {caption}" if view.canonical else f"{caption} on {name}"
        shown.append(
            Plane(
                one.pixels[flip],
                one.reference[flip],
                cut[flip],
                (rows, columns),
                caption,
                ("R", "L") if view.canonical else ("", ""),
                one.axis is not None,
            )
        )
    return shown


def _sides(view: View) -> list[tuple[int, float]]:
    return list(zip(view.shape, view.spacing_mm, strict=True))


def label_colours(values: Iterable[int]) -> dict[int, str]:
    """Return a colour for each foreground value, by ascending value."""
    return {value: colour(index) for index, value in enumerate(sorted(v for v in values if v > 0))}


def edges(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where a pixel has a neighbour with another value."""
    edge = np.zeros(labels.shape, dtype=bool)
    down, right = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge


def panel_height(shown: Sequence[Plane]) -> float:
    """Return the height of a case's panels: lower where its planes then fit beside each other."""
    low, high = 196.0, 300.0 if len(shown) == 1 else 250.0
    row = sum(3 * low * plane.size_mm[1] / plane.size_mm[0] + 2 * _GAP for plane in shown) + 26 * (len(shown) - 1)
    return low if len(shown) > 1 and row <= _ROW_WIDTH else high


def draw_plane(plane: Plane, colours: Mapping[int, str], name: str, height: float) -> Markup:
    """Draw the three panels, at most `height` units high; `name` makes the ids of the page unique.

    The prediction's panel shows the reference as a thin white line below. Label values without a colour are grey.
    """
    height_mm, width_mm = plane.size_mm
    height = min(height, (_ROW_WIDTH - 2 * _GAP) / 3 * height_mm / width_mm)
    width = height * width_mm / height_mm
    total = 3 * width + 2 * _GAP
    image = (
        f'<image id="{name}" width="{width:.1f}" height="{height:.1f}" preserveAspectRatio="none" '
        f'href="data:image/jpeg;base64,{base64.b64encode(as_jpeg(plane.pixels)).decode()}"/>'
    )
    reference = _outlines(plane.reference, (height, width))
    predicted = _outlines(plane.prediction, (height, width))
    truth = f'<path d="{"".join(reference.values())}" class="truth"/>'
    panels = (
        ("Image", image),
        ("Reference", f'<use href="#{name}"/>{_painted(reference, colours)}'),
        ("Prediction", f'<use href="#{name}"/>{truth}{_painted(predicted, colours)}'),
    )
    parts = [
        f'<svg class="overlay" viewBox="0 0 {total:.0f} {height + _TITLE:.0f}" width="{total:.0f}" '
        f'height="{height + _TITLE:.0f}" role="img" aria-label="Image, reference and prediction side by side">'
    ]
    for index, (title, content) in enumerate(panels):
        x = index * (width + _GAP)
        parts.append(f'<text x="{x:.1f}" y="12" class="panel">{escape(title)}</text>')
        parts.append(
            f'<g transform="translate({x:.1f} {_TITLE:.0f})">{content}{_marks(plane, index, height, width)}</g>'
        )
    return Markup("".join(parts) + "</svg>")


def _painted(outlines: Mapping[int, str], colours: Mapping[int, str]) -> str:
    paths = []
    for value, path in outlines.items():
        fill = colours.get(value, _OTHER)
        paths.append(f'<path d="{path}" fill="{fill}" stroke="{fill}" class="outline"/>')
    return "".join(paths)


def _outlines(labels: NDArray[Any], size: tuple[float, float]) -> dict[int, str]:
    """Return the outline of each label as SVG path data, scaled to `size` (height, width)."""
    scale_y, scale_x = size[0] / labels.shape[0], size[1] / labels.shape[1]
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    outlines: dict[int, str] = {}
    for value in np.unique(labels[labels > 0]):
        # A voxel's centre is at +0.5; the border of one pixel closes outlines that touch the edge of the slice.
        outlines[int(value)] = "".join(
            "M" + "L".join(f"{(x - 0.5) * scale_x:.1f} {(y - 0.5) * scale_y:.1f}" for x, y in line) + "Z"
            for line in axes.contour(np.pad(labels == value, 1).astype(np.float32), levels=[0.5]).allsegs[0]
            if len(line) > 2
        )
    return outlines


def _marks(plane: Plane, index: int, height: float, width: float) -> str:
    """Return the side letters, and in the first panel a scale bar."""
    parts = []
    left, right = plane.sides
    if left:
        middle = height / 2 + 4
        parts.append(f'<text x="4" y="{middle:.0f}" class="side">{escape(left)}</text>')
        parts.append(
            f'<text x="{width - 4:.0f}" y="{middle:.0f}" class="side" text-anchor="end">{escape(right)}</text>'
        )
    if plane.scale_bar and index == 0:
        full = plane.size_mm[1]
        bar = max((n for n in (1, 2, 5, 10, 20, 50, 100, 200) if n <= 0.4 * full), default=0)
        if bar:
            end = 6 + bar / full * width
            y = height - 7
            parts.append(f'<line x1="6" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}" class="scale"/>')
            parts.append(f'<text x="6" y="{y - 5:.1f}" class="side">{bar} mm</text>')
    return "".join(parts)
