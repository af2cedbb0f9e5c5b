"""Entries of nnU-Net's plans file, key for key as nnU-Net 2.8.1's planners write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from segfit.errors import InputError
from segfit.options import NormalizationScheme
from segfit.specs import Configuration, ResamplingSpec

__all__ = [
    "NETWORK_CLASSES",
    "SCHEME_CLASSES",
    "architecture_entry",
    "configuration_entry",
    "reference_layers",
    "resampling_entries",
]

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
        **resampling_entries(preprocessing.resample_image, preprocessing.resample_label, preprocessing.resample_scores),
        "architecture": architecture_entry(
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


def resampling_entries(image: ResamplingSpec, label: ResamplingSpec, scores: ResamplingSpec) -> dict[str, Any]:
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


def architecture_entry(
    kind: Literal["plain", "residual"],
    ndim: int,
    features: Sequence[int],
    kernels: Sequence[Sequence[int]],
    strides: Sequence[Sequence[int]],
    encoder_convs: Sequence[int],
    decoder_convs: Sequence[int],
) -> dict[str, Any]:
    """Return a network, its values per stage, under the names of the reference's file."""
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
