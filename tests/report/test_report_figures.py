from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from segfit.report import figures, overlays, views
from segfit.report.data import Overlay, TrainingCurve
from segfit.report.views import View


def _curve(**parts: object) -> TrainingCurve:
    return TrainingCurve(configuration="2d", fold=0, **parts)  # type: ignore[arg-type]


def test_events_become_curves() -> None:
    events = [
        {"kind": "step", "step": 10, "seconds": 1.0, "share": 0.5, "loss": 0.2, "learning_rate": 0.01},
        {"kind": "skipped", "step": 11, "loss": None, "gradient_norm": None},
        {"kind": "validation", "step": 10, "seconds": 1.1, "share": 0.5, "dice": {"a": 0.3, "b": None}, "mean": 0.3},
        {"kind": "resumed", "step": 12},
        {"kind": "step", "step": 20, "seconds": 2.0, "share": 1.0, "loss": -0.1, "learning_rate": 0.0},
    ]
    curve = TrainingCurve.from_events("2d", 3, events)
    assert curve.share == (0.5, 1.0)
    assert curve.loss == (0.2, -0.1)
    assert curve.learning_rate == (0.01, 0.0)
    assert curve.validation_share == (0.5,)
    assert curve.dice["a"] == (0.3,)
    assert np.isnan(curve.dice["b"]).all()
    assert (curve.steps, curve.seconds, curve.skipped, curve.fold) == (20, 2.0, 1, 3)


def test_long_curves_are_thinned_by_means() -> None:
    n = 10_000
    loss = np.ones(n)
    loss[:84] = np.nan
    x, y = figures._thinned(np.linspace(0, 1, n).tolist(), loss.tolist())
    assert len(x) == len(y) <= 240
    assert np.isnan(y[:2]).all()
    assert np.all(y[2:] == 1)
    assert np.all(np.diff(x) > 0)


def test_figures_are_inline_svg_with_own_ids() -> None:
    curve = _curve(share=(0.1, 0.5, 1.0), loss=(1.0, float("nan"), -0.5), learning_rate=(0.01, 0.005, 0.0))
    svg = figures.loss_figure([curve], "a")
    assert svg.startswith("<svg")
    assert svg.endswith("</svg>")
    assert "Training loss" in svg
    assert "metadata" not in svg
    assert "DOCTYPE" not in svg
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert ids
    assert all(name.startswith("a-loss-") for name in ids)
    assert set(re.findall(r"url\(#([^)]*)\)", svg)) <= set(ids)
    assert "0.005" in figures.learning_rate_figure([curve], "b")


def test_dice_of_folds_that_miss_values() -> None:
    nan = float("nan")
    curves = [
        _curve(validation_share=(0.2, 0.6, 1.0), dice={"x": (0.1, 0.5, 0.9), "y": (nan, nan, nan)}),
        _curve(validation_share=(0.3, 0.9), dice={"x": (0.2, nan), "y": (0.1, 0.2)}),
    ]
    assert "some validation cases" in figures.validation_figure(curves, ["x", "y"], "p")


def test_strip_shows_quartiles_and_points() -> None:
    svg = figures.strip([0.0, 0.25, 0.5, 0.75, 1.0, float("nan")], 0.0)
    box = re.search(r'<rect x="([\d.]+)" y="5" width="([\d.]+)"', svg)
    assert box is not None
    assert float(box[1]) == pytest.approx(3 + 394 * 0.25, abs=0.1)
    assert float(box[2]) == pytest.approx(394 * 0.5, abs=0.1)
    assert svg.count("<circle") == 5
    assert 'x1="200.0" x2="200.0" y1="3"' in svg
    many = figures.strip([0.9] * 400 + [0.1], 0.0)
    assert many.count("<circle") == 1
    assert figures.strip([float("nan")], 0.0).count("<circle") == 0


@pytest.mark.parametrize(
    ("low", "ticks"),
    [(0.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.8, [0.8, 0.85, 0.9, 0.95, 1.0]), (0.3, [0.4, 0.6, 0.8, 1.0])],
)
def test_strip_ticks(low: float, ticks: list[float]) -> None:
    assert figures.strip_ticks(low) == pytest.approx(ticks)


def test_fullest_slice() -> None:
    reference = np.zeros((4, 5, 6), np.uint8)
    prediction = np.zeros_like(reference)
    assert views.fullest_slice(reference, prediction, 0) == 2
    prediction[3, 1:3] = 1
    assert views.fullest_slice(reference, prediction, 0) == 3
    reference[1, 4, :2] = 2
    assert views.fullest_slice(reference, prediction, 0) == 1
    assert views.fullest_slice(reference, prediction, 1) == 4


