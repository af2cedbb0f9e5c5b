from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from segfit import nnunet
from segfit.errors import InputError
from segfit.nnunet.plans_reader import read_configurations
from segfit.specs import ResamplingSpec

_STATISTICS = {
    "mean": 1.0, "median": 1.0, "std": 1.0, "min": 0.0, "max": 3.0, "percentile_00_5": 0.0, "percentile_99_5": 2.0
}  # fmt: skip
_DATASET: dict[str, Any] = {
    "channel_names": {"0": "CT", "1": "T1"},
    "labels": {"background": 0, "liver": 1, "tumour": 2},
    "numTraining": 131,
    "file_ending": ".nii.gz",
}
_FINGERPRINT: dict[str, Any] = {
    "spacings": [[1.0, 0.767578125, 0.767578125]],
    "shapes_after_crop": [[432, 512, 512]],
    "median_relative_size_after_cropping": 0.5,
    "foreground_intensity_properties_per_channel": {"0": _STATISTICS, "1": _STATISTICS},
}


def _plans() -> dict[str, Any]:
    return nnunet.plans(_DATASET, _FINGERPRINT)


def test_plans_are_read() -> None:
    read = read_configurations(_plans(), _DATASET)
    assert list(read) == ["2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"]
    cascade = read["3d_cascade_fullres"]
    assert cascade.network.in_channels == 4
    assert cascade.previous_stage == "3d_lowres"
    assert cascade.patch_size == (128, 128, 128)
    assert cascade.memory_estimate == 452_796_416
    ct, t1 = cascade.preprocessing.normalization
    assert ct.statistics is not None
    assert ct.statistics.mean == 1.0
    assert (t1.scheme, t1.use_mask) == ("zscore", True)
    assert read["2d"].preprocessing.spacing_mm == (None, 0.767578125, 0.767578125)
    assert cascade.preprocessing.resample_image == ResamplingSpec(order=3)


def test_inherited_configurations_take_over_everything_else() -> None:
    plans = _plans()
    plans["configurations"]["3d_big"] = {"inherits_from": "3d_fullres", "batch_size": 40}
    plans["configurations"]["3d_bigger"] = {"inherits_from": "3d_big", "patch_size": [160, 160, 160]}
    read = read_configurations(plans, _DATASET, ["3d_bigger"])
    assert list(read) == ["3d_bigger"]
    assert read["3d_bigger"].batch_size == 40
    assert read["3d_bigger"].patch_size == (160, 160, 160)


def test_the_old_format_is_the_new_one_in_other_words() -> None:
    plans = _plans()
    expected = read_configurations(plans, _DATASET, ["3d_fullres"])
    entry = plans["configurations"]["3d_fullres"]
    kwargs = entry.pop("architecture")["arch_kwargs"]
    entry |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 32,
        "unet_max_num_features": 320,
        "conv_kernel_sizes": kwargs["kernel_sizes"],
        "pool_op_kernel_sizes": kwargs["strides"],
        "n_conv_per_stage_encoder": kwargs["n_conv_per_stage"],
        "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"],
    }
    plans["foreground_intensity_properties_by_modality"] = plans.pop("foreground_intensity_properties_per_channel")
    assert read_configurations(plans, _DATASET, ["3d_fullres"]) == expected
    _round_trip(plans)


def _round_trip(plans: dict[str, Any]) -> tuple[nnunet.PlansFile, dict[str, Any]]:
    read = nnunet.read_plans_file(plans, _DATASET)
    written = nnunet.write_plans_file(read)
    json.dumps(written)
    assert nnunet.read_plans_file(written, _DATASET) == read
    return read, written


def test_a_round_trip_changes_nothing() -> None:
    plans = _plans()
    _, written = _round_trip(plans)
    full = plans["configurations"]["3d_fullres"]
    plans["configurations"]["3d_cascade_fullres"] = full | {"previous_stage": "3d_lowres"}  # nothing is inherited now
    assert written == plans


