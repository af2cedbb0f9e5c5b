"""Tiles, padding, mirroring, importance and aggregation against the reference's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segfit.inference.predictor import Predictor
from segfit.inference.tiles import importance_map, mirror_subsets, padding, tile_corners, tile_starts
from segfit.labels import LabelScheme
from segfit.specs import Configuration, NetworkSpec, Normalization, PreprocessingSpec

pytestmark = pytest.mark.golden("sliding_window")


def load(golden: Path, name: str) -> Any:
    return json.loads((golden / "sliding_window" / name).read_text())


def test_tile_starts(golden: Path) -> None:
    entries = load(golden, "tile_starts.json")
    assert entries
    for entry in entries:
        sizes = zip(entry["image_size"], entry["patch_size"], strict=True)
        starts = [list(tile_starts(n, p, entry["tile_step_size"])) for n, p in sizes]
        assert starts == entry["starts"], entry


def test_tile_order(golden: Path) -> None:
    for entry in load(golden, "tile_order.json"):
        size = entry["image_size"]
        patch = [1] * (len(size) - len(entry["patch_size"])) + entry["patch_size"]
        starts = [tile_starts(n, p, entry["tile_step_size"]) for n, p in zip(size, patch, strict=True)]
        tiles = [
            [a if p == 1 else [a, a + p] for a, p in zip(corner, patch, strict=True)] for corner in tile_corners(starts)
        ]
        assert tiles == entry["tiles"]


def test_padding(golden: Path) -> None:
    for entry in load(golden, "padding.json"):
        shape = entry["image_shape_with_channels"][1:]
        patch = [1] * (len(shape) - len(entry["patch_size"])) + entry["patch_size"]
        margins = padding(shape, patch)
        assert [low + n + high for (low, high), n in zip(margins, shape, strict=True)] == entry["padded_shape"][1:]
        content = [[low, low + n] for (low, _), n in zip(margins, shape, strict=True)]
        assert content == entry["content_at"][1:]


def test_mirroring(golden: Path) -> None:
    for entry in load(golden, "mirroring.json"):
        subsets = mirror_subsets(entry["allowed_axes"] or ())
        assert [list(subset) for subset in subsets] == entry["passes"]
        assert len(subsets) == entry["divide_by"]


def test_importance(golden: Path) -> None:
    maps = np.load(golden / "sliding_window" / "gaussian_maps.npz")
    for key in (key for key in maps if key.startswith("float32")):
        size = key.rpartition("_")[2]
        ours = importance_map([int(n) for n in size.split("x")])
        np.testing.assert_allclose(ours, maps[key], rtol=1e-6)
        half = (ours * np.float32(10)).astype(np.float16)  # the reference's own precision
        half[half == 0] = half[half > 0].min()
        np.testing.assert_array_equal(half, maps[f"float16_scale10_{size}"])


class Linear(nn.Module):
    """The known network: (c + 1) times the sum of the channels, plus a term that depends on the place in the patch."""

    def __init__(self, term: Tensor) -> None:
        super().__init__()
        self.term = nn.Parameter(term)

    def forward(self, x: Tensor) -> Tensor:
        total = x.sum(1, keepdim=True)
        return torch.cat([(c + 1) * total for c in range(len(self.term))], dim=1) + self.term


def test_aggregation(golden: Path) -> None:
    runs = load(golden, "aggregation.json")
    assert runs
    with np.load(golden / "sliding_window" / "aggregation.npz") as arrays:
        for settings in runs:
            prefix = f"{settings['name']}_"
            assert_aggregated(
                settings, {key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)}
            )


def assert_aggregated(settings: dict[str, Any], arrays: dict[str, Any]) -> None:
    term = torch.from_numpy(arrays["patch_term"])
    labels = {"background": 0} | {f"label {value}": value for value in range(1, len(term))}
    predictor = Predictor(
        minimal(settings["patch_size"], settings["image_shape"][0], len(term)),
        LabelScheme.from_declaration(labels),
        [Linear(term)],
        settings["mirror_axes"] or (),
        torch.device("cpu"),
        settings["tile_step_size"],
        gaussian=settings["use_gaussian"],
    )
    logits = predictor.logits(arrays["input"]).numpy()
    np.testing.assert_allclose(logits, arrays["logits_full_precision"], atol=1e-4, err_msg=settings["name"])
    difference = np.abs(logits - arrays["logits"].astype(np.float32))
    reliable = arrays["weight_sum"] > 1e-5
    assert difference[:, reliable].max() <= 0.03
    assert difference.max() <= 0.5


def minimal(patch: list[int], channels: int, outputs: int) -> Configuration:
    ndim = len(patch)
    ones = (1,) * ndim
    return Configuration(
        name="run",
        ndim=ndim,
        patch_size=tuple(patch),
        batch_size=2,
        spacing_mm=(1.0,) * ndim,
        median_shape=tuple(float(p) for p in patch),
        batch_dice=False,
        preprocessing=PreprocessingSpec(
            orientation="stored",
            transpose=(0, 1, 2),
            spacing_mm=(None, None, None),
            normalization=(Normalization(scheme="none"),) * channels,
        ),
        network=NetworkSpec(
            kind="plain",
            ndim=ndim,
            in_channels=channels,
            num_outputs=outputs,
            features=(2, 2),
            strides=(ones, ones),
            kernels=(ones, ones),
            encoder_convs=(1, 1),
            decoder_convs=(1,),
        ),
        memory_estimate=0,
    )
