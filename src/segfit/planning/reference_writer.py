"""The reference's plans file, written from a design key for key as nnU-Net 2.8.1's planners write it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from segfit.planning.design import DatasetDesign, Design
from segfit.planning.normalization import MASK_BELOW, scheme_of
from segfit.planning.plan import NormalizationScheme
from segfit.planning.presets import Rules

__all__ = ["NETWORK_CLASSES", "SCHEME_CLASSES", "reference_layers", "write_reference_plans"]

SCHEME_CLASSES: dict[NormalizationScheme, str] = {
    "ct": "CTNormalization",
    "none": "NoNormalization",
    "zscore": "ZScoreNormalization",
    "rescale_to_0_1": "RescaleTo01Normalization",
    "rgb_to_0_1": "RGBTo01Normalization",
}
"""The reference's class for each normalisation."""
NETWORK_CLASSES: dict[Literal["plain", "residual"], tuple[str, str]] = {
    "plain": ("PlainConvUNet", "n_conv_per_stage"),
    "residual": ("ResidualEncoderUNet", "n_blocks_per_stage"),
}
"""The reference's class for each network, and its name for the encoder's convolutions or blocks per stage."""
_SHARED_DATA = {"2d": "nnUNetPlans_2d", "3d_fullres": "nnUNetPlans_3d_fullres"}
"""Residual planners share the default planner's preprocessed data."""


def write_reference_plans(
    dataset: DatasetDesign,
    *,
    dataset_name: str,
    reader: str,
    rules: Rules,
    channel_names: Sequence[str],
    spacings: NDArray[np.float64],
    shapes: NDArray[np.float64],
    relative_size: float,
    intensities: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of the reference's plans file for a design; `spacings`, `shapes` ``(cases, 3)``."""
    schemes = [scheme_of(name) for name in channel_names]
    common = {
        "normalization_schemes": [SCHEME_CLASSES[scheme] for scheme in schemes],
        "use_mask_for_norm": [scheme == "zscore" and relative_size < MASK_BELOW for scheme in schemes],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": _spline(is_label=False, order=3),
        "resampling_fn_seg_kwargs": _spline(is_label=True, order=1),
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": _spline(is_label=False, order=1),
    }
    cascade = dataset.lowres is not None

    def entry(name: str, this: Design, median: list[float] | list[int], batch_dice: bool) -> dict[str, Any]:
        shared = rules.kind == "residual" and name in _SHARED_DATA
        return {
            "data_identifier": _SHARED_DATA[name] if shared else f"{rules.plans_name}_{name}",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": this.batch_size,
            "patch_size": list(this.patch),
            "median_image_size_in_voxels": median,
            "spacing": list(this.spacing_mm),
            **copy.deepcopy(common),
            "architecture": _architecture(this, rules),
            "batch_dice": batch_dice,
        }

    configurations = {"2d": entry("2d", dataset.plane, list(dataset.plane.median_shape), True)}
    if dataset.lowres is not None:
        median = [int(n) for n in dataset.lowres.median_shape]
        configurations["3d_lowres"] = entry("3d_lowres", dataset.lowres, median, False)
        configurations["3d_lowres"]["next_stage"] = "3d_cascade_fullres"
    if dataset.fullres is not None:
        full = entry("3d_fullres", dataset.fullres, list(dataset.fullres.median_shape), cascade)
        configurations["3d_fullres"] = full
    if cascade:
        configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    forward = list(dataset.transpose)
    return {
        "dataset_name": dataset_name,
        "plans_name": rules.plans_name,
        "original_median_spacing_after_transp": [float(v) for v in np.median(spacings, axis=0)[forward]],
        "original_median_shape_after_transp": [round(float(v)) for v in np.median(shapes, axis=0)[forward]],
        "image_reader_writer": reader,
        "transpose_forward": forward,
        "transpose_backward": [forward.index(axis) for axis in range(3)],
        "configurations": configurations,
        "experiment_planner_used": rules.planner,
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": copy.deepcopy(dict(intensities)),
    }


def _spline(*, is_label: bool, order: int) -> dict[str, Any]:
    return {"is_seg": is_label, "order": order, "order_z": 0, "force_separate_z": None}


def _architecture(this: Design, rules: Rules) -> dict[str, Any]:
    ndim, stages = len(this.patch), len(this.topology.strides)
    encoder, decoder = rules.convs(stages)
    class_name, encoder_key = NETWORK_CLASSES[rules.kind]
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{class_name}",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(rules.features(ndim, stages)),
            "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
            "kernel_sizes": [list(kernel) for kernel in this.topology.kernels],
            "strides": [list(stride) for stride in this.topology.strides],
            encoder_key: list(encoder),
            "n_conv_per_stage_decoder": list(decoder),
            **reference_layers(ndim),
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def reference_layers(ndim: int) -> dict[str, Any]:
    """Return the layers that all of the reference's planners write: the only ones segfit has."""
    return {
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{ndim}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