def test_custom_configurations_and_two_cascades_survive() -> None:
    plans = _plans()
    configurations = plans["configurations"]
    configurations["3d_big"] = {"inherits_from": "3d_fullres", "batch_size": 40, "data_identifier": "mine"}
    configurations["3d_cascade_big"] = {"inherits_from": "3d_big", "previous_stage": "3d_lowres"}
    configurations["3d_lowres"]["next_stage"] = ["3d_cascade_fullres", "3d_cascade_big"]
    read, written = _round_trip(plans)
    assert read.identifiers["3d_cascade_big"] == "mine"
    assert written["configurations"]["3d_lowres"]["next_stage"] == ["3d_cascade_fullres", "3d_cascade_big"]
    assert written["configurations"]["3d_cascade_big"]["batch_size"] == 40
    assert "next_stage" not in written["configurations"]["3d_fullres"]


def test_other_resamplers_survive() -> None:
    plans = _plans()
    plans["configurations"]["3d_fullres"] |= {
        "resampling_fn_data": "resample_torch_fornnunet",
        "resampling_fn_data_kwargs": {"is_seg": False, "force_separate_z": False, "memefficient_seg_resampling": False},
        "resampling_fn_seg": "no_resampling_hack",
        "resampling_fn_seg_kwargs": {},
    }
    _, written = _round_trip(plans)
    entry = written["configurations"]["3d_fullres"]
    assert entry == plans["configurations"]["3d_fullres"]


def test_axes_the_reference_does_not_know_are_refused() -> None:
    read = nnunet.read_plans_file(_plans(), _DATASET)
    full = read.configurations["3d_fullres"]
    turned = full.model_copy(
        update={"preprocessing": full.preprocessing.model_copy(update={"orientation": "canonical"})}
    )
    with pytest.raises(InputError, match=r"3d_fullres sees canonical axes.*--preset stock"):
        nnunet.write_plans_file(replace(read, configurations={"3d_fullres": turned}))


def test_other_resamplers_and_module_paths() -> None:
    plans = nnunet.plans(_DATASET, _FINGERPRINT, "resenc-l")
    entry = plans["configurations"]["3d_fullres"]
    old_path = "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet"
    entry["architecture"]["network_class_name"] = old_path
    entry["resampling_fn_data"] = "resample_torch_fornnunet"
    entry["resampling_fn_data_kwargs"] = {
        "is_seg": False, "force_separate_z": False, "memefficient_seg_resampling": False
    }  # fmt: skip
    entry["resampling_fn_seg"] = "no_resampling_hack"
    entry["resampling_fn_seg_kwargs"] = {}
    read = read_configurations(plans, _DATASET, ["3d_fullres"])["3d_fullres"]
    assert read.network.kind == "residual"
    assert read.network.encoder_convs == (1, 3, 4, 6, 6, 6)
    assert read.preprocessing.resample_image == ResamplingSpec(method="torch", order=1, force_separate=False)
    assert read.preprocessing.resample_label.method == "none"


