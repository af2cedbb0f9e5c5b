"""Plans of the reference for many datasets, some of them preprocessed, and its networks' feature-map counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference_datasets import PRESETS, fingerprint_of, labels_of, preset_and_memory, read_datasets
from segfit import nnunet
from segfit.errors import InputError
from segfit.feature_maps import feature_map_elements
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.labels import LabelScheme
from segfit.nnunet.plans_reader import read_plans_file, read_reference_plans, write_plans_file
from segfit.options import Options
from segfit.planning.planner import derive
from segfit.specs import Configuration

pytestmark = pytest.mark.golden("plans.jsonl.gz")

_SCHEMES = {
    "ct": "CTNormalization",
    "none": "NoNormalization",
    "zscore": "ZScoreNormalization",
    "rescale_to_0_1": "RescaleTo01Normalization",
    "rgb_to_0_1": "RGBTo01Normalization",
}


@pytest.fixture(scope="module")
def datasets(golden: Path) -> list[dict[str, Any]]:
    rows = read_datasets(golden)
    assert rows
    return rows


def _assert_agrees(ours: Configuration, theirs: dict[str, Any], name: str) -> None:
    network, kwargs = ours.network, theirs["architecture"]["arch_kwargs"]
    encoder = kwargs.get("n_conv_per_stage", kwargs.get("n_blocks_per_stage"))
    assert ours.name == name
    assert list(ours.patch_size) == theirs["patch_size"]
    assert ours.batch_size == theirs["batch_size"]
    assert list(ours.spacing_mm) == pytest.approx(theirs["spacing"], rel=1e-9)
    assert list(ours.median_shape) == theirs["median_image_size_in_voxels"]
    assert ours.batch_dice is theirs["batch_dice"]
    assert [list(stride) for stride in network.strides] == kwargs["strides"]
    assert [list(kernel) for kernel in network.kernels] == kwargs["kernel_sizes"]
    assert list(network.features) == kwargs["features_per_stage"]
    assert list(network.encoder_convs) == encoder
    assert list(network.decoder_convs) == kwargs["n_conv_per_stage_decoder"]
    assert network.kind == ("plain" if "PlainConvUNet" in theirs["architecture"]["network_class_name"] else "residual")
    normalization = ours.preprocessing.normalization
    assert [_SCHEMES[item.scheme] for item in normalization] == theirs["normalization_schemes"]
    assert [item.use_mask for item in normalization] == theirs["use_mask_for_norm"]


def _trainable(theirs: dict[str, Any]) -> list[str]:
    """Return the configurations whose network has a decoder; the reference plans others, too, but cannot train them."""
    expected = theirs["configurations"]
    complete = {name: expected[entry.get("inherits_from", name)] for name, entry in expected.items()}
    return [name for name, entry in complete.items() if entry["architecture"]["arch_kwargs"]["n_stages"] > 1]


def _assert_same_plan(fingerprint: Fingerprint, scheme: LabelScheme, options: Options, theirs: dict[str, Any]) -> None:
    names = _trainable(theirs)
    if not names:
        with pytest.raises(InputError, match="there is nothing to train"):
            derive(fingerprint, scheme, options)
        return
    plan, expected = derive(fingerprint, scheme, options), theirs["configurations"]
    assert list(plan.configurations) == names
    # Networks of two stages cannot be supervised deeply; everything else is the reference's decision.
    assert plan.stock == all(config.network.num_stages > 2 for config in plan.configurations.values())
    for name, configuration in plan.configurations.items():
        assert configuration.previous_stage == expected[name].get("previous_stage")
        assert configuration.next_stage == expected[name].get("next_stage")
        parent = expected[expected[name].get("inherits_from", name)]
        _assert_agrees(configuration, parent, name)
        transpose = configuration.preprocessing.transpose
        assert list(transpose) == (theirs["transpose_forward"] if len(transpose) == 3 else [0, 1])


def test_every_plan_is_the_references(datasets: list[dict[str, Any]]) -> None:
    for item in datasets:
        fingerprint, scheme = fingerprint_of(item["dataset"], item["fingerprint"]), labels_of(item["dataset"])
        for planner, theirs in item["plans"].items():
            preset, memory = preset_and_memory(planner)
            options = Options.model_validate({"preset": preset, "memory_gb": memory})
            _assert_same_plan(fingerprint, scheme, options, theirs)


def test_plans_files_are_the_references_key_for_key(datasets: list[dict[str, Any]]) -> None:
    for item in datasets:
        for planner, theirs in item["plans"].items():
            preset, memory = preset_and_memory(planner)
            name = theirs["dataset_name"]
            ours = nnunet.plans(item["dataset"], item["fingerprint"], preset, memory, dataset_name=name)
            ours["image_reader_writer"] = theirs["image_reader_writer"]  # set by hand in these data
            _assert_equal(ours, theirs)


@pytest.mark.golden("preprocessing")
@pytest.mark.golden_each("preprocessing/Dataset*/")
def test_plans_of_preprocessed_datasets(path: Path) -> None:
    dataset = json.loads((path / "raw" / "dataset.json").read_text())
    measured = json.loads((path / "dataset_fingerprint.json").read_text())
    theirs = json.loads((path / "nnUNetPlans.json").read_text())
    _assert_equal(nnunet.plans(dataset, measured, dataset_name=theirs["dataset_name"]), theirs)
    _assert_same_plan(fingerprint_of(dataset, measured), labels_of(dataset), Options(preset="stock"), theirs)


def _assert_equal(ours: Any, theirs: Any) -> None:
    """Equal in structure, key order and values; floats to 1e-9."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            _assert_equal(ours[key], theirs[key])
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            _assert_equal(a, b)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-9)
    else:
        assert ours == theirs
        assert type(ours) is type(theirs)


