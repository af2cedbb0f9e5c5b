"""Whatever stands in a field of nnU-Net's files: the model is read as before, read as the field says, or refused.

A model that opens is predicted with where that is cheap, so that no traceback waits there either.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from segfit.bundle.bundle import Bundle
from segfit.errors import InputError
from segfit.inference.model import load_model
from segfit.nnunet.models import read_nnunet_model

pytestmark = pytest.mark.golden("inference/models/Dataset602_TinyRegions")

NAME = "nnUNetTrainer__nnUNetPlans__3d_fullres"
ABSURD = [
    *(0, -1, -0.5, 7, True, 2**40, 1e30, 1e-30, math.inf, math.nan, None, "", "x", "../x", "\x1b[31m", "\0"),
    *([], [0], [-1], [1, 2], ["a", "b", "c"], [0] * 100, [[1]], [[]], {}, {"x": 1}, [None], [2**40] * 3, [-1.0, 1, 1]),
]
FIELDS = [  # of a configuration, and of the plans, which segfit follows
    *("patch_size", "spacing", "batch_size", "batch_dice", "median_image_size_in_voxels", "normalization_schemes"),
    *("use_mask_for_norm", "preprocessor_name", "data_identifier", "inherits_from", "previous_stage", "next_stage"),
    *("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities", "resampling_fn_data_kwargs"),
    *("resampling_fn_seg_kwargs", "resampling_fn_probabilities_kwargs", "architecture"),
]


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    source = golden / "inference" / "models" / "Dataset602_TinyRegions" / NAME
    place = tmp_path / NAME
    shutil.copytree(source, place, ignore=shutil.ignore_patterns("fold_1"))
    return place


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def put(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    content = copy.deepcopy(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return content


def opened(folder: Path) -> Bundle | None:
    """Return a model; None where it is refused in a sentence that names the folder."""
    try:
        return read_nnunet_model(folder)
    except InputError as refused:
        error = refused
    assert "\n" not in str(error)
    assert str(folder) in error.problem
    return None


@pytest.mark.parametrize("file", ["plans.json", "dataset.json"])
def test_no_field_of_the_json_files_ends_in_a_traceback(
    folder: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / file
    good, before = json.loads(path.read_text()), read_nnunet_model(folder)
    read = {"value": torch.load(folder / "fold_0/checkpoint_final.pth", weights_only=False)}
    monkeypatch.setattr("segfit.nnunet.models.read_checkpoint", lambda _: read["value"])  # once for all
    refused, same = 0, 0
    used = [place for place in places(good) if place[:1] != ("configurations",) or place[1:2] in ((), ("3d_fullres",))]
    for number, place in enumerate(used):
        for value in ABSURD[number % 7 :: 7]:  # each value in a seventh of the places, five in each
            path.write_text(json.dumps(put(good, place, value)))
            found = opened(folder)
            refused += found is None
            same += found is not None and found.manifest.members == before.manifest.members
    assert refused > 50
    assert same > 0  # of fields that bear on nothing
    path.write_text(json.dumps(good))
    assert opened(folder) is not None


@pytest.mark.parametrize("field", FIELDS)
def test_a_changed_configuration_is_refused_or_followed(folder: Path, field: str) -> None:
    """What opens has the value in its own configuration, or it is a field that bears on no prediction."""
    path = folder / "plans.json"
    good, before = json.loads(path.read_text()), read_nnunet_model(folder).manifest.members[0].configuration
    free = {"batch_size", "batch_dice", "median_image_size_in_voxels", "data_identifier", "next_stage"}
    for value in ABSURD:
        path.write_text(json.dumps(put(good, ("configurations", "3d_fullres", field), value)))
        model = opened(folder)
        if model is not None:
            found = model.manifest.members[0].configuration
            assert found.network == before.network
            assert found != before or field in free or value in (None, [], {}, "", 0), (field, value)


NUMBERS = [
    torch.tensor(3.0),
    torch.zeros(0),
    torch.zeros(2, 3),
    torch.full((3,), math.nan),
    np.zeros(3),
    "x",
    None,
    3,
    [1.0],
]
CHECKPOINT = [
    *[("network_weights", value) for value in (None, 3, [], {}, "x", {"a": torch.zeros(1)}, {3: torch.zeros(1)})],
    *[("network_weights.head", value) for value in NUMBERS],
    *[("init_args", value) for value in (None, {}, [], "3d_fullres", {"configuration": 3}, {"configuration": "2d_x"})],
    *[("trainer_name", value) for value in (None, 3, "", "nnUNetTrainerX", ["nnUNetTrainer"], "a\x1b[31m\nb")],
    *[
        ("inference_allowed_mirroring_axes", value)
        for value in (3, "012", [0, 0], [7], [-1], [True], [0.5], [None], {})
    ],
]


@pytest.mark.parametrize(("place", "value"), CHECKPOINT, ids=lambda value: repr(value)[:30])
def test_no_field_of_a_checkpoint_ends_in_a_traceback(folder: Path, place: str, value: Any) -> None:
    path = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    if place == "network_weights.head":
        content["network_weights"]["decoder.seg_layers.0.bias"] = value
    else:
        content[place] = value
    torch.save(content, path)
    try:
        model = load_model(folder, "cpu")
    except InputError as refused:
        error = refused
    else:
        assert place == "inference_allowed_mirroring_axes"
        assert not value  # nothing to mirror
        image = np.zeros((2, 12, 12, 12), np.float32)
        assert model.predict((image, (1.0, 1.0, 1.0))).labels.shape == (12, 12, 12)
        return
    assert "\n" not in str(error)
    assert str(folder) in error.problem