def test_scalars_stand_for_lists() -> None:
    plans = _plans()
    kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kwargs |= {"kernel_sizes": 3, "n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2}
    kwargs["strides"] = [1, *[2] * (kwargs["n_stages"] - 1)]
    read = read_configurations(plans, _DATASET, ["3d_fullres"])["3d_fullres"]
    assert read.network.kernels == ((3, 3, 3),) * 6
    assert read.network.strides[1] == (2, 2, 2)
    assert read.network.encoder_convs == (2,) * 6


def test_pictures_get_two_axes_and_single_slices_keep_three() -> None:
    measured = _FINGERPRINT | {"spacings": [[999.0, 1.0, 1.0]], "shapes_after_crop": [[1, 512, 512]]}
    pictures = nnunet.plans(_DATASET | {"file_ending": ".png"}, measured)
    assert pictures["image_reader_writer"] == "NaturalImage2DIO"
    read = read_configurations(pictures, _DATASET)["2d"]
    assert (read.preprocessing.transpose, read.preprocessing.spacing_mm) == ((0, 1), (1.0, 1.0))
    flat_nifti = nnunet.plans(_DATASET, measured)
    assert read_configurations(flat_nifti, _DATASET)["2d"].preprocessing.transpose == (0, 1)
    one_slice = nnunet.plans(_DATASET, measured | {"spacings": [[5.0, 1.0, 1.0]]})
    read = read_configurations(one_slice, _DATASET)["2d"]
    assert (read.preprocessing.transpose, read.preprocessing.spacing_mm) == ((0, 1, 2), (None, 1.0, 1.0))


def _set(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(plans: dict[str, Any]) -> None:
        node = plans
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return change


def _remove(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(plans: dict[str, Any]) -> None:
        node = plans
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]

    return change


_FULL = ("configurations", "3d_fullres")
_KWARGS = (*_FULL, "architecture", "arch_kwargs")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_remove("configurations"), 'lack "configurations"'),
        (_remove(*_FULL, "patch_size"), 'lack "patch_size"'),
        (_set(*_FULL, "patch_size", value="large"), '"patch_size" of configuration 3d_fullres'),
        (_set(*_FULL, "patch_size", value=[128, 128]), "both need 2 or 3 values"),
        (_set(*_FULL, "patch_size", value=[100, 128, 128]), "must be a multiple of the strides' [32, 32, 32]"),
        (_set(*_FULL, "patch_size", value=["a", 1, 1]), "must be a list of numbers"),
        (_set(*_FULL, "spacing", value=[1.0, 0.0, 1.0]), "damaged: spacing_mm.1"),
        (_set(*_FULL, "batch_size", value=2.5), '"batch_size"'),
        (_set(*_FULL, "architecture", "network_class_name", value="a.b.Primus"), "uses the network Primus"),
        (_set(*_KWARGS, "n_stages", value=4), "4 stages but features"),
        (_set(*_KWARGS, "features_per_stage", value=32.5), "features_per_stage"),
        (_set(*_KWARGS, "n_conv_per_stage", value=[2, 2]), "one entry per stage"),
        (_set(*_KWARGS, "strides", value=[[1, 1]] * 6), "one entry per axis"),
        (_set(*_KWARGS, "kernel_sizes", value=2), "kernels must be odd"),
        (_set(*_KWARGS, "norm_op", value="torch.nn.GroupNorm"), "norm_op = 'GroupNorm'"),
        (_set(*_KWARGS, "norm_op", value="torch.nn.BatchNorm2d"), "norm_op = 'BatchNorm2d'"),
        (_set(*_KWARGS, "nonlin_first", value=True), "nonlin_first"),
        (_set(*_KWARGS, "conv_op", value="torch.nn.modules.conv.Conv2d"), "conv_op"),
        (
            _set(*_FULL, "normalization_schemes", value=["CTNormalization"]),
            "normalises 1 channels, dataset.json names 2",
        ),
        (_set(*_FULL, "normalization_schemes", value=["Own", "Own"]), "uses the normalisation 'Own'"),
        (_set(*_FULL, "resampling_fn_data", value="own_resampling"), "uses the resampling function 'own_resampling'"),
        (_set(*_FULL, "preprocessor_name", value="OwnPreprocessor"), "OwnPreprocessor"),
        (_set(*_FULL, "inherits_from", value="3d_fullres"), "inherits from itself"),
        (_set(*_FULL, "inherits_from", value="nothing"), "no configuration 'nothing'"),
        (_set(*_FULL, "inherits_from", value=["2d"]), "must name a configuration"),
        (_set("configurations", "3d_lowres", "next_stage", value="2d"), 'whose "next_stage" does not name it'),
        (_set("transpose_forward", value=[0, 0, 1]), "must be an order of 0, 1, 2"),
        (_set("foreground_intensity_properties_per_channel", value={}), 'lack "0"'),
        (_set("foreground_intensity_properties_per_channel", "0", "mean", value="x"), "damaged: mean"),
    ],
)
def test_what_cannot_be_understood_is_refused_in_one_sentence(
    change: Callable[[dict[str, Any]], None], message: str
) -> None:
    plans = copy.deepcopy(_plans())
    change(plans)
    with pytest.raises(InputError) as caught:
        read_configurations(plans, _DATASET)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_neighbour_does_not_matter_when_names_are_given() -> None:
    plans = _plans()
    plans["configurations"]["own"] = {"inherits_from": "nothing"}
    assert list(read_configurations(plans, _DATASET, ["2d"])) == ["2d"]
