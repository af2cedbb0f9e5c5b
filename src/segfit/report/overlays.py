"""Slices with contours: image, reference and prediction side by side, as one inline SVG per plane.

The slice is embedded once as a JPEG at its own resolution; contours are vectors over it, scaled by the spacing.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from segfit.report.data import Overlay
from segfit.report.figures import colour

__all__ = ["Plane", "draw_plane", "fullest_slice", "label_colours", "panel_height", "planes"]

_MAX_SIDE = 448  # pixels of an embedded slice; larger ones are thinned
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
    """Return the slices to show: the whole picture in 2D, the fullest axial and coronal slices in 3D."""
    pixels = _to_bytes(overlay.image, overlay.reference > 0)
    labels = (overlay.reference, overlay.prediction)
    if overlay.reference.ndim == 2:
        return [_plane(pixels, labels, overlay.spacing_mm, "")]
    shown = []
    for axis, name in ((0, "Axial" if overlay.canonical else "z"), (1, "Coronal" if overlay.canonical else "y")):
        index = fullest_slice(*labels, axis)
        size = overlay.reference.shape[axis]
        side = slice(None, None, -1) if overlay.canonical else slice(None)
        where = tuple(index if i == axis else side for i in range(3))
        picture, cut = pixels[where], (labels[0][where], labels[1][where])
        spacing = tuple(s for i, s in enumerate(overlay.spacing_mm) if i != axis)
        caption = f"slice {index + 1} of {size}"
        caption = f"{name} {caption}" if overlay.canonical else f"{caption} on {name}"
        sides = ("R", "L") if overlay.canonical else ("", "")
        shown.append(_plane(picture, cut, spacing, caption, sides=sides, scale_bar=True))
    return shown


def fullest_slice(reference: NDArray[Any], prediction: NDArray[Any], axis: int) -> int:
    """Return the slice of maps `(z, y, x)` with most reference foreground, else most predicted, else the middle."""
    others = tuple(i for i in range(reference.ndim) if i != axis)
    for labels in (reference, prediction):
        counts = np.count_nonzero(labels > 0, axis=others)
        if counts.any():
            return int(counts.argmax())
    return int(reference.shape[axis]) // 2


def label_colours(values: Iterable[int]) -> dict[int, str]:
    """Return a colour for each foreground value, by ascending value."""
    return {value: colour(index) for index, value in enumerate(sorted(v for v in values if v > 0))}


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
        f'href="data:image/jpeg;base64,{_jpeg(plane.pixels)}"/>'
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


def _plane(
    pixels: NDArray[np.uint8],
    labels: tuple[NDArray[Any], NDArray[Any]],
    spacing_mm: tuple[float, ...],
    caption: str,
    *,
    sides: tuple[str, str] = ("", ""),
    scale_bar: bool = False,
) -> Plane:
    rows, columns = pixels.shape[:2]
    step = -(-max(rows, columns) // _MAX_SIDE)
    return Plane(
        pixels[::step, ::step],
        labels[0][::step, ::step],
        labels[1][::step, ::step],
        (rows * spacing_mm[0], columns * spacing_mm[1]),
        caption,
        sides,
        scale_bar,
    )


def _to_bytes(image: NDArray[Any], foreground: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Window (c, *sp) to uint8: a colour picture to (y, x, 3), anything else its first channel to (*sp)."""
    if image.ndim == 3 and image.shape[0] in (3, 4):
        picture = np.moveaxis(np.nan_to_num(image[:3].astype(np.float32)), 0, -1)
        low, high = min(0.0, float(picture.min())), float(np.percentile(picture, 99.9))
    else:
        picture = np.nan_to_num(image[0].astype(np.float32))
        low, high = _window(picture, picture[foreground])
    scaled = (picture - low) / max(high - low, 1e-12)
    return (scaled.clip(0, 1) * 255).round().astype(np.uint8)


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


def _jpeg(pixels: NDArray[np.uint8]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="JPEG", quality=88)
    return base64.b64encode(buffer.getvalue()).decode()


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