def _overlay(**parts: object) -> Overlay:
    shape = (6, 8, 10)
    reference = np.zeros(shape, np.uint8)
    reference[2, 1, 3] = 1
    values = {
        "case": "a",
        "kind": "test",
        "rank": "best",
        "dice": 1.0,
        "image": np.arange(480, dtype=np.float32).reshape(1, *shape),
        "reference": reference,
        "prediction": reference,
        "spacing_mm": (3.0, 1.0, 0.5),
        "canonical": False,
    } | parts
    view = View.of(**{name: values.pop(name) for name in ("image", "reference", "spacing_mm", "canonical")})  # type: ignore[arg-type]
    return Overlay.of(view=view, **values)  # type: ignore[arg-type]


def test_planes_follow_orientation_and_spacing() -> None:
    stored = overlays.planes(_overlay())
    assert [plane.caption for plane in stored] == ["slice 3 of 6 on z", "slice 2 of 8 on y"]
    assert [plane.size_mm for plane in stored] == [(8.0, 5.0), (18.0, 5.0)]
    assert stored[0].reference[1, 3] == 1
    assert stored[0].sides == ("", "")
    canonical = overlays.planes(_overlay(canonical=True))
    assert canonical[0].caption == "Axial slice 3 of 6"
    assert canonical[0].reference[8 - 1 - 1, 10 - 1 - 3] == 1  # anterior on top, the right side on the left
    assert canonical[1].reference[6 - 1 - 2, 10 - 1 - 3] == 1
    assert canonical[0].sides == ("R", "L")


def test_panels_keep_the_aspect_of_the_spacing() -> None:
    plane = overlays.planes(_overlay())[1]
    svg = overlays.draw_plane(plane, {1: "#0072B2"}, "x", 180)
    size = re.search(r'<image id="x" width="([\d.]+)" height="([\d.]+)"', svg)
    assert size is not None
    assert float(size[1]) / float(size[2]) == pytest.approx(5 / 18, rel=0.01)
    assert svg.count('href="#x"') == 2
    assert svg.count('stroke="#0072B2"') == 2


def test_outline_surrounds_the_voxels() -> None:
    labels = np.zeros((4, 4), np.uint8)
    labels[1:3, 1:3] = 5
    outline = overlays._outlines(labels, (40.0, 80.0))
    assert set(outline) == {5}
    points = np.array([[float(v) for v in pair.split()] for pair in re.findall(r"[\d.]+ [\d.]+", outline[5])])
    # Half-way between the centres of voxels inside and outside: the edge of the voxels, corners cut.
    assert points.min(0).tolist() == [20.0, 10.0]
    assert points.max(0).tolist() == [60.0, 30.0]
    edge = overlays._outlines(np.ones((2, 2), np.uint8), (2.0, 2.0))
    assert edge[1].endswith("Z")


def test_colour_pictures_stay_in_colour() -> None:
    image = np.zeros((3, 16, 24), np.uint8)
    image[0] = 250
    labels = np.zeros((16, 24), np.uint8)
    overlay = _overlay(image=image, reference=labels, prediction=labels, spacing_mm=(1.0, 1.0))
    (plane,) = overlays.planes(overlay)
    assert plane.pixels.shape == (16, 24, 3)
    svg = overlays.draw_plane(plane, {}, "rgb", 100)
    encoded = re.search(r"base64,([^\"]+)", svg)
    assert encoded is not None
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[1]))).convert("RGB"))
    assert pixels[..., 0].min() > 240
    assert pixels[..., 1:].max() < 15


def test_grey_window_follows_the_foreground() -> None:
    picture = np.full((40, 50), -1000.0, np.float32)
    picture[:, 10:40] = 40.0
    picture[0, :30] = 900.0
    inside = np.linspace(60, 160, 101, dtype=np.float32)
    low, high = views._window(picture, inside)
    assert (low, high) == pytest.approx((62 - 96, 158 + 96))
    low, high = views._window(picture, inside[:0])
    assert (low, high) == (-1000, 900)


def test_large_pictures_are_thinned() -> None:
    labels = np.zeros((1000, 500), np.uint8)
    image = np.zeros((1, 1000, 500), np.float32)
    (plane,) = overlays.planes(_overlay(image=image, reference=labels, prediction=labels, spacing_mm=(1.0, 1.0)))
    assert max(plane.pixels.shape) <= 448
    assert plane.pixels.shape == plane.reference.shape
    assert plane.size_mm == (1000.0, 500.0)
