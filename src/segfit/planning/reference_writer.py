"""The reference's plans file, written from a design key for key as nnU-Net 2.8.1's planners write it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from segfit.errors import InputError
from segfit.options import NormalizationScheme
from segfit.planning.design import DatasetDesign, Design
from segfit.planning.normalization import MASK_BELOW, scheme_of
from segfit.planning.plan import Configuration, ResamplingSpec
from segfit.planning.presets import Rules

__all__ = ["NETWORK_CLASSES", "SCHEME_CLASSES", "configuration_entry", "reference_layers", "write_reference_plans"]

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
_FUNCTIONS = {
    "spline": "resample_data_or_seg_to_shape",
    "torch": "resample_torch_fornnunet",
    "none": "no_resampling_hack",
}
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
    masks = [scheme == "zscore" and relative_size < MASK_BELOW for scheme in schemes]
    cascade = dataset.lowres is not None

    def entry(name: str, this: Design, median: list[float] | list[int], batch_dice: bool) -> dict[str, Any]:
        shared = rules.kind == "residual" and name in _SHARED_DATA
        ndim, stages = len(this.patch), len(this.topology.strides)
        encoder, decoder = rules.convs(stages)
        return {
            "data_identifier": _SHARED_DATA[name] if shared else f"{rules.plans_name}_{name}",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": this.batch_size,
            "patch_size": list(this.patch),
            "median_image_size_in_voxels": median,
            "spacing": list(this.spacing_mm),
            "normalization_schemes": [SCHEME_CLASSES[scheme] for scheme in schemes],
            "use_mask_for_norm": list(masks),
            **_resampling(ResamplingSpec(order=3), ResamplingSpec(order=1), ResamplingSpec(order=1)),
            "architecture": _architecture(
                rules.kind,
                ndim,
                rules.features(ndim, stages),
                this.topology.kernels,
                this.topology.strides,
                encoder,
                decoder,
            ),
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


def configuration_entry(item: Configuration, identifier: str) -> dict[str, Any]:
    """Return a configuration as an entry of the reference's plans file, complete in itself.

    `identifier` names its preprocessed data. What links it to other configurations is for the caller to add. Raises
    `InputError` for a configuration on canonical axes, which the reference does not have.
    """
    preprocessing, network = item.preprocessing, item.network
    if preprocessing.orientation != "stored" and item.preprocessing.image_ndim == 3:
        raise InputError(
            f"configuration {item.name} sees canonical axes, which nnU-Net does not know; plan with --preset stock or "
            "--set planning.orientation=stored"
        )
    normalization = preprocessing.normalization
    return {
        "data_identifier": identifier,
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": item.batch_size,
        "patch_size": list(item.patch_size),
        "median_image_size_in_voxels": list(item.median_shape),
        "spacing": list(item.spacing_mm),
        "normalization_schemes": [SCHEME_CLASSES[how.scheme] for how in normalization],
        "use_mask_for_norm": [how.use_mask for how in normalization],
        **_resampling(preprocessing.resample_image, preprocessing.resample_label, preprocessing.resample_scores),
        "architecture": _architecture(
            network.kind,
            network.ndim,
            network.features,
            network.kernels,
            network.strides,
            network.encoder_convs,
            network.decoder_convs,
        ),
        "batch_dice": item.batch_dice,
    }


def _resampling(image: ResamplingSpec, label: ResamplingSpec, scores: ResamplingSpec) -> dict[str, Any]:
    """Return functions and arguments in the order of the reference's file."""
    functions = [_FUNCTIONS[spec.method] for spec in (image, label, scores)]
    return {
        "resampling_fn_data": functions[0],
        "resampling_fn_seg": functions[1],
        "resampling_fn_data_kwargs": _arguments(image, is_label=False),
        "resampling_fn_seg_kwargs": _arguments(label, is_label=True),
        "resampling_fn_probabilities": functions[2],
        "resampling_fn_probabilities_kwargs": _arguments(scores, is_label=False),
    }


def _arguments(spec: ResamplingSpec, *, is_label: bool) -> dict[str, Any]:
    other = {} if spec.separate_threshold == 3 else {"separate_z_anisotropy_threshold": spec.separate_threshold}
    if spec.method == "none":
        return {}
    if spec.method == "torch":
        return {
            "is_seg": is_label,
            "force_separate_z": spec.force_separate,
            "memefficient_seg_resampling": False,
            **other,
        }
    return {
        "is_seg": is_label,
        "order": spec.order,
        "order_z": spec.order_separate_axis,
        "force_separate_z": spec.force_separate,
        **other,
    }


def _architecture(
    kind: Literal["plain", "residual"],
    ndim: int,
    features: Sequence[int],
    kernels: Sequence[Sequence[int]],
    strides: Sequence[Sequence[int]],
    encoder_convs: Sequence[int],
    decoder_convs: Sequence[int],
) -> dict[str, Any]:
    class_name, encoder_key = NETWORK_CLASSES[kind]
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{class_name}",
        "arch_kwargs": {
            "n_stages": len(features),
            "features_per_stage": list(features),
            "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
            "kernel_sizes": [list(kernel) for kernel in kernels],
            "strides": [list(stride) for stride in strides],
            encoder_key: list(encoder_convs),
            "n_conv_per_stage_decoder": list(decoder_convs),
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
