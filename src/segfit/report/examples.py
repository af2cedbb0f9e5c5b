"""The pictures of a page: what its viewer, its gallery and its stills show."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from segfit.report import figures, overlays
from segfit.report.data import Kind, Overlay
from segfit.report.overlays import Plane
from segfit.report.viewer import as_json, case_facts, case_title, numbered
from segfit.text import dice

__all__ = ["examples", "page_key", "shown_of"]

_MOST = 13_000_000  # characters of pictures in a page; what is over it of cases without a rank is left out
_THUMB = 112  # pixels of a side, twice as many for dense screens
_WARNING = (
    "These pictures are taken from the images of the dataset. Where they are of people, pass this page on as you "
    "would pass on the images; --no-images writes it without them."
)


def examples(
    shown: Sequence[Overlay], names: Mapping[int, str], pages: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """Return the pictures of cases in their order: data of the viewer, thumbnails, and stills of those with a rank.

    Parameters
    ----------
    pages : by `page_key`, where a page of its own shows a case whole
    """
    if not shown:
        return None
    labels = (array for one in shown for array in (*one.cuts, *(part.reference for part in one.view.slices)))
    values = {int(value) for array in labels for value in np.unique(array) if value > 0}
    values |= {value for one in shown for value in one.view.values}
    values |= {int(value) for one in shown if one.volume is not None for value in np.unique(one.volume) if value > 0}
    colours = overlays.label_colours(values | set(names))
    return {
        "cases": list(_fitting(shown, colours, names, pages or {})),
        "legend": [
            {"name": names.get(value, f"label {value}"), "colour": figures.css(colours[value])}
            for value in sorted(values)
        ],
        "canonical": any(one.view.canonical for one in shown),
        "flagged": any(one.rank == "flagged" for one in shown),
        "whole": any(one.volume is not None and len(one.view.shape) == 3 for one in shown),
        "warning": _WARNING,
    }


def _fitting(
    shown: Sequence[Overlay], colours: Mapping[int, str], names: Mapping[int, str], pages: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Yield cases, those with a rank first, as long as the page stays small enough."""
    total = 0
    for number, one in enumerate(sorted(shown, key=lambda one: not one.rank)):
        case = _case(number, one, colours, names, pages.get(page_key(one)))
        total += sum(len(part) for part in (case["facts"], case["thumb"], *(still["svg"] for still in case["planes"])))
        if total > _MOST and not one.rank:
            return
        yield case


def page_key(one: Overlay) -> str:
    """Return by what the page of a case is found: test cases may have the names of training cases."""
    return f"{one.kind}/{one.case}"


def shown_of(pictures: Mapping[str, Any] | None, kind: Kind) -> dict[str, int]:
    """Return the place of the picture of each case of a kind."""
    cases = pictures["cases"] if pictures else ()
    return {case["case"]: number for number, case in enumerate(cases) if case["kind"] == kind}


def _case(
    number: int, one: Overlay, colours: Mapping[int, str], names: Mapping[int, str], page: str | None
) -> dict[str, Any]:
    planes = overlays.planes(one)
    height = overlays.panel_height(planes)
    stills = [
        {"caption": plane.caption, "svg": overlays.draw_plane(plane, colours, f"ov{number}-{i}", height)}
        for i, plane in enumerate(planes)
        if one.rank or one.volume is not None
    ]
    facts = case_facts(one, colours, names) | ({"page": page} if page else {})
    return {
        "case": one.case,
        "kind": one.kind,
        "rank": one.rank,
        "title": case_title(one),
        "dice": dice(one.dice),
        "planes": stills,
        "thumb": Markup(f"data:image/jpeg;base64,{_thumbnail(planes[0], colours)}"),
        "alt": f"{one.case}, {planes[0].caption or 'the whole picture'}, with what was predicted",
        "facts": as_json(facts),
    }


def _thumbnail(plane: Plane, colours: Mapping[int, str]) -> str:
    """Return a slice in a black square with the outlines of what was predicted, as base64 of a JPEG."""
    from PIL import Image

    side = 2 * _THUMB
    scale = side / max(plane.size_mm)
    size = max(1, round(plane.size_mm[1] * scale)), max(1, round(plane.size_mm[0] * scale))
    picture = Image.fromarray(np.ascontiguousarray(plane.pixels)).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    places = numbered(plane.prediction, list(colours))
    labels = np.asarray(Image.fromarray(places).resize(size, Image.Resampling.NEAREST))
    edge = overlays.edges(labels)
    pixels = np.array(picture)
    for place, colour in enumerate(colours.values(), 1):
        pixels[edge & (labels == place)] = np.frombuffer(bytes.fromhex(colour[1:]), np.uint8)
    square = Image.new("RGB", (side, side))
    square.paste(Image.fromarray(pixels), ((side - size[0]) // 2, (side - size[1]) // 2))
    buffer = io.BytesIO()
    square.save(buffer, format="JPEG", quality=70)
    return base64.b64encode(buffer.getvalue()).decode()
