"""What the viewer of a page is given: pictures as JPEG, labels as packed bytes, facts as JSON."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from segfit.report import overlays
from segfit.report.data import Overlay
from segfit.report.scenes import as_jpeg
from segfit.text import dice

__all__ = ["as_json", "case_facts", "case_title", "numbered"]

_OTHERS = 255  # stands for all classes that a byte cannot tell apart
_KINDS = {"validation": "cross-validation", "test": "test set", "evaluation": ""}


def case_title(overlay: Overlay) -> str:
    """Return why a case is shown, in words."""
    return ", ".join(part for part in (_KINDS[overlay.kind], overlay.rank) if part)


def case_facts(overlay: Overlay, colours: Mapping[int, str], names: Mapping[int, str]) -> dict[str, Any]:
    """Return all that the viewer shows of a case, as JSON values.

    Label values are numbered from 1 in the order of `colours`. Axes are z, y, x, turned as they are looked at; a
    picture has a single slice. `labels` are the bytes of reference and prediction, and of the probability where that is
    at hand.
    """
    view, scene, volume = overlay.view, overlay.view.scene, overlay.volume
    if scene is not None and volume is not None:
        shape, step = scene.shape, scene.step
        first, last = [start for start, _ in scene.box], [stop - 1 for _, stop in scene.box]
        facts = {"sheet": _data(scene.sheet), "columns": scene.columns, "window": scene.window}
        reference, prediction, flipped = scene.reference, volume, scene.flipped
        full, spacing = view.shape, view.spacing_mm
    else:
        plane, one = overlays.planes(overlay)[0], view.slices[0]
        shape, flipped = plane.pixels.shape[:2], False
        full = tuple(n for axis, n in enumerate(view.shape) if axis != one.axis)
        step, first, last = (1, 1), [0, 0], [shape[0] - 1, shape[1] - 1]
        spacing = tuple(size / n for size, n in zip(plane.size_mm, shape, strict=True))
        facts = {"sheet": _data(as_jpeg(plane.pixels)), "columns": 1, "window": (0, 255)}
        reference, prediction = plane.reference, plane.prediction
    return facts | {
        "case": overlay.case,
        "title": case_title(overlay),
        "dice": dice(overlay.dice),
        "shape": _three(shape, 1),
        "spacing": _three([mm * n for mm, n in zip(spacing, step, strict=True)], 1.0),
        "first": _three(first, 0),
        "last": _three(last, 0),
        "step": _three(step, 1),
        "full": _three(full, 1),
        "flipped": flipped,
        "canonical": view.canonical,
        "volume": len(shape) == 3,
        "part": overlay.rank == "" and len(view.shape) == 3,
        "outside": round(100 * overlay.outside),
        "classes": [{"name": names.get(value, f"label {value}"), "colour": colours[value]} for value in colours],
        "probability": overlay.probability is not None,
        "labels": _packed(
            [
                *(numbered(labels, list(colours)) for labels in (reference, prediction)),
                *([] if overlay.probability is None else [overlay.probability]),
            ]
        ),
    }


def as_json(value: Any) -> Markup:
    """Return JSON that can stand in a page's script element: nothing in it ends the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _three(values: Sequence[float], missing: float) -> list[float]:
    """Return one value per axis of a volume; a picture has two."""
    return [missing, *values][-3:]


def numbered(labels: NDArray[Any], values: Sequence[int]) -> NDArray[np.uint8]:
    """Return labels as their places among `values`, counted from 1."""
    found = np.zeros(labels.shape, np.uint8)
    for place, value in enumerate(values, 1):
        found[labels == value] = min(place, _OTHERS)
    return found


def _packed(arrays: Sequence[NDArray[np.uint8]]) -> str:
    content = b"".join(array.tobytes() for array in arrays)
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def _data(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
