"""Overlays: colours where something is labelled, the image where nothing is; label files stay numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from segfit.dataset.manifest import Case
from segfit.errors import Problem
from segfit.execution.execution import LOCAL
from segfit.geometry import Grid
from segfit.images.formats import read_image, write_labels
from segfit.images.image import LabelMap
from segfit.labels import LabelScheme
from segfit.progress import SILENT, KeptWarnings
from segfit.report.figures import PALETTE
from segfit.report.pictures import draw_overlays, legend

_LABELS = LabelScheme.from_declaration({"background": 0, "cell": 1, "wall": 2})


def _case(folder: Path, name: str, shape: tuple[int, int] = (12, 20), mode: str = "RGB") -> tuple[Case, Path]:
    labels = np.zeros(shape, np.uint8)
    labels[2:7, 3:9] = 1
    labels[8:11, 12:18] = 2
    pixels = np.random.default_rng(0).integers(60, 200, (*shape, 3)).astype(np.uint8)
    Picture.fromarray(pixels).convert(mode).save(folder / f"{name}_0000.png")
    write_labels(folder / f"{name}.png", LabelMap(labels, Grid(shape, (1.0, 1.0))))
    return Case(id=name, images=(folder / f"{name}_0000.png",)), folder / f"{name}.png"


def _rgb(colour: str) -> list[int]:
    return list(bytes.fromhex(colour[1:]))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_picture_in_colours(tmp_path: Path, mode: str) -> None:
    case, label = _case(tmp_path, "a", mode=mode)
    before = label.read_bytes()
    [drawn] = draw_overlays([case], [label], tmp_path / "overlays", _LABELS, LOCAL)
    assert drawn == tmp_path / "overlays" / "a.png"
    shown = np.moveaxis(read_image(drawn).array, 0, -1)
    assert shown.shape == (12, 20, 3)
    assert shown[2, 3].tolist() == _rgb(PALETTE[0])  # edges are opaque
    assert shown[10, 17].tolist() == _rgb(PALETTE[1])
    inside = shown[4, 5].astype(int)
    assert inside.tolist() != _rgb(PALETTE[0])
    assert inside[2] > inside[0]  # blue
    plain = np.zeros((12, 20), bool)
    plain[:, 18:] = True
    assert len(np.unique(shown[plain], axis=0)) > 10  # the image itself, unpainted
    assert label.read_bytes() == before
    with Picture.open(label) as stored:
        assert (stored.mode, stored.getextrema()) == ("L", (0, 2))  # with a palette others would read colours


def test_of_a_volume_the_axial_slice_with_most_in_it_is_drawn(tmp_path: Path) -> None:
    grid = Grid((5, 16, 18), (3.0, 1.0, 1.0), np.diag([1.0, 1.0, 3.0, 1.0]))
    labels = np.zeros(grid.shape, np.uint8)
    labels[3, 2:6, 1:8] = 2
    image = np.random.default_rng(0).integers(1, 200, grid.shape).astype(np.uint8)
    for name, array in (("v_0000", image), ("v", labels)):
        write_labels(tmp_path / f"{name}.nii.gz", LabelMap(array, grid))
    case = Case(id="v", images=(tmp_path / "v_0000.nii.gz",))
    [drawn] = draw_overlays([case], [tmp_path / "v.nii.gz"], tmp_path / "o", _LABELS, LOCAL)
    shown = np.moveaxis(read_image(drawn).array, 0, -1)
    painted = (shown == _rgb(PALETTE[1])).all(axis=2)
    edge = labels[3] > 0
    edge[3:5, 2:7] = False
    assert np.array_equal(painted, edge[::-1, ::-1])  # the patient's right on the left, front on top


def test_large_pictures_are_drawn_whole(tmp_path: Path) -> None:
    case, label = _case(tmp_path, "a", shape=(30, 900))
    [drawn] = draw_overlays([case], [label], tmp_path / "o", _LABELS, LOCAL)
    assert read_image(drawn).array.shape == (3, 30, 900)


def test_what_cannot_be_drawn_stops_nothing(tmp_path: Path) -> None:
    pairs = [_case(tmp_path, name) for name in ("a", "b", "c")]
    pairs[0][1].unlink()  # not predicted
    pairs[1][0].images[0].write_bytes(b"no picture")
    kept = KeptWarnings(SILENT)
    cases, labels = zip(*pairs, strict=True)
    drawn = draw_overlays(cases, labels, tmp_path / "o", _LABELS, replace(LOCAL, progress=kept))
    assert [path.name for path in drawn] == ["c.png"]
    [warning] = kept.warnings
    assert isinstance(warning, Problem)
    assert (warning.case, warning.code, warning.fatal) == ("b", "not_drawn", False)
    assert warning.action


def test_the_legend_names_classes_until_colours_repeat() -> None:
    assert legend(_LABELS) == ": cell is blue, wall is orange"
    many = LabelScheme.from_declaration({"background": 0, **{f"c{n}": n for n in range(1, 10)}})
    assert legend(many) == ""