def test_reference_plans_are_read_as_they_were_planned(datasets: list[dict[str, Any]]) -> None:
    """Reading the reference's file gives the configurations that we derive ourselves."""
    for item in datasets[:60]:
        fingerprint, scheme = fingerprint_of(item["dataset"], item["fingerprint"]), labels_of(item["dataset"])
        if scheme.ignore_value is not None:
            continue
        for planner in ("ExperimentPlanner", "nnUNetPlannerResEncL"):
            if planner not in item["plans"] or not _trainable(item["plans"][planner]):
                continue
            plan = derive(fingerprint, scheme, Options.model_validate({"preset": PRESETS[planner]}))
            read = read_reference_plans(item["plans"][planner], item["dataset"])
            assert list(read) == list(item["plans"][planner]["configurations"])
            for name, ours in plan.configurations.items():
                theirs = read[name]
                assert theirs.spacing_mm == pytest.approx(ours.spacing_mm, rel=1e-9)
                kept = theirs.preprocessing.model_copy(update={"spacing_mm": ours.preprocessing.spacing_mm})
                assert theirs.model_copy(update={"spacing_mm": ours.spacing_mm, "preprocessing": kept}) == ours


def test_reference_plans_survive_a_round_trip(datasets: list[dict[str, Any]]) -> None:
    for item in datasets:
        if labels_of(item["dataset"]).ignore_value is not None:
            continue
        for plans in item["plans"].values():
            read = read_plans_file(plans, item["dataset"])
            written = write_plans_file(read)
            assert read_plans_file(written, item["dataset"]) == read
            for name, entry in plans["configurations"].items():
                if "inherits_from" not in entry:
                    assert written["configurations"][name] == entry
            assert {key: value for key, value in written.items() if key != "configurations"} == {
                key: value for key, value in plans.items() if key != "configurations"
            }


@pytest.mark.golden("inference")
@pytest.mark.golden_each("inference/models/*/*/plans.json")
def test_trained_reference_models_are_read(path: Path) -> None:
    name = path.parent.name.rpartition("__")[2]
    dataset = json.loads((path.parent / "dataset.json").read_text())
    read = read_reference_plans(json.loads(path.read_text()), dataset, [name])
    foreground = {value for values in dataset["labels"].values() for value in np.atleast_1d(values)} - {0}
    channels = len(dataset["channel_names"]) + (len(foreground) if name == "3d_cascade_fullres" else 0)
    assert list(read) == [name]
    assert read[name].network.in_channels == channels
    assert read[name].preprocessing.orientation == "stored"
    assert read[name].preprocessing.image_ndim == 3


@pytest.mark.golden("networks")
def test_feature_map_elements_are_those_of_the_built_networks(golden: Path) -> None:
    paths = [*(golden / "networks").glob("*.json"), *(golden / "networks" / "full_size").glob("*.json")]
    compared = 0
    for path in paths:
        stored = json.loads(path.read_text())
        if "feature_map_size_estimate" not in stored:
            continue
        kwargs = stored["architecture"]["arch_kwargs"]
        plain = "n_conv_per_stage" in kwargs
        estimate = feature_map_elements(
            "plain" if plain else "residual",
            stored["patch_size"] if "patch_size" in stored else stored["input_shape"][2:],
            features=kwargs["features_per_stage"],
            strides=kwargs["strides"],
            encoder_convs=kwargs["n_conv_per_stage" if plain else "n_blocks_per_stage"],
            decoder_convs=kwargs["n_conv_per_stage_decoder"],
            heads=stored["num_classes"],
            deep_supervision=stored["deep_supervision"],
        )
        assert estimate == stored["feature_map_size_estimate"], path.name
        compared += 1
    assert compared
